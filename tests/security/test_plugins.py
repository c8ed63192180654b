"""Packages that add transports and backends: imported when they may be, and never where the operator forbids it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support.forked import run_forked

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import weightcast.transports.shm
from weightcast.errors import Unsupported
from weightcast.transports.registry import registry
from weightcast.weight_transfer.factory import WeightTransferEngineFactory as factory
names = registry().available()
assert "shm" in names, names
assert type(registry().get("shm")).__module__ == "weightcast.transports.shm", "nobody takes the name of our own"
print("listed", "stranger" in registry().names(), registry().failure("stranger"))
try:
    factory.engine_class("stranger")
except Unsupported as error:
    print(error)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An installed package whose import leaves a mark."""
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[weightcast.transports]\nstranger = stranger:Transport\nshm = stranger:Transport\n"
        "[weightcast.weight_transfer_engines]\nstranger = stranger:Engine\n"
    )
    mark = f"open({str(tmp_path / 'mark')!r}, 'a').write('x')"
    (tmp_path / "stranger.py").write_text(f"{mark}\nclass Transport: pass\nclass Engine: pass\n")
    return tmp_path


@pytest.mark.parametrize(
    ("allowed", "imported"), [(None, True), ("other, stranger", True), ("other", False), ("", False)]
)
def test_a_package_is_imported_only_where_the_operator_lets_it(site: Path, allowed: str | None, imported: bool) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "WEIGHTCAST_PLUGINS"}
    given = {} if allowed is None else {"WEIGHTCAST_PLUGINS": allowed}
    status, printed = run_forked(CODE, site, environment={**kept, **given}, timeout_s=100)
    assert status == 0, printed
    assert (site / "mark").exists() is imported
    assert "listed True" in printed
    assert ("WEIGHTCAST_PLUGINS" in printed) is not imported
