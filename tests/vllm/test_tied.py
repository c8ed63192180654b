"""Embeddings and output heads that vLLM keeps as one tensor: equal values are published, unequal ones refused by both names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vllm import offline
from tests.vllm.test_models import build, model_of, worker_of
from tests.vllm.weights import fill

from weightcast import Publisher
from weightcast.errors import PlanMismatch, WeightcastError
from weightcast.testing.models import random_state_dict, save_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def fresh(path: Path, *, equal: bool) -> dict[str, torch.Tensor]:
    """Fresh values with a head of their own, which is the embedding or is not."""
    weights = random_state_dict(path)
    head = weights[EMBEDDING].clone()
    return {**weights, HEAD: head if equal else torch.randn(head.shape).mul(0.1).to(head.dtype)}


@pytest.mark.parametrize("through", [False, True], ids=["landed", "loader"])
@pytest.mark.parametrize("how", ["tied by its config", "tied when it was loaded"])
def test_a_head_that_is_the_embedding(tmp_path: Path, how: str, through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightcast.engines.vllm import model as vllm_model

    if through:
        monkeypatch.setattr(vllm_model, "names_that_differ", lambda *_: {EMBEDDING})
    path = build(tmp_path / "m", "qwen3_tied")
    if how != "tied by its config":
        path = save_checkpoint(tmp_path / "with-head", fresh(path, equal=True), like=path)
    with offline.engine(path) as llm:
        layers = model_of(llm)
        assert layers.lm_head.weight is layers.model.embed_tokens.weight
        start = offline.answers(llm)
        weights = fresh(path, equal=False)
        with Publisher(weights, [llm], timeout_s=60) as publisher:
            with pytest.raises(WeightcastError) as caught:
                publisher.publish()
            assert_both_are_named(caught.value)
            assert offline.answers(llm) == start
            seen = []
            for number in range(2):
                fill(weights, fresh(path, equal=True))
                publisher.publish()
                names = worker_of(llm).weight_transfer_engine.calls.engine.receiver._session.layout.through_loader
                assert (EMBEDDING in names) is through
                folder = save_checkpoint(tmp_path / f"push-{number}", weights, like=path)
                seen.append((folder, offline.answers(llm)))
            fill(weights, fresh(path, equal=False))
            with pytest.raises(WeightcastError) as caught:
                publisher.publish()
            assert_both_are_named(caught.value)
            assert offline.answers(llm) == seen[-1][1]
    for folder, got in seen:
        with offline.engine(folder) as llm:
            assert offline.answers(llm) == got


def assert_both_are_named(error: Any) -> None:
    causes = list(getattr(error, "causes", {}).values()) or [error]
    assert all(isinstance(cause, PlanMismatch) for cause in causes)
    assert all(name in str(causes[0]) for name in (EMBEDDING, HEAD)), str(error)
