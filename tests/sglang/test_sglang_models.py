"""Every model family: after each push, tokens are those of a fresh load of the same weights, and bytes those of SGLang's own loader."""

from pathlib import Path
from typing import Literal

import pytest
from tests.sglang.servers import Launcher

from weightcast import Publisher
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.reference import PROMPTS, Reference, replace

MODES: tuple[Literal["staged", "in_place"], ...] = ("staged", "in_place")


@pytest.mark.parametrize("arch", ["llama", "qwen3", "qwen3_moe", "qwen3_tied", "gemma3"])
def test_a_push_equals_a_fresh_load(launcher: Launcher, tmp_path: Path, arch: str) -> None:
    model = build_tiny_model(tmp_path / "m", arch, dtype="float32")
    weights = random_state_dict(model)
    seen = []
    with launcher.server(model) as server:
        start = server.answers(PROMPTS)
        for mode in MODES:
            with Publisher(weights, [server.url], token=server.token, timeout_s=60, mode=mode) as publisher:
                replace(weights, model)
                report = publisher.publish()
            assert report.digests_match
            assert server.version == report.version
            fresh = Reference(model, weights)
            assert server.answers(PROMPTS) == fresh.answers()
            assert server.status["weight_version"] == report.version
            seen.append((fresh, server.checksums()))
        assert start != seen[0][0].answers() != seen[1][0].answers()
        for fresh, checksums in seen:
            server.load_from(fresh.checkpoint)
            assert server.checksums() == checksums
            assert server.answers(PROMPTS) == fresh.answers()
