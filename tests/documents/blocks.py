"""Code blocks of a document, run in order in one shell as a reader pastes them."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARKS = ("gpu", "vllm", "elsewhere")
"""Why a block is not run with the others: it needs a GPU, it needs vLLM's environment, or another test runs its commands."""

_BLOCK = re.compile(r"^(?:<!-- block: (?P<mark>\w+) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```$", re.M | re.S)
_FILE = re.compile(r"# (\S+\.py)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block of sh or Python. ``mark`` is what the HTML comment above it says."""

    place: str
    language: str
    text: str
    mark: str | None

    @property
    def file(self) -> str | None:
        """The name of the file that the reader saves the block as; None for a block that is pasted."""
        named = _FILE.match(self.text) if self.language == "python" else None
        return named[1] if named else None

    def as_shell(self) -> str:
        """The shell commands that do what the reader does with the block."""
        if self.language == "sh":
            return self.text
        target = f"cat > {self.file}" if self.file else "python"
        return f"{target} <<'END OF BLOCK'\n{self.text}END OF BLOCK\n"


def blocks_of(document: Path) -> list[Block]:
    """The sh and Python blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            f"{document.name}:{text.count(chr(10), 0, found.start('text'))}",
            found["language"],
            found["text"],
            found["mark"],
        )
        for found in _BLOCK.finditer(text)
    ]


def run_blocks(blocks: Iterable[Block], folder: Path, timeout_s: float) -> str:
    """Run blocks in one bash in ``folder``, in a network and a process tree of their own, and return what they printed.

    Documents name port 8000: in a network of its own that port is free, and nothing outside of this machine can be reached. A test on a
    machine that cannot make a network is skipped; with CI set it fails.
    """
    if why := obstacle():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    parts = [f"echo '== {block.place}'\n{block.as_shell()}" for block in blocks]
    script = folder / "blocks.sh"
    script.write_text("set -euo pipefail\nip link set lo up\n" + "\n".join(parts))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("WEIGHTCAST_TOKEN", None)
    log = folder / "blocks.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*own_network(), "bash", str(script)], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    printed = log.read_text(errors="replace")
    assert process.returncode == 0, printed[-6000:]
    return printed


def own_network() -> list[str]:
    """The command that gives another one a network and a process tree of its own, which ends with it."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "--fork", "--pid", "--kill-child", "--mount-proc"]


def obstacle() -> str | None:
    """Why ``run_blocks`` cannot work on this machine; None when it can."""
    for program in ("unshare", "ip", "bash", "curl", "openssl"):
        if shutil.which(program) is None:
            return f"needs {program}"
    tried = subprocess.run([*own_network(), "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "this system allows no network namespaces"
