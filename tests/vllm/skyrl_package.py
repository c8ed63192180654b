"""SkyRL's released package, where Python is older than SkyRL wants. What asks for 3.12 is SkyRL's Tinker API, which its package of backends imports
and which weight sync does not use: that one ``__init__`` is left out.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

IS_THERE = find_spec("skyrl") is not None


def open_skyrl() -> None:
    """Let SkyRL's modules below its backends be imported."""
    import skyrl

    backends = ModuleType("skyrl.backends")
    backends.__path__ = [str(Path(skyrl.__path__[0]) / "backends")]
    sys.modules.setdefault(backends.__name__, backends)
