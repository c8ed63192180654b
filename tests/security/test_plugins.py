"""Packages that add transports and backends: imported when they may be, and never where the operator forbids it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
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
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name != "WEIGHTCAST_PLUGINS"}
    given = {} if allowed is None else {"WEIGHTCAST_PLUGINS": allowed}
    ended = subprocess.run(
        [sys.executable, "-c", CODE], env={**kept, "PYTHONPATH": path, **given}, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert (site / "mark").exists() is imported
    assert "listed True" in ended.stdout
    assert ("WEIGHTCAST_PLUGINS" in ended.stdout) is not imported
