"""Faults in a chain of two engines, of which one feeds the other, under require="live": the other one has the version all the same."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.engine_process import EngineProcess
from tests.support.faults import Action
from tests.trials.matrix.field import Field
from tests.trials.matrix.outcome import Finding, expect
from tests.trials.matrix.plays.live import comes_back, struck
from weightcast.report.model import Report

MakeField = Callable[..., Field]


def relay_lost(make: MakeField, *, point: str, action: Action) -> Finding:
    """The victim feeds the other engine, which gets from the trainer what the victim did not send on."""
    with make(require="live", relay=True) as field:
        field.start()
        whole = sum(value.nbytes for value in field.tensors.values())
        if point == "setup":
            _set_up_again(field)
        sent = _sent_to(field.b, struck(field, point, action, lost=field.a, spared=field.b))
        seconds = field.seconds
        is_right = {"feed:middle": 0 < sent < whole, "feed:end": sent == 0}.get(point, sent >= whole)
        expect(is_right, f"the trainer sent {sent} of {whole} bytes")
        comes_back(field)
        _is_fed(field, field.b)
        return Finding(
            "the engine that was fed gets what is missing from the trainer; the relay comes back by itself", seconds
        )


def fed_lost(make: MakeField, *, action: Action) -> Finding:
    """The other engine feeds the victim."""
    with make(require="live", relay=True) as field:
        field.start([field.b.url, field.a.url])
        _is_fed(field, field.a)
        struck(field, "transfer:middle", action, lost=field.a, spared=field.b)
        seconds = field.seconds
        comes_back(field)
        _is_fed(field, field.a)
        return Finding("the relay publishes; the engine that it fed comes back by itself", seconds)


def relay_corrupts(make: MakeField) -> Finding:
    """The victim holds the right bytes, and sends others on; it would do so again."""
    with make(require="live", relay=True) as field:
        field.start()
        struck(field, "feed:middle", "corrupt", lost=field.b, spared=field.a)
        seconds = field.seconds
        field.a.arm("feed:middle", "corrupt")
        comes_back(field)
        expect(_sent_to(field.b, field.succeed()), "an engine that sends other bytes on feeds others")
        return Finding("the digest of the engine that was fed differs; neither engine is in a chain any more", seconds)


def _set_up_again(field: Field) -> None:
    """Leave the chain in need of a new set-up."""
    field.a.arm("transfer:start", "raise")
    field.succeed(field.unhurried_s, engines=[field.b])


def _sent_to(engine: EngineProcess, report: Report) -> int:
    (sent,) = (each.workers[0].sent_nbytes for each in report.engines if each.name == engine.url)
    return sent


def _is_fed(field: Field, engine: EngineProcess) -> None:
    sent = _sent_to(engine, field.succeed())
    expect(sent == 0, f"the trainer sends {sent} bytes to an engine that another one feeds")
