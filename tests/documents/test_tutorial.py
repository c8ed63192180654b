"""The tutorial's blocks, run as pasted, in order."""

import re
from pathlib import Path

import pytest
from tests.documents.blocks import ROOT, blocks_of, run_blocks
from tests.support.warm import Warm


@pytest.mark.acceptance
@pytest.mark.timeout(540)
def test_the_blocks_run_as_pasted(warm: Warm, tmp_path: Path) -> None:
    blocks = blocks_of(ROOT / "docs" / "tutorial.md")
    assert not [block.place for block in blocks if block.mark], "every block of the tutorial is run"
    printed = run_blocks(blocks, warm, tmp_path, timeout_s=500)
    assert "digests match: True" in printed
    first, last = re.findall(r"^reward (\d\.\d+) -> (\d\.\d+)$", printed, re.M)[0]
    assert float(last) > float(first) + 0.05
    assert "PeerLost: " in printed
    (fleet,) = re.findall(r"^\{'http://127.0.0.1:8000': '(\S+)', 'http://127.0.0.1:8001': '(\S+)'\}$", printed, re.M)
    assert fleet[0] == fleet[1]
    assert "equal" in printed.splitlines()[-1] or "equal" in printed[-600:], printed[-2000:]
