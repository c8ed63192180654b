"""WeightTransferEngineFactory: the registry of backends. Installed packages add backends through entry points."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

from weightcast.errors import InvalidInput, Unsupported
from weightcast.receiver.base import LiveModel
from weightcast.untrusted.plugins import VARIABLE, entry_points_of, refusal
from weightcast.weight_transfer.base import WeightTransferEngine, WorkerRank
from weightcast.weight_transfer.config import WeightTransferConfig

ENTRY_POINT_GROUP = "weightcast.weight_transfer_engines"

AnyEngine = WeightTransferEngine[Any, Any]


class WeightTransferEngineFactory:
    """Maps names to WeightTransferEngine classes. A class is imported when its name is first asked for."""

    _loaders: ClassVar[dict[str, Callable[[], type[AnyEngine]]]] = {}

    @classmethod
    def register_engine(cls, name: str, module_or_class: str | type[AnyEngine], class_name: str | None = None) -> None:
        """Register a class, or a module and the name of a class to import later. A name that is taken raises InvalidInput."""
        if name in cls._loaders:
            raise InvalidInput(f"weight transfer backend {name!r} is registered already", field="name")
        if isinstance(module_or_class, str):
            if class_name is None:
                raise InvalidInput("a module name needs a class name beside it", field="class_name")
            module, attribute = module_or_class, class_name
            cls._loaders[name] = lambda: getattr(importlib.import_module(module), attribute)
        else:
            cls._loaders[name] = lambda: module_or_class

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all backends: the registered ones and those of installed packages."""
        return tuple(sorted({*cls._loaders, *entry_points_of(ENTRY_POINT_GROUP)}))

    @classmethod
    def engine_class(cls, name: str) -> type[AnyEngine]:
        """Return the class that has a name. Unsupported lists the known names, or says why the import failed."""
        if name in cls._loaders:
            loader: Callable[[], Any] = cls._loaders[name]
        else:
            point = entry_points_of(ENTRY_POINT_GROUP).get(name)
            if point is None:
                raise Unsupported(f"no weight transfer backend {name!r}", hint=f"Known: {', '.join(cls.names())}")
            forbidden = refusal(point)
            if forbidden is not None:
                raise Unsupported(f"weight transfer backend {name!r}: {forbidden}", hint=f"Add it to {VARIABLE}")
            loader = point.load
        try:
            return loader()  # type: ignore[no-any-return]
        except (ImportError, AttributeError) as error:
            raise Unsupported(f"weight transfer backend {name!r} cannot be loaded: {error}") from error

    @classmethod
    def create_engine(cls, config: WeightTransferConfig, model: LiveModel, worker: WorkerRank) -> AnyEngine:
        """Build the backend that ``config`` selects for one worker."""
        return cls.engine_class(config.backend)(config, model, worker)
