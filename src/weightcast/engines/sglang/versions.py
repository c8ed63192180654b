"""Which SGLang versions the plug-in works with."""

from __future__ import annotations

from weightcast.engines.stock.versions import VersionRange

SUPPORTED = VersionRange("SGLang", (0, 5, 16), (0, 5, 23))
