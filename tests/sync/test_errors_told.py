"""What errors say: who, where, and what to do, also when they come from another process; and answers that make no sense."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from weightcast import Publisher, errors
from weightcast.deadline import Deadline
from weightcast.errors import (
    AnswerLost,
    DeadlineExceeded,
    EngineError,
    ErrorForm,
    LoadError,
    PeerLost,
    RoundFailed,
    ShadowError,
    WakeFailed,
    WeightcastError,
)
from weightcast.receiver.session import Session
from weightcast.server.replies import error_response
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.trainer.clients import wire
from weightcast.trainer.clients.base import CommitOrder, CommitReply
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.fleet.link import EngineLink
from weightcast.trainer.round.commits import Commits, _Going

CLASSES = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, WeightcastError)
]  # fmt: skip
Answer = Callable[[dict[str, Any] | list[Any], int], str]


def values() -> dict[str, torch.Tensor]:
    return {"w": torch.randn(8, 4), "b": torch.randn(6)}


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    made = LocalEngine("two", [DictModel(values(), rows=(rank, 2)) for rank in range(2)], mode="staged")
    yield made
    made.stop()


@pytest.fixture
def server() -> Iterator[Answer]:
    """Starts servers that give one answer to everything; gives their URLs."""
    started = []

    def start(body: dict[str, Any] | list[Any], status: int = 200) -> str:
        content = json.dumps(body).encode()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                return

        made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        started.append((made, thread))
        return f"http://127.0.0.1:{made.server_port}"

    yield start
    for made, thread in started:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_says_what_to_do_and_a_better_hint_counts_first(kind: type[WeightcastError]) -> None:
    assert kind("it broke").hint
    better = kind("it broke", hint="Do this")
    assert better.hint == "Do this"
    assert str(better) == f"it broke{' [phase wake]' if kind is WakeFailed else ''}. Do this"
    if kind not in (RoundFailed, WakeFailed):  # these two are told by publish() itself and come over no wire
        again = ErrorForm(kind=kind.__name__, message="it broke", hint="Do this").error()
        assert type(again) is kind
        assert again.hint == "Do this"
        assert str(ErrorForm(kind=kind.__name__, message=str(kind("it broke"))).error()) == str(kind("it broke"))


def test_a_worker_that_fails_is_named_with_its_own_hint(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = values()
    with Publisher(weights, [engine], timeout_s=10) as publisher:
        publisher.publish()
        receive = Session.receive

        def fails(session: Session, *arguments: Any) -> Any:
            if session is engine.workers[1].receiver._session:
                raise ShadowError("no room", hint="Buy memory")
            return receive(session, *arguments)

        monkeypatch.setattr(Session, "receive", fails)
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
    cause = caught.value.causes["two"]
    assert caught.value.__cause__ is cause
    assert (type(cause), cause.worker, cause.phase, cause.hint) == (ShadowError, 1, "transfer", "Buy memory")
    assert cause.round == 2


def test_a_worker_that_cannot_commit_is_named(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Publisher(values(), [engine], timeout_s=10) as publisher:
        publisher.publish()

        def fails(*_: object) -> None:
            raise ValueError("no swap")

        monkeypatch.setattr(engine.workers[1].receiver._session.target, "swap", fails)  # type: ignore[union-attr]
        with pytest.raises(RoundFailed) as caught:
            publisher.publish()
    cause = caught.value.causes["two"]
    assert (type(cause), cause.worker, cause.phase) == (LoadError, 1, "commit")
    assert cause.hint


def test_an_error_comes_over_http_as_it_was_raised(server: Answer) -> None:
    raised = ShadowError("no room", worker=3, phase="commit", hint="Buy memory")
    answer = error_response(raised, changes_weights=True)
    client = HttpEngineClient(server(json.loads(bytes(answer.body)), answer.status_code))
    with pytest.raises(ShadowError) as caught:
        client.rollback(1, 1, Deadline(5))
    error = caught.value
    assert (error.message, error.worker, error.phase, error.hint) == ("no room", 3, "commit", "Buy memory")
    assert error.engine == client.name
    plain = HttpEngineClient(server({"error": {"message": "no room", "type": "ShadowError", "detail": 5}}, 424))
    with pytest.raises(ShadowError, match="no room"):
        plain.rollback(1, 1, Deadline(5))
    # Routes that change no weights have the text alone, which ends with the hint.
    text = json.loads(bytes(error_response(ShadowError("no room", hint="Buy memory")).body))
    asked = HttpEngineClient(server(text, 500))
    with pytest.raises(ShadowError) as caught:
        asked.checksums(Deadline(5))
    assert str(caught.value) == f"no room. Buy memory [engine {asked.name}]"


def test_a_traceback_is_for_those_who_showed_the_token() -> None:
    try:
        raise KeyError("a private thing")
    except KeyError as error:
        told = ErrorForm.of(error).error()
    for guarded in (True, False):
        body = json.loads(bytes(error_response(told, changes_weights=True, guarded=guarded).body))
        assert ("Traceback" in body["error"]["detail"]["trace"]) is guarded
        assert "Traceback" not in body["error"]["message"]


def test_a_server_that_is_no_engine_is_an_engine_error(server: Answer) -> None:
    for body in ({"detail": "hi"}, [1, 2], {"world_size": "two"}, {"world_size": -1}, {"world_size": 10**18}):
        with (
            Publisher(values(), [server(body, 200)], timeout_s=5) as publisher,
            pytest.raises(EngineError, match="world_size"),
        ):
            publisher.connect()


def test_an_answer_without_end_is_not_read(server: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "ANSWER_NBYTES", 100_000)
    client = HttpEngineClient(server({"world_size": 1, "more": "x" * 99_000}, 200))
    assert client.world_size(Deadline(5)) == 1
    with pytest.raises(AnswerLost, match="more than 100000 bytes"):
        HttpEngineClient(server({"world_size": 1, "more": "x" * 100_000}, 200)).world_size(Deadline(5))


@pytest.mark.parametrize("status", [{}, {"weight_version": 5, "dirty": False}, {"weight_version": "1-ab"}])
def test_a_status_that_says_nothing_is_an_engine_error(server: Answer, status: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        HttpEngineClient(server(status, 200)).status(Deadline(5))
    link = EngineLink(HttpEngineClient("http://127.0.0.1:1"))
    with pytest.raises(EngineError, match="what it serves"):
        link.learn(status)
    assert link.version == "default"


@pytest.mark.parametrize(
    "phases", [[1], {"apply": -1.0}, {"apply": "long"}, {"": 1.0}, {"apply": float("inf")}, {"apply": None}]
)
def test_phases_that_make_no_sense_are_an_engine_error(phases: Any) -> None:
    with pytest.raises(EngineError, match="makes no sense"):
        CommitReply(phases=phases)
    assert CommitReply(phases={"apply": 1}).phases == {"apply": 1.0}


def test_a_worker_whose_numbers_make_no_sense_is_not_believed(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Session._send_staged
    with Publisher(values(), [engine], timeout_s=10) as publisher:
        first = publisher.publish()
        monkeypatch.setattr(
            Session, "_send_staged", lambda self, id, digest, nbytes, *times: send(self, id, digest, -5, *times)
        )
        with pytest.raises(RoundFailed) as caught:
            publisher.publish(timeout_s=1.0)
        assert caught.value.serving == {"two": first.version}
        monkeypatch.setattr(Session, "_send_staged", send)
        assert publisher.publish().ok


def test_an_answer_that_stays_lost_is_told_as_that_when_time_runs_out() -> None:
    """The last repetition ends by the deadline; that says less than that an answer was lost."""
    answers = iter([AnswerLost("the connection broke"), DeadlineExceeded("no time left")])

    def commit(order: CommitOrder, deadline: Deadline) -> CommitReply:
        raise next(answers)

    settings: Any = SimpleNamespace(pause="keep", clear_cache=True)
    delivery: Any = SimpleNamespace(epoch=1, round=1, deadline=Deadline(5))
    some: Any = SimpleNamespace(version="1-ab")
    commits = Commits(settings, some, delivery, some, some, some)
    client: Any = SimpleNamespace(commit=commit, name="a")
    engine = EngineLink(client)
    with pytest.raises(AnswerLost, match="the connection broke") as caught:
        commits._order_now(_Going(engine, cast(Any, SimpleNamespace(may_be_committed=True)), [], 0.0))
    assert isinstance(caught.value, PeerLost)


def test_a_failure_that_names_no_worker_is_about_the_only_one_or_the_lost_one() -> None:
    def link(*lost: str | None) -> EngineLink:
        made = EngineLink(HttpEngineClient("http://127.0.0.1:1"))
        workers: list[Any] = [SimpleNamespace(member=SimpleNamespace(rank=n, lost=why)) for n, why in enumerate(lost)]
        made.workers = workers
        return made

    assert link(None).suspect() == 0
    assert link(None, "gone").suspect() == 1
    assert link(None, None).suspect() is None
    assert link("gone", "gone").suspect() is None
    assert link().suspect() is None
