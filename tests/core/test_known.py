"""Types that threads decode: msgspec has to know each of them before two threads decode it at once, or the process crashes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightcast

ROOT = Path(weightcast.__file__).parent
DECODERS = {"decode", "convert", "Decoder"}

TWO_THREADS = """
import sys, threading
from typing import Optional
import msgspec
from weightcast.known import known

sys.setswitchinterval(1e-6)
inner = {f"a{j}": 1 for j in range(8)}
data = msgspec.msgpack.encode({"x": [inner], **{f"b{j}": {"k": 1} for j in range(8)}})
for i in range(500):
    Inner = msgspec.defstruct(f"Inner{i}", [(name, Optional[int]) for name in inner])
    Outer = msgspec.defstruct(
        f"Outer{i}", [("x", list[Inner]), *[(f"b{j}", dict[str, Optional[int]]) for j in range(8)]]
    )
    both = threading.Barrier(2)

    def decode():
        both.wait()
        assert msgspec.msgpack.decode(data, type=known(Outer)).x[0].a7 == 1

    threads = [threading.Thread(target=decode) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("fine")
"""


def test_two_threads_may_decode_a_type_for_the_first_time_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def unknown_types(text: str) -> Iterator[str]:
    """Types that go to msgspec as they are."""
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DECODERS):
            continue
        if "msgspec" not in ast.unparse(node.func):
            continue
        first = 0 if node.func.attr == "Decoder" else 1
        kinds = [*node.args[first : first + 1], *(word.value for word in node.keywords if word.arg == "type")]
        for kind in kinds:
            if not (isinstance(kind, ast.Call) and ast.unparse(kind.func) == "known"):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "text",
    [
        "msgspec.json.decode(data, type=Offer)",
        "msgspec.msgpack.Decoder(Offer)",
        "msgspec.convert(fields, dict[str, Entry])",
        "msgspec.convert(fields, type=Entry, strict=False)",
    ],
)
def test_a_type_that_goes_to_msgspec_as_it_is_is_found(text: str) -> None:
    assert list(unknown_types(text))


def test_every_type_is_known_before_it_is_decoded() -> None:
    found = {
        str(path.relative_to(ROOT)): hits
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "known.py" and (hits := list(unknown_types(path.read_text())))
    }
    assert not found
