"""One Publisher over an SGLang server, a vLLM server and an embedded server at once. vLLM lives in an environment of its own."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.sglang.launcher import FAULT
from tests.sglang.servers import Launcher, Server
from tests.support.embedded_server import embedded_server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, RoundFailed
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint
from weightcast.testing.reference import PROMPTS, Reference, replace
from weightcast.testing.vllm_server import Served, vllm_server
from weightcast.trainer.clients import CommitOrder, CommitReply, HttpEngineClient

VLLM = Path(os.environ.get("WEIGHTCAST_TEST_VLLM", Path(__file__).parents[2] / ".venv-vllm" / "bin"))
VLLM_NEAR = 0.25
"""On a CPU, vLLM's attention multiplies in bfloat16."""
EXACT = 1e-3
Answers = list[tuple[list[int], list[float]]]


class Refusing(HttpEngineClient):
    """A client whose engine may refuse a commit, once the engines of the other clients have carried out theirs."""

    others: Sequence[HttpEngineClient] = ()
    refuses = False

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if not self.refuses:
            return super().commit(order, deadline)
        for other in self.others:
            while other.status(deadline)["weight_version"] != order.version:
                deadline.check("the other engines' commits")
        raise EngineError("no commit today, says the test")


@dataclass(frozen=True)
class Engine:
    """A running server, and how far its logits may be from those of transformers."""

    running: Server | Served
    near: float
    answers: Callable[[], Answers]
    """Tokens for each of PROMPTS, with log-probabilities where the server gives them."""

    def serves(self, fresh: Reference, weights: Mapping[str, torch.Tensor], version: str) -> Answers:
        """Every byte and every token are those of a fresh load. Returns what the engine answers."""
        found = comparison(self.running.url, self.running.token, fresh.checkpoint)
        assert (found.version, found.proven, set(found.equal)) == (version, True, set(weights))
        assert self.running.version == version
        answers = self.answers()
        for ids, (tokens, _) in zip(PROMPTS, answers, strict=True):
            assert len(tokens) == 12
            assert all(fresh.follows([*ids, *tokens], len(ids), self.near))
        return answers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "m", "qwen3", dtype="float32", head_dim=32)


@pytest.fixture
def fault(tmp_path: Path) -> Path:
    """While this file has a rank, SGLang's worker of that rank cannot carry out a commit."""
    return tmp_path / "fault"


@pytest.fixture
def engines(launcher: Launcher, model: Path, fault: Path) -> Iterator[list[Engine]]:
    """SGLang, vLLM and ``weightcast serve``. CI has both environments: there vLLM may not be missing."""
    if not (VLLM / "vllm").exists():
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"there is no vLLM in {VLLM}: make setup-vllm")
    with (
        launcher.server(model, env={FAULT: str(fault)}) as sglang,
        vllm_server(model, programs=VLLM) as vllm,
        embedded_server(model, secrets.token_hex(8)) as embedded,
    ):
        yield [
            Engine(sglang, EXACT, lambda: [(tokens, []) for tokens in sglang.answers(PROMPTS)]),
            Engine(vllm, VLLM_NEAR, lambda: vllm.answers(PROMPTS)),
            Engine(embedded, EXACT, lambda: embedded.answers(PROMPTS)),
        ]


def test_one_publisher_drives_three_engines(engines: list[Engine], model: Path, fault: Path) -> None:
    weights = random_state_dict(model)
    clients = [Refusing(engine.running.url, token=engine.running.token) for engine in engines]
    for client in clients:
        client.others = [other for other in clients if other is not client]

    def published(publisher: Publisher) -> tuple[Reference, str, list[Answers]]:
        replace(weights, model)
        report = publisher.publish()
        assert report.digests_match
        assert [engine.version for engine in report.engines] == [report.version] * 3
        fresh = Reference(model, weights)
        return fresh, report.version, [engine.serves(fresh, weights, report.version) for engine in engines]

    with Publisher(weights, clients, timeout_s=60, mode="in_place") as publisher:
        seen = [published(publisher) for _ in range(2)]
    with Publisher(weights, clients, timeout_s=60, mode="staged") as publisher:
        seen += [published(publisher) for _ in range(2)]
        for before, after in itertools.pairwise(seen):
            assert all(old != new for old, new in zip(before[2], after[2], strict=True))
        assert_one_spoilt_value_is_found(engines, model, weights)
        fresh, version, answers = seen[-1]
        held = {name: value.clone() for name, value in weights.items()}

        def assert_nothing_changed() -> None:
            """Answers are the same to the last bit of a log-probability."""
            assert [engine.serves(fresh, held, version) for engine in engines] == answers

        for client in clients:
            replace(weights, model)
            client.refuses = True
            with pytest.raises(RoundFailed, match="no commit today"):
                publisher.publish()
            client.refuses = False
            assert_nothing_changed()
        replace(weights, model)
        fault.write_text("0")
        with pytest.raises(RoundFailed, match="no memory, says the test"):
            publisher.publish()
        assert not fault.exists(), "the fault was met"
        assert_nothing_changed()
        assert published(publisher)[2] != answers


def assert_one_spoilt_value_is_found(engines: list[Engine], model: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """The comparison that ``serves`` makes tells one value of one tensor, in each engine."""
    spoilt = {name: value.clone() for name, value in weights.items()}
    spoilt["model.layers.1.self_attn.k_proj.weight"].view(-1)[-1] += 1
    checkpoint = save_checkpoint(model.parent / "spoilt", spoilt, like=model)
    for engine in engines:
        found = comparison(engine.running.url, engine.running.token, checkpoint)
        assert found.different == ("model.layers.1.self_attn.k_proj.weight",)
