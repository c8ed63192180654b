"""What is particular to CPUs: kernels that copy and digest in one pass, at the speed of memory. They need numba."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)

WORTH_NBYTES = 16 * 2**20
"""Loading the kernels takes half a second (some more the first time on a machine, when they are compiled); torch's operations
digest so many bytes in a few milliseconds."""


def kernels_for(nbytes: int) -> ModuleType | None:
    """``weightcast.cpu.kernels`` where numba is installed and so many bytes are worth it; otherwise None, and torch does it."""
    return _kernels() if nbytes >= WORTH_NBYTES else None


@cache
def comparison_for(is_worth: bool) -> ModuleType | None:
    """``weightcast.cpu.compared`` where numba is installed and it is worth loading; otherwise None, and numpy does it."""
    if not is_worth:
        return None
    try:
        from weightcast.cpu import compared
    except ImportError:
        return None
    compared.load()
    return compared


def changing_for(nbytes: int) -> ModuleType | None:
    """``weightcast.cpu.changing`` where numba is installed and so many bytes are worth loading it; otherwise None."""
    return _changing() if nbytes >= WORTH_NBYTES else None


@cache
def _changing() -> ModuleType | None:
    try:
        from weightcast.cpu import changing
    except ImportError:
        return None
    changing.load()
    return changing


@cache
def _kernels() -> ModuleType | None:
    try:
        from weightcast.cpu import kernels
    except ImportError as error:
        logger.info(
            "digests on this CPU take three times as long as with numba: %s (pip install 'weightcast[fast]')", error
        )
        return None
    kernels.load()
    return kernels
