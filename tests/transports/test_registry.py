"""The registry: names, reasons and the choice."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import msgspec
import pytest
import torch

from weightcast.errors import InvalidInput, Unsupported
from weightcast.transports import Facts, TransportRegistry, cuda_ipc, gpu_exports, local_facts
from weightcast.transports.registry import ENTRY_POINT_GROUP, registry
from weightcast.transports.shm import ShmTransport
from weightcast.transports.shm_cuda import ShmCudaTransport
from weightcast.transports.tcp import TcpTransport


class _Carrier(TcpTransport):
    name = "carrier"
    preference = 0


class _Picky(TcpTransport):
    name = "nccl"

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        return "no GPU in sight"


class _Anywhere(_Carrier):
    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        return None


class _NoIpc(cuda_ipc.CudaIpcTransport):
    def __init__(self) -> None:
        raise Unsupported("needs a unicorn")


class _NoShm(ShmTransport):
    def __init__(self) -> None:
        raise Unsupported("needs a unicorn")


class _NoShmCuda(ShmCudaTransport):
    def __init__(self) -> None:
        raise Unsupported("needs a unicorn")


class _Swift(_Carrier):
    name = "swift"
    preference = 1000


class _Slow(_Carrier):
    name = "slow"
    preference = -1


class _Shy(_Carrier):
    name = "shy"

    @classmethod
    def suits(cls, trainer: Facts, worker: Facts) -> bool:
        return False


def _with_entry_points(**values: str) -> TransportRegistry:
    return TransportRegistry(
        EntryPoint(name=name, value=value, group=ENTRY_POINT_GROUP) for name, value in values.items()
    )


def _facts(**changes: object) -> Facts:
    facts = Facts(host="h", pid=1, device="cpu", transports=("shm", "tcp", "carrier", "nccl"))
    return msgspec.structs.replace(facts, **changes)


def test_installed_transports_load() -> None:
    assert {"shm", "tcp"} <= set(registry().available())
    assert registry().get("shm") is registry().get("shm")
    assert registry().get("tcp").name == "tcp"


def test_a_failed_import_is_remembered_with_its_reason() -> None:
    found = _with_entry_points(
        tcp="weightcast.transports.tcp:TcpTransport", nccl="no_such_library:T", odd="pathlib:Path"
    )
    assert set(found.names()) == {"nccl", "tcp", "odd"}
    assert found.names()[-1] == "tcp"
    assert found.available() == ("tcp",)
    with pytest.raises(Unsupported, match=r"'nccl': ModuleNotFoundError: No module named 'no_such_library'.*tcp"):
        found.get("nccl")
    with pytest.raises(Unsupported, match="not a Transport"):
        found.get("odd")
    assert found.choose(_facts(), _facts())[0].name == "tcp"


def test_what_does_not_suit_a_pair_goes_without_saying() -> None:
    """Also of a transport that cannot be made here; one that cannot even be imported is told of."""
    found = _with_entry_points(
        cuda_ipc=f"{__name__}:_NoIpc",
        shm=f"{__name__}:_NoShm",
        shm_cuda=f"{__name__}:_NoShmCuda",
        tcp="weightcast.transports.tcp:TcpTransport",
    )
    here = ("cuda_ipc", "shm", "shm_cuda", "tcp")
    cpu, gpu = _facts(transports=here), _facts(device="cuda", gpu="GPU-a", transports=here)
    assert found.names() == here
    for trainer, worker, name in ((cpu, cpu, "shm"), (gpu, gpu, "cuda_ipc"), (cpu, gpu, "shm_cuda")):
        assert found.choose(trainer, worker)[1] == f"tcp ({name}: needs a unicorn)"
    assert found.choose(gpu, cpu)[1] == "tcp (first choice)"
    lost = _with_entry_points(mine="no_such_library:M", tcp="weightcast.transports.tcp:TcpTransport")
    why = "tcp (mine: ModuleNotFoundError: No module named 'no_such_library')"
    assert lost.choose(gpu, cpu)[1] == why


def test_transports_of_others_take_their_place_by_the_number_they_give() -> None:
    """Whether they come as entry points or are registered by hand; the others do not know their names."""
    found = _with_entry_points(
        tcp="weightcast.transports.tcp:TcpTransport",
        shm="weightcast.transports.shm:ShmTransport",
        swift=f"{__name__}:_Swift",
        slow=f"{__name__}:_Slow",
    )
    found.register("carrier", _Carrier)
    assert found.names() == ("swift", "shm", "tcp", "carrier", "slow")
    here = _facts(transports=found.names())
    assert found.choose(here, here)[1] == "swift (first choice)"
    assert found.choose(here, here, unusable={"swift": "it fell"})[1] == "shm (swift: it fell)"
    there = msgspec.structs.replace(here, host="i")
    assert found.choose(here, there, unusable={"swift": "it fell", "tcp": "it is full"})[0].name == "carrier"


def test_what_has_to_be_asked_for_is_not_taken_for_want_of_anything_else() -> None:
    found = _with_entry_points(shy=f"{__name__}:_Shy")
    here = _facts(transports=("shy",))
    with pytest.raises(Unsupported, match="shy: it has to be asked for by name"):
        found.choose(here, here)
    assert found.choose(here, here, "shy")[1] == "shy (asked for)"
    assert registry().why_not("tls", local_facts("cpu"), local_facts("cpu")) == "it has to be asked for by name"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(Unsupported, match=r"no transport 'pigeon'.*shm.*tcp"):
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
        (_facts(), _facts(host="i"), "tcp", "tcp (shm: other host, container or user)"),
        (_facts(transports=("tcp",)), _facts(), "tcp", "tcp (shm: the trainer cannot load it)"),
        (_facts(), _facts(transports=("tcp",)), "tcp", "tcp (shm: the worker cannot load it)"),
    ],
)
def test_the_best_possible_is_chosen_with_reasons(trainer: Facts, worker: Facts, name: str, reason: str) -> None:
    found = _with_entry_points(
        tcp="weightcast.transports.tcp:TcpTransport", shm="weightcast.transports.shm:ShmTransport"
    )
    found.register("carrier", _Carrier)
    transport, why = found.choose(trainer, worker, None)
    assert (transport.name, why) == (name, reason)


def test_a_wish_is_honoured_or_refused_by_name() -> None:
    found = TransportRegistry()
    transport, why = found.choose(_facts(), _facts(), "tcp")
    assert (transport.name, why) == ("tcp", "tcp (asked for)")
    with pytest.raises(Unsupported, match=r"'shm' was asked for and cannot be used: other host.*transport=\"auto\""):
        found.choose(_facts(), _facts(host="i"), "shm")
    with pytest.raises(Unsupported, match="no transport 'pigeon'"):
        found.choose(_facts(), _facts(), "pigeon")


class _Unusable(_Picky):
    def __init__(self) -> None:
        raise Unsupported("needs a unicorn", hint="Find one")


def test_why_a_transport_cannot_be_had_is_told_in_its_own_words() -> None:
    found = _with_entry_points(tcp="weightcast.transports.tcp:TcpTransport", horn=f"{__name__}:_Unusable")
    assert found.failure("horn") == "needs a unicorn"


def test_no_common_transport_says_why_for_each() -> None:
    found = _with_entry_points(tcp="weightcast.transports.tcp:TcpTransport")
    found.register("nccl", _Picky)
    with pytest.raises(Unsupported, match=r"nccl: no GPU in sight; tcp: the trainer's weights are on mps.*doctor"):
        found.choose(_facts(device="mps"), _facts(device="cuda"))


def test_host_memory_goes_to_a_gpu_by_that_gpu_and_everything_else_between_kinds_of_memory_in_buckets() -> None:
    found = _with_entry_points(
        tcp="weightcast.transports.tcp:TcpTransport",
        shm="weightcast.transports.shm:ShmTransport",
        shm_cuda="weightcast.transports.shm_cuda:ShmCudaTransport",
    )
    here = ("shm", "shm_cuda", "tcp")
    cpu, gpu = _facts(transports=here), _facts(device="cuda", gpu="GPU-a", transports=here)
    elsewhere = msgspec.structs.replace(gpu, host="i")
    assert found.choose(cpu, gpu)[1] == "shm_cuda (first choice)"
    assert found.choose(cpu, elsewhere)[1] == "tcp (shm_cuda: other host, container or user)"
    assert found.choose(gpu, cpu)[1] == "tcp (first choice)"
    assert found.choose(cpu, cpu)[1] == "shm (first choice)"
    files = msgspec.structs.replace(cpu, folders=("/models/a",))
    assert "the engine opens no files in /models/a" in found.choose(files, gpu)[1]
    assert found.choose(files, msgspec.structs.replace(gpu, roots=("/models",)))[0].name == "shm_cuda"
    for trainer, worker in ((cpu, cpu), (gpu, cpu), (gpu, gpu)):
        with pytest.raises(Unsupported, match="from host memory to a GPU"):
            found.choose(trainer, worker, "shm_cuda")


def test_local_facts_describe_this_process() -> None:
    facts = local_facts("cpu")
    assert facts == local_facts("cpu")
    assert (facts.device, facts.gpu) == ("cpu", "")
    assert set(facts.transports) == set(registry().available())
    assert local_facts("cpu", address="10.1.2.3").address == "10.1.2.3"
    assert registry().choose(facts, facts)[0].name == "shm"


def test_cuda_ipc_is_passed_over_where_the_trainers_gpu_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_exports, "visible_gpus", lambda: ("GPU-a", "GPU-b"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda ours, theirs: (ours, theirs) == (1, 0))
    found = TransportRegistry(points=[])
    found.register("cuda_ipc", cuda_ipc.CudaIpcTransport)
    found.register("carrier", _Anywhere)

    def gpu(uuid: str, **changes: object) -> Facts:
        return _facts(device="cuda", gpu=uuid, transports=("cuda_ipc", "carrier"), **changes)

    apart, both = gpu("GPU-b", visible_gpus=("GPU-b",)), gpu("GPU-b", visible_gpus=("GPU-a", "GPU-b"))
    assert found.choose(gpu("GPU-b"), apart)[0].name == "cuda_ipc"
    assert found.choose(gpu("GPU-a"), both)[0].name == "cuda_ipc"
    for trainer, worker, reason in (
        (gpu("GPU-a"), apart, "the worker cannot see the trainer's GPU GPU-a"),
        (gpu("GPU-b", mappable=False), both, "backend:cudaMallocAsync"),
        (gpu("GPU-b"), gpu("GPU-a", visible_gpus=("GPU-a", "GPU-b")), "GPU GPU-a cannot reach the memory of GPU GPU-b"),
    ):
        transport, why = found.choose(trainer, worker)
        assert transport.name == "carrier"
        assert why.startswith("carrier (cuda_ipc: ")
        assert reason in why
        with pytest.raises(Unsupported, match="'cuda_ipc' was asked for and cannot be used"):
            found.choose(trainer, worker, "cuda_ipc")


@pytest.mark.parametrize(
    ("variables", "mappable"),
    [
        ({}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128, backend:cudaMallocAsync"}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, False),
        ({"PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, True),
    ],
)
def test_facts_of_a_gpu_say_which_others_are_visible_and_whether_its_memory_can_be_mapped(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], mappable: bool
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    facts = local_facts("cuda:1")
    assert (facts.device, facts.gpu, facts.visible_gpus) == ("cuda", "GPU-1", ("GPU-0", "GPU-1"))
    assert facts.mappable is mappable
    assert local_facts("cpu").mappable
