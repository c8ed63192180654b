"""The fault matrix: every fault under every transport and mode, and what must be true afterwards.

python -m weightcast.testing.matrix --help
"""

from weightcast.testing.matrix.cells import CPU_TRANSPORTS, GPU_TRANSPORTS, Cell, cells
from weightcast.testing.matrix.outcome import Outcome

__all__ = ["CPU_TRANSPORTS", "GPU_TRANSPORTS", "Cell", "Outcome", "cells"]
