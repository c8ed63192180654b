"""weightcast syncs freshly trained LLM weights from an RL trainer into running inference engines.

with Publisher(model, engines=["http://127.0.0.1:8000"], token=token) as publisher:
    publisher.connect()
    report = publisher.publish()

Names are imported when first used: the command line sets variables that torch reads while it is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weightcast import errors

if TYPE_CHECKING:
    from weightcast.report.model import Report
    from weightcast.trainer.publisher import Publisher
    from weightcast.weight_transfer.config import WeightTransferConfig

__version__ = "0.2.0"

__all__ = ["Publisher", "Report", "WeightTransferConfig", "__version__", "errors"]


def __getattr__(name: str) -> Any:
    modules = {
        "Publisher": "trainer.publisher",
        "Report": "report.model",
        "WeightTransferConfig": "weight_transfer.config",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{modules[name]}"), name)
