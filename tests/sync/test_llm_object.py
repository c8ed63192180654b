"""An embedded ``LLM`` object as an engine of a Publisher in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from weightcast import Publisher
from weightcast.engines.base import SamplingParams
from weightcast.engines.embedded import LLM
from weightcast.errors import RoundFailed
from weightcast.receiver.session import Session
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint

PROMPTS = [[5, 6, 7, 8], [20, 21]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "m", "qwen3")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    llm = LLM(path, weight_transfer_config={"backend": "weightcast", "mode": "in_place"})
    yield llm
    llm.shutdown()


def test_it_answers_as_a_fresh_load_of_what_was_published(llm: LLM, path: Path, tmp_path: Path) -> None:
    weights = random_state_dict(path)
    with Publisher(weights, [llm], timeout_s=30) as publisher:
        for number in range(2):
            weights.update(random_state_dict(path))
            report = publisher.publish()
            assert report.digests_match
            fresh = LLM(save_checkpoint(tmp_path / str(number), weights, path))
            assert tokens(llm) == tokens(fresh)
            fresh.shutdown()
        assert publisher.versions == {report.engines[0].name: report.version}


def test_weights_of_no_version_are_told_and_healed(llm: LLM, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_state_dict(path)
    receive = Session.receive

    def torn(*arguments: object) -> object:
        receive(*arguments)  # type: ignore[arg-type]
        raise RuntimeError("torn")

    with Publisher(weights, [llm], timeout_s=30) as publisher:
        publisher.publish()
        with monkeypatch.context() as patch:
            patch.setattr(Session, "receive", torn)
            with pytest.raises(RoundFailed, match="torn") as failed:
                publisher.publish()
        (name,) = publisher.members
        assert failed.value.dirty == (name,)
        assert publisher.members == {name: "dirty"}
        assert llm.status().dirty
        report = publisher.publish()
        assert report.digests_match
        assert publisher.members == {name: "ready"}
        assert not llm.status().dirty
