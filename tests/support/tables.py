"""Tables of layouts, as they travel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weightcast.layout import Layout
from weightcast.manifest import Manifest
from weightcast.plan import Holdings, HoldingTable


def holdings_of(manifest: Manifest, layouts: Mapping[int, Layout]) -> HoldingTable:
    """All that these ranks hold."""
    held = Holdings.of(manifest, layouts)
    return held.boxes_of(np.arange(len(held.ranks)))
