"""The registry: names, reasons and the choice."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import msgspec
import pytest

from weightcast.errors import InvalidInput, Unsupported
from weightcast.transports import Facts, TransportRegistry, local_facts
from weightcast.transports.gloo import GlooTransport
from weightcast.transports.registry import ENTRY_POINT_GROUP, registry


class _Carrier(GlooTransport):
    name = "carrier"


class _Picky(GlooTransport):
    name = "nccl"

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        return "no GPU in sight"


def _with_entry_points(**values: str) -> TransportRegistry:
    return TransportRegistry(
        EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP) for name, value in values.items()
    )


def _facts(**changes: object) -> Facts:
    facts = Facts(host="h", pid=1, device="cpu", transports=("shm", "gloo", "carrier", "nccl"))
    return msgspec.structs.replace(facts, **changes)


def test_installed_transports_load() -> None:
    assert {"shm", "gloo"} <= set(registry().available())
    assert registry().get("shm") is registry().get("shm")
    assert registry().get("gloo").name == "gloo"


def test_a_failed_import_is_remembered_with_its_reason() -> None:
    found = _with_entry_points(
        gloo="weightcast.transports.gloo:GlooTransport", nccl="no_such_library:T", odd="pathlib:Path"
    )
    assert found.names() == ("nccl", "gloo", "odd")
    assert found.available() == ("gloo",)
    with pytest.raises(Unsupported, match=r"'nccl': ModuleNotFoundError: No module named 'no_such_library'.*gloo"):
        found.get("nccl")
    with pytest.raises(Unsupported, match="not a Transport"):
        found.get("odd")
    transport, reason = found.choose(_facts(), _facts())
    assert transport.name == "gloo"
    assert "No module named 'no_such_library'" in reason


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(Unsupported, match=r"no transport 'pigeon'.*shm.*gloo"):
        registry().get("pigeon")


def test_register_refuses_taken_and_foreign_names() -> None:
    found = TransportRegistry()
    found.register("carrier", _Carrier)
    assert isinstance(found.get("carrier"), _Carrier)
    with pytest.raises(InvalidInput, match="registered already"):
        found.register("carrier", _Carrier)
    with pytest.raises(InvalidInput, match="registered already"):
        found.register("shm", _Carrier)
    with pytest.raises(InvalidInput, match="is not 'pigeon'"):
        found.register("pigeon", _Carrier)


@pytest.mark.parametrize(
    ("trainer", "worker", "name", "reason"),
    [
        (_facts(), _facts(), "shm", "shm (first choice)"),
        (_facts(), _facts(host="i"), "gloo", "gloo (shm: other host, container or user)"),
        (_facts(transports=("gloo",)), _facts(), "gloo", "gloo (shm: the trainer cannot load it)"),
        (_facts(), _facts(transports=("gloo",)), "gloo", "gloo (shm: the worker cannot load it)"),
    ],
)
def test_the_best_possible_is_chosen_with_reasons(trainer: Facts, worker: Facts, name: str, reason: str) -> None:
    found = _with_entry_points(
        gloo="weightcast.transports.gloo:GlooTransport", shm="weightcast.transports.shm:ShmTransport"
    )
    found.register("carrier", _Carrier)
    transport, why = found.choose(trainer, worker, None)
    assert (transport.name, why) == (name, reason)


def test_a_wish_is_honoured_or_refused_by_name() -> None:
    found = TransportRegistry()
    transport, why = found.choose(_facts(), _facts(), "gloo")
    assert (transport.name, why) == ("gloo", "gloo (asked for)")
    with pytest.raises(Unsupported, match="'shm' was asked for and cannot be used: other host"):
        found.choose(_facts(), _facts(host="i"), "shm")
    with pytest.raises(Unsupported, match="no transport 'pigeon'"):
        found.choose(_facts(), _facts(), "pigeon")


def test_no_common_transport_says_why_for_each() -> None:
    found = _with_entry_points(gloo="weightcast.transports.gloo:GlooTransport")
    found.register("nccl", _Picky)
    with pytest.raises(Unsupported, match=r"nccl: no GPU in sight; gloo: the worker's weights are on cuda.*doctor"):
        found.choose(_facts(), _facts(device="cuda"))


def test_local_facts_describe_this_process() -> None:
    facts = local_facts("cpu")
    assert facts == local_facts("cpu")
    assert (facts.device, facts.gpu) == ("cpu", "")
    assert set(facts.transports) == set(registry().available())
    assert local_facts("cpu", address="10.1.2.3").address == "10.1.2.3"
    assert registry().choose(facts, facts)[0].name == "shm"
