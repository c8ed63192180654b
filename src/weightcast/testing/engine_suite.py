"""The conformance suite of engines: every engine that serves requests and takes weights by HTTP must pass it.

    class TestMine(EngineSuite):
        cannot = {"test_outputs_say_which_version_made_them": "the API has no place for versions"}

        @pytest.fixture(scope="class")
        @classmethod
        def running(cls, model: Path) -> Iterator[Running]: ...      # a server of this model folder, of answers up to NEVER_ENDING

        def stream(self, running, ids, num_tokens): ...

One server serves all tests of the class. What an engine answers is compared with transformers, which loads the same weights afresh.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import httpx
import pytest
import torch

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import AuthError, EngineError, PlanMismatch, RoundFailed, StateError, WeightcastError
from weightcast.testing.doomed_trainer import MOMENTS
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.reference import NEAR, PROMPTS, Reference, replace
from weightcast.trainer.clients import CommitOrder, CommitReply, HttpEngineClient

STORY = [3, 1, 4]
MIDWAY = 5
"""So many tokens of a request are there when the commit is ordered."""
NEVER_ENDING = 16_000
"""Tokens of a request that a test ends. A busy machine may take seconds between an order and its commit, and engines go on meanwhile."""
AFTERWARDS = 16
"""So many tokens after the commit are looked at, or more."""
Mode = Literal["staged", "in_place"]
Pause = Literal["keep", "wait", "abort", "none"]
WAYS: tuple[tuple[Mode, Pause, bool], ...] = (
    ("staged", "keep", True),
    ("staged", "keep", False),
    ("staged", "none", False),
    ("staged", "wait", True),
    ("staged", "abort", True),
    ("in_place", "keep", True),
    ("in_place", "abort", True),
)
"""Mode, pause and whether keys and values are forgotten."""
TROUBLES = {
    "unknown tensor": "model.layers.0.no_such",
    "wrong shape": "model.layers.0.mlp.down_proj",
    "half a fused group": "model.layers.1.self_attn.k_proj",
    "missing tensor": "model.norm",
}


class Running(Protocol):
    """A running server, as the suite uses it."""

    @property
    def url(self) -> str: ...
    @property
    def token(self) -> str: ...
    def get(self, path: str, **options: Any) -> httpx.Response: ...
    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All tokens of a request so far. ``finish_reason`` is "length" or "abort" at the end."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    spans: list[tuple[str, int, int]] | None = None
    """Version, start and end, in order; None where the engine does not say them."""


class EngineSuite(ABC):
    """Subclass it in a test module."""

    arch: str = "qwen3"
    options: ClassVar[Mapping[str, Any]] = {}
    """Dimensions of the model that differ from a tiny model's usual ones."""
    num_tokens: int = 600
    """Tokens of a request that is waited for."""
    near: float = NEAR
    """How far logits of the engine's kernels may be from those of transformers."""
    cannot: ClassVar[Mapping[str, str]] = {}
    """Names of tests that ask for what the engine cannot do, with the reason."""

    @abstractmethod
    def stream(self, running: Running, ids: list[int], num_tokens: int) -> Iterator[Answer]:
        """Yield the greedy answer to token ids as the answer grows; ends of sequences are ignored."""

    def killed(self, running: Running, checkpoint: Path, moment: str) -> int:
        """Run a trainer that dies at a moment, and return the exit code."""
        command = [sys.executable, "-m", "weightcast.testing.doomed_trainer"]
        return subprocess.run([*command, str(checkpoint), running.url, running.token, moment], timeout=120).returncode

    @pytest.fixture(autouse=True)
    def _can(self, request: pytest.FixtureRequest) -> None:
        for name in (request.node.originalname, request.node.name):
            if name in self.cannot:
                pytest.skip(self.cannot[name])

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("conformance") / "m"
        options = {"max_position_embeddings": NEVER_ENDING + 64, **cls.options}
        return build_tiny_model(folder, cls.arch, dtype="float32", **options)

    # ---- values

    @pytest.mark.parametrize("transport", ["shm", "tcp"])
    @pytest.mark.parametrize("mode", ["staged", "in_place"])
    def test_every_round_equals_a_fresh_load(self, running: Running, model: Path, transport: str, mode: Mode) -> None:
        weights = random_state_dict(model)
        seen = [self.answers(running)]
        with self.publisher(running, weights, mode=mode, transport=transport) as publisher:
            for _ in range(2):
                replace(weights, model)
                report = publisher.publish()
                assert report.digests_match
                self.serves(running, Reference(model, weights), report.version)
                seen.append(self.answers(running))
        assert seen[0] != seen[1] != seen[2]

    @pytest.mark.parametrize(("mode", "pause", "clear_cache"), WAYS)
    def test_a_request_in_flight(
        self, running: Running, model: Path, mode: Mode, pause: Pause, clear_cache: bool
    ) -> None:
        """Tokens before the commit are the old version's; with keys and values forgotten, all tokens after it are the new one's."""
        weights = random_state_dict(model)
        with self.publisher(running, weights) as publisher:
            publisher.publish()
        before = Reference(model, weights)
        replace(weights, model)
        client = OrderedMidway(self, running, self.num_tokens if pause == "wait" else NEVER_ENDING)
        with Publisher(weights, [client], timeout_s=60, mode=mode, pause=pause, clear_cache=clear_cache) as publisher:
            version = publisher.publish().version
        after = Reference(model, weights)
        if pause in ("wait", "abort"):
            answer = client.ended()
            assert all(self.of(before, STORY, answer.tokens))
            assert answer.finish_reason == ("abort" if pause == "abort" else "length")
            assert (len(answer.tokens) == self.num_tokens) is (pause == "wait")
        else:
            answer, version = self.ended_in_the_next_version(client, before, weights)
            num_old = self.of(before, STORY, answer.tokens).index(False)
            assert num_old >= MIDWAY
            if clear_cache:
                assert all(self.of(after, STORY, answer.tokens)[num_old:])
        self.serves(running, after, version)

    def test_outputs_say_which_version_made_them(self, running: Running, model: Path) -> None:
        weights = random_state_dict(model)
        with self.publisher(running, weights) as publisher:
            first = publisher.publish().version
        before = Reference(model, weights)
        replace(weights, model)
        client = OrderedMidway(self, running, NEVER_ENDING)
        with Publisher(weights, [client], timeout_s=60) as publisher:
            second = publisher.publish().version
        answer, _ = self.ended_in_the_next_version(client, before, weights)
        after = Reference(model, weights)
        assert answer.spans is not None
        assert [version for version, *_ in answer.spans] == [first, second]
        (_, start, cut), (_, again, end) = answer.spans
        assert (start, again, end) == (0, cut, len(answer.tokens))
        assert all(self.of(before, STORY, answer.tokens)[:cut])
        assert all(self.of(after, STORY, answer.tokens)[cut:])

    # ---- what is refused

    def test_the_control_routes_need_the_token(self, running: Running, model: Path) -> None:
        assert running.get("/get_world_size").json() == {"world_size": 1}
        assert self.status(running)["backend"] == "weightcast"
        for path in ("init", "commit", "rollback", "shutdown", "wake"):
            assert running.post(f"/weightcast/{path}", {}).status_code == 401
            wrong = running.post(f"/weightcast/{path}", {}, headers={"Authorization": "Bearer no"})
            assert wrong.status_code == 401
        stranger = Publisher(random_state_dict(model), [running.url], token="wrong", timeout_s=10)
        with stranger as publisher, pytest.raises(AuthError):
            publisher.connect()

    def test_bad_input_is_422_and_the_wrong_moment_409(self, running: Running) -> None:
        before = self.answers(running)
        order = {"epoch": 99, "round": 99, "version": "9-x", "timeout_s": 5}
        headers = {"Authorization": f"Bearer {running.token}"}
        for path, body, code, field_name in (
            ("commit", order, 409, None),
            ("init", {"init_info": {"address": "tcp://127.0.0.1:1", "colour": "red"}}, 422, "colour"),
            ("commit", {**order, "pause": "often"}, 422, "pause"),
            ("commit", {**order, "colour": 1}, 422, "colour"),
            ("commit", {**order, "epoch": "first"}, 422, "epoch"),
            ("wake", {}, 422, None),
        ):
            answer = running.post(f"/weightcast/{path}", body, headers=headers)
            assert answer.status_code == code, (path, body, answer.text)
            assert field_name is None or field_name in answer.text
        assert self.answers(running) == before
        assert not self.status(running)["paused"]

    @pytest.mark.parametrize("trouble", TROUBLES)
    def test_a_wrong_model_is_refused_before_anything_is_written(
        self, running: Running, model: Path, trouble: str
    ) -> None:
        before, version = self.answers(running), self.version(running)
        weights, name = random_state_dict(model), f"{TROUBLES[trouble]}.weight"
        if trouble == "unknown tensor":
            weights[name] = torch.randn(4, 4)
        elif trouble == "wrong shape":
            weights[name] = weights[name][:, :-2].contiguous()
        else:
            del weights[name]
        with self.publisher(running, weights) as publisher, pytest.raises(PlanMismatch) as caught:
            publisher.publish()
        shown = {"half a fused group": ("qkv_proj", "k_proj"), "wrong shape": ("down_proj",)}
        assert any(part in str(caught.value) for part in shown.get(trouble, (TROUBLES[trouble],)))
        assert (self.answers(running), self.version(running)) == (before, version)

    # ---- what goes wrong

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_a_killed_trainer_leaves_a_whole_version_or_a_held_engine(
        self, running: Running, model: Path, moment: str
    ) -> None:
        weights = random_state_dict(model)
        with self.publisher(running, weights) as publisher:
            version = publisher.publish().version
        before, theirs = Reference(model, weights), Reference(model, random_state_dict(model))
        assert self.killed(running, theirs.checkpoint, moment) == -signal.SIGKILL
        match MOMENTS[moment]:
            case "before":
                self.serves(running, before, version)
            case "after":
                assert self.version(running) != version
                self.serves(running, theirs, self.version(running))
            case "nothing or before":
                if self.is_held_soon(running):
                    assert not self.status(running)["ready"]
                else:
                    self.serves(running, before, version)
        replace(weights, model)
        with self.publisher(running, weights) as publisher:
            report = _published(publisher)
        self.serves(running, Reference(model, weights), report)

    def test_another_engine_that_fails_takes_this_one_back(self, running: Running, model: Path) -> None:
        weights = random_state_dict(model)
        other = LocalEngine("other", [DictModel(weights)])
        with Publisher(weights, [running.url, other], token=running.token, timeout_s=60) as publisher:
            version, before = publisher.publish().version, Reference(model, weights)

            def fail_when_this_one_has_committed(phase: str) -> None:
                if phase == "commit":
                    _eventually(lambda: self.version(running) != version)
                    raise EngineError("no commit today")

            other.before = fail_when_this_one_has_committed
            replace(weights, model)
            with pytest.raises(RoundFailed, match="no commit today"):
                publisher.publish()
            self.serves(running, before, version)
            other.before = lambda phase: None
            report = publisher.publish()
            self.serves(running, Reference(model, weights), report.version)
            assert other.models[0].holds(weights)

    def test_a_trainer_is_replaced_only_when_it_is_told(self, running: Running, model: Path) -> None:
        weights = random_state_dict(model)
        with self.publisher(running, weights) as first:
            first.publish()
            with self.publisher(running, weights) as other, pytest.raises(StateError, match="another trainer"):
                other.publish()
            replace(weights, model)
            with self.publisher(running, weights, takeover=True) as successor:
                report = successor.publish()
                self.serves(running, Reference(model, weights), report.version)
                with pytest.raises(WeightcastError):
                    first.publish(timeout_s=5)
                assert self.version(running) == report.version

    # ---- what tests ask

    @staticmethod
    def publisher(running: Running, weights: Mapping[str, torch.Tensor], **settings: Any) -> Publisher:
        return Publisher(dict(weights), [running.url], token=running.token, timeout_s=60, **settings)

    @staticmethod
    def status(running: Running) -> dict[str, Any]:
        status: dict[str, Any] = running.get("/weightcast/status").json()
        return status

    @staticmethod
    def version(running: Running) -> str:
        """What the server says outside of weightcast's own routes."""
        return str(running.get("/weight_info").json()["weight_version"])

    def is_held_soon(self, running: Running) -> bool:
        """Whether the engine comes to serve nothing, within the time that it takes to notice a dead trainer."""
        with contextlib.suppress(AssertionError):
            _eventually(lambda: self.status(running)["dirty"], 5)
        return bool(self.status(running)["dirty"])

    def of(self, fresh: Reference, ids: list[int], tokens: list[int]) -> list[bool]:
        """Say of each token after ``ids`` whether a fresh load answers with the token."""
        return fresh.follows([*ids, *tokens], len(ids), self.near)

    def ended_in_the_next_version(
        self, client: OrderedMidway, before: Reference, weights: Mapping[str, torch.Tensor]
    ) -> tuple[Answer, str]:
        """Wait until the request has tokens that are not those of the version before, and end the request with another round of the
        same weights. Returns the whole answer, and the version of that round."""

        looked = 0

        def has_new_tokens() -> bool:
            nonlocal looked
            assert client.is_busy, "the request ended without a token of the next version"
            tokens = client.answer.tokens
            if len(tokens) < looked + AFTERWARDS:
                return False
            looked = len(tokens)
            return False in self.of(before, STORY, tokens)[:-AFTERWARDS]

        _eventually(has_new_tokens, 90)
        with self.publisher(client.running, weights, pause="abort") as publisher:
            version = publisher.publish().version
        answer = client.ended()
        assert answer.finish_reason == "abort"
        return answer, version

    def answers(self, running: Running) -> list[list[int]]:
        return [[part.tokens for part in self.stream(running, ids, 12)][-1] for ids in PROMPTS]

    def serves(self, running: Running, fresh: Reference, version: str) -> None:
        for ids, answer in zip(PROMPTS, self.answers(running), strict=True):
            assert all(self.of(fresh, ids, answer))
        status = self.status(running)
        assert self.version(running) == status["weight_version"] == version
        assert (status["ready"], status["dirty"], status["paused"]) == (True, False, False)


