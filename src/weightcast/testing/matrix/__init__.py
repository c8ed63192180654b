"""The fault matrix: every fault under every transport and mode, and what must be true afterwards.

python -m weightcast.testing.matrix [--transport NAME] [--fault TEXT] [--write docs/failure-modes.md]
"""

from weightcast.testing.matrix.cells import Cell, cells, network_obstacle

__all__ = ["Cell", "cells", "network_obstacle"]
