"""How files of tests are dealt out to the workers of xdist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    import pytest


class Together(LoadFileScheduling):  # type: ignore[misc]
    """File by file, and some files as if they were one: the same worker plays them, one after the other."""

    def __init__(self, config: pytest.Config, log: Any, files: tuple[str, ...]) -> None:
        super().__init__(config, log)
        self._files = files

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return self._files[0] if file in self._files else file
