"""A short soak and a short chaos run; `make soak` and `make chaos` are the long ones."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from tests.trials.chaos.run import Chaos
from tests.trials.soak.run import Soak


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_nothing_grows(transport: str) -> None:
    found = Soak(transport=transport).run(120)  # the allocator's own pools fill up in the first half
    assert found.failed == found.rounds // 25
    assert found.faults == [], str(found)


@pytest.mark.timeout(400)  # the run's own limits are what ends it; a server alone may take two minutes to start
def test_chaos_finds_nothing(tmp_path: Path) -> None:
    """One server with a language model under load, two engines without."""
    seed = secrets.randbelow(10**6)
    print(f"seed {seed}")  # pytest shows it with whatever is raised
    chaos = Chaos(tmp_path, seed=seed, num_servers=1)
    summary = chaos.run(30, max_s=12)
    assert not summary.faults, str(summary)
    assert summary.committed, str(summary)
    assert summary.answers, str(summary)
