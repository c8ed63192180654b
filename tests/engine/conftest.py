"""Tiny models and engines for the embedded engine's tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weightcast.engines.embedded import LLM
from weightcast.testing.models import build_tiny_model

BuildModel = Callable[..., Any]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    seed = random.SystemRandom().getrandbits(32)
    request.node.add_report_section("setup", "seed", f"rng seed {seed}")
    return random.Random(seed)


@pytest.fixture
def build(tmp_path: Path, rng: random.Random) -> BuildModel:
    """build(arch, dtype, **config) -> (folder, reference model with eager attention)."""

    def build_one(arch: str = "qwen3", dtype: str = "float64", **config: Any) -> tuple[Path, Any]:
        from transformers import AutoModelForCausalLM

        folder = build_tiny_model(
            tmp_path / f"{arch}-{dtype}-{rng.getrandbits(32)}", arch, dtype, seed=rng.getrandbits(31), **config
        )
        reference = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        return folder, reference

    return build_one


@pytest.fixture
def start() -> Iterator[Callable[..., LLM]]:
    """start(model, **arguments) -> LLM on one thread, shut down at the end."""
    engines: list[LLM] = []

    def start_one(model: Any, **arguments: Any) -> LLM:
        arguments.setdefault("num_threads", 1)
        engines.append(LLM(model, **arguments))
        return engines[-1]

    yield start_one
    for engine in engines:
        engine.shutdown()
