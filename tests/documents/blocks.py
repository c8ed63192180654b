"""Code blocks of a document, run in order in one shell as a reader pastes them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.warm import Warm

ROOT = Path(__file__).parents[2]
MARKS = ("gpu", "vllm", "sglang", "elsewhere")
"""Why a block is not run with the others: it needs a GPU, it needs the environment of vLLM or SGLang, or another test runs its commands."""

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


def run_blocks(blocks: Iterable[Block], warm: Warm, folder: Path, timeout_s: float) -> str:
    """Run blocks in one bash in ``folder``, and return what they printed.

    Documents name port 8000: in the network of a warm process that port is free, and nothing outside of this machine can be reached.
    """
    parts = [f"echo '== {block.place}'\n{block.as_shell()}" for block in blocks]
    (folder / "blocks.sh").write_text("set -euo pipefail\n" + "\n".join(parts))
    return warm.run("bash", "blocks.sh", folder=folder, timeout_s=timeout_s)
