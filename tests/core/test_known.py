"""Types that threads decode: msgspec has to know each of them before two threads decode it at once, or the process crashes. That every
type goes through ``known`` is checked in test_forbidden_code."""

from __future__ import annotations

import subprocess
import sys

TWO_THREADS = """
import sys, threading
from typing import Optional
import msgspec
from weightcast.untrusted.known import known

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
