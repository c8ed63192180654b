"""The README's SGLang blocks, run as pasted, in order: a server that is started the usual way."""

import re
from pathlib import Path

import pytest
from tests.documents.blocks import ROOT, blocks_of, run_blocks
from tests.support.warm import Warm


def test_the_blocks_run_as_pasted(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(ROOT / "README.md") if block.mark == "sglang"]
    with Warm(tmp_path_factory.mktemp("commands"), modules=()) as commands:
        printed = run_blocks(blocks, commands, tmp_path, timeout_s=280)
    assert re.findall(r"^committed (\d+)-[0-9a-f]{12} on 1/1 engines", printed, re.M) == ["1", "2", "3"]
    assert "3-" in printed.rpartition("committed")[2], "the status shows the version"
