"""The README's blocks, run as pasted, in order."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.documents.blocks import MARKS, ROOT, blocks_of, run_blocks
from tests.support.warm import Warm

README = ROOT / "README.md"
COMMITTED = re.compile(r"committed (\d+)-[0-9a-f]{12} on 1/1 engines")


@pytest.mark.acceptance
@pytest.mark.timeout(540)
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed: pip install 'weightcast[trl]'")
def test_the_blocks_run_as_pasted(warm: Warm, tmp_path: Path) -> None:
    printed = run_blocks([block for block in blocks_of(README) if block.mark is None], warm, tmp_path, timeout_s=500)
    # 30 rounds of the first loop, a push, one before each of TRL's three steps (which TRL does not print), one by two ranks.
    versions = [int(number) for number in COMMITTED.findall(printed)]
    assert versions == [*range(1, 32), 35], printed[-6000:]
    assert " arrive while I speak." in printed
    assert "equal" in printed


def test_each_block_that_is_not_run_says_why() -> None:
    blocks = blocks_of(README)
    assert {block.mark for block in blocks if block.mark} <= set(MARKS)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    run_by_ci = (ROOT / ".ci" / "run").read_text()
    for block in blocks:
        if block.mark == "elsewhere":
            made = re.findall(r"^make ([\w-]+)", block.text, re.M)
            assert len(made) == len(block.text.splitlines()), f"{block.place}: only make targets are run elsewhere"
            assert set(made) <= targets
            assert all(f"make {target}" in run_by_ci for target in made), block.place
