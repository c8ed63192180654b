"""nccl: who may use it and who may share a communicator, told from facts alone. What needs a GPU is in tests/gpu."""

from __future__ import annotations

from msgspec.structs import replace

from weightcast.facts import Facts
from weightcast.transports.nccl import NcclTransport


def transport() -> NcclTransport:
    """Without its constructor, which loads NCCL."""
    return object.__new__(NcclTransport)


def facts(host: str, gpu: str, pid: int = 1) -> Facts:
    return Facts(host=host, pid=pid, device="cuda", gpu=gpu, nccl_host=host)


def test_workers_with_a_gpu_each_share_and_those_on_one_gpu_do_not() -> None:
    workers = [facts("a", "0"), facts("a", "1"), facts("b", "0"), facts("a", "0", pid=2), facts("a", "0", pid=3)]
    assert transport().sharing(workers) == [[0, 1, 2], [3], [4]]
    assert transport().sharing([]) == []


def test_processes_that_call_themselves_different_hosts_may_share_a_gpu() -> None:
    workers = [facts("a", "0"), replace(facts("a", "0", pid=2), nccl_host="other")]
    assert transport().sharing(workers) == [[0, 1]]
    assert transport().refusal(facts("a", "0", pid=9), workers[1]) is None


def test_two_processes_on_one_gpu_are_refused_with_what_to_do() -> None:
    refused = transport().refusal(facts("a", "0", pid=1), facts("a", "0", pid=2))
    assert refused is not None
    assert "NCCL_HOSTID" in refused
    assert transport().refusal(facts("a", "0"), facts("a", "1", pid=2)) is None
