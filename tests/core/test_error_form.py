"""The one form of an error on a wire: what is raised here is raised there, and a peer's text is cut and cleaned on the way."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightcast.errors as errors
from weightcast.commit.worker_outcome import WorkerOutcome
from weightcast.errors import (
    ErrorForm,
    InvalidInput,
    LoadError,
    PeerLost,
    RoundFailed,
    ShadowError,
    WakeFailed,
    WeightcastError,
)
from weightcast.facts import Facts
from weightcast.messages import PROTOCOL, Bye, Failed, decode, encode
from weightcast.quoted import TEXT_CHARACTERS, TRACE_CHARACTERS, quoted, quoted_json, quoted_lines

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, WeightcastError) and kind is not RoundFailed
]
HOSTILE = "gone\x1b[2J\x1b]0;pwned\x07\r\nERROR forged line\u202e\x00\x9b31m"


def travelled(form: ErrorForm) -> ErrorForm:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(form), type=ErrorForm)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_error_is_raised_on_the_other_side_as_it_was(kind: type[WeightcastError]) -> None:
    error = kind("it broke", hint="Do this").at(engine="e", worker=3, phase="commit", round=7)
    heard = travelled(ErrorForm.of(error)).error()
    assert type(heard) is kind
    assert str(heard) == str(error)
    assert (heard.engine, heard.worker, heard.phase, heard.round) == ("e", 3, error.phase, 7)
    assert error.phase == ("wake" if kind is WakeFailed else "commit")


def test_the_field_of_a_bad_value_travels() -> None:
    heard = travelled(ErrorForm.of(InvalidInput("too small", field="shadows"))).error()
    assert isinstance(heard, InvalidInput)
    assert heard.field == "shadows"


def test_a_foreign_error_brings_its_traceback() -> None:
    try:
        {}["w"]
    except KeyError as error:
        form = travelled(ErrorForm.of(error, otherwise=LoadError))
        cause = error
    heard = form.error()
    assert type(heard) is LoadError
    assert heard.message == "KeyError: 'w'"
    assert "test_a_foreign_error_brings_its_traceback" in heard.remote_trace
    assert any(heard.remote_trace in note for note in heard.__notes__)
    assert ErrorForm.of(heard).trace == heard.remote_trace, "a trace goes on to the next process"
    caused = LoadError("the loader failed")
    caused.__cause__ = cause
    assert "KeyError: 'w'" in ErrorForm.of(caused).trace


def test_what_the_receiver_knows_wins_over_what_the_peer_says() -> None:
    form = ErrorForm(kind="ShadowError", message="no room", engine="somebody else", worker=9, phase="transfer")
    error = form.error(engine="e", worker=1)
    assert (error.engine, error.worker, error.phase) == ("e", 1, "transfer")


def test_a_peer_cannot_say_that_a_round_failed_or_make_up_a_class() -> None:
    for kind in ("RoundFailed", "SystemExit", "KeyError", "", "__class__"):
        assert type(ErrorForm(kind=kind, message="m").error()) is WeightcastError


def test_hostile_text_is_one_printable_line() -> None:
    form = ErrorForm(kind="PeerLost", message=HOSTILE, hint=HOSTILE, engine=HOSTILE, phase=HOSTILE, field=HOSTILE)
    raw = dict.fromkeys(("kind", "message", "hint", "engine", "phase"), HOSTILE)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(raw), type=ErrorForm)
    for text in (str(form.error()), str(received.error())):
        assert text.isprintable()
        assert "forged line" in text


def test_a_long_text_is_cut_and_of_a_trace_the_end_is_kept() -> None:
    raw = {"kind": "k" * 10**6, "message": "m" * 10**7, "trace": "line\n" * 10**6 + "last\x1b[2J"}
    form = msgspec.msgpack.decode(msgspec.msgpack.encode(raw), type=ErrorForm)
    assert len(form.message) == TEXT_CHARACTERS
    assert form.message.endswith("...")
    assert len(form.trace) <= TRACE_CHARACTERS
    assert form.trace.endswith("last\\x1b[2J")


def test_a_message_and_an_outcome_embed_the_form() -> None:
    form = ErrorForm.of(ShadowError("no room", worker=1, hint="Buy memory"))
    failed = decode(encode(Failed(epoch=1, round=2, error=form, dirty=False)))
    assert isinstance(failed, Failed)
    assert failed.error == form
    outcome = WorkerOutcome(rank=4, weight_version="3-ab", digest="", dirty=False, error=form)
    raised = msgspec.convert(msgspec.to_builtins(outcome), WorkerOutcome).raised()
    assert raised is not None
    assert (type(raised), raised.worker) == (ShadowError, 4)
    assert WorkerOutcome(rank=0, weight_version="", digest="", dirty=False).raised() is None


def test_the_texts_of_every_message_are_cleaned() -> None:
    raw = bytes([PROTOCOL]) + msgspec.msgpack.encode({"type": "bye", "reason": HOSTILE * 1000, "settled": True})
    for message in (decode(raw), Bye(reason=HOSTILE * 1000, settled=True)):
        assert isinstance(message, Bye)
        assert message.reason.isprintable()
        assert len(message.reason) == TEXT_CHARACTERS
    facts = Facts(host=HOSTILE, pid=1, device=HOSTILE, transports=(HOSTILE,))
    assert all(text.isprintable() for text in (facts.host, facts.device, *facts.transports))


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=300), limit=st.integers(10, 100))
def test_quoting_is_bounded_printable_and_stable(text: str, limit: int) -> None:
    once = quoted(text, limit)
    assert len(once) <= limit
    assert once.isprintable()
    assert quoted(once, limit) == once
    lines = quoted_lines(text, limit)
    assert len(lines) <= limit
    assert all(line.isprintable() for line in lines.split("\n"))


def test_json_of_a_peer_is_cleaned_at_every_depth() -> None:
    deep: object = "x"
    for _ in range(100):
        deep = [deep]
    clean = quoted_json({"a\x1b": ["b\n\x1b[2J", 7, 1.5, None, True, {"c": "d\x07"}], "deep": deep})
    assert clean["a\\x1b"] == ["b \\x1b[2J", 7, 1.5, None, True, {"c": "d\\x07"}]
    assert len(quoted_json({str(i): "x" for i in range(100_000)})) == 100_000
    assert PeerLost("x").remote_trace == ""
