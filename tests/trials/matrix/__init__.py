"""The fault matrix: every fault under every transport and mode, and what must be true afterwards.

python -m tests.trials.matrix --help
"""

from tests.trials.matrix.cells import CPU_TRANSPORTS, GPU_TRANSPORTS, Cell, cells
from tests.trials.matrix.outcome import Finding

__all__ = ["CPU_TRANSPORTS", "GPU_TRANSPORTS", "Cell", "Finding", "cells"]