class OrderedMidway(HttpEngineClient):
    """Orders a commit when a request of so many tokens has begun to answer with the version before."""

    def __init__(self, suite: EngineSuite, running: Running, num_tokens: int) -> None:
        super().__init__(running.url, token=running.token)
        self.running, self.answer = running, Answer()
        self._suite, self._num_tokens = suite, num_tokens
        self._midway = threading.Event()
        self._busy = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        for part in self._suite.stream(self.running, STORY, self._num_tokens):
            self.answer = part
            if len(part.tokens) >= MIDWAY:
                self._midway.set()

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if self._busy.ident is None:
            self._busy.start()
            assert self._midway.wait(deadline.remaining_s()), "no tokens"
        return super().commit(order, deadline)

    @property
    def is_busy(self) -> bool:
        """Whether more tokens may come."""
        return self._busy.is_alive()

    def ended(self) -> Answer:
        """Wait for the request's end, and return all of it."""
        self._busy.join(60)
        assert not self.is_busy
        return self.answer


def _eventually(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)


def _published(publisher: Publisher) -> str:
    """The version of the first publish that succeeds: the engine notices after a moment that a trainer is gone."""
    end = time.monotonic() + 30
    while True:
        try:
            return publisher.publish().version
        except WeightcastError:
            assert time.monotonic() < end
            time.sleep(0.3)
