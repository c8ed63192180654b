"""What is decided before anything runs: versions, plug-ins, who is which worker, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from weightcast.engines.vllm import plugin
from weightcast.engines.vllm.parallelism import worker_rank
from weightcast.engines.vllm.versions import check_version
from weightcast.errors import Unsupported


def config(*, tp: int = 1, pp: int = 1, dp: int = 1, index: int = 0, rank: int = 0, **more: Any) -> Any:
    """The part of a VllmConfig that says where a worker is."""
    parallel = SimpleNamespace(
        world_size=tp * pp, world_size_across_dp=tp * pp * dp, data_parallel_index=index, rank=rank,
        **{name: value for name, value in more.items() if name not in ("lora_config", "cache_config")},
    )  # fmt: skip
    return SimpleNamespace(
        parallel_config=parallel,
        lora_config=more.get("lora_config"),
        cache_config=more.get("cache_config", SimpleNamespace()),
    )


@pytest.mark.parametrize(
    ("place", "rank", "size"),
    [
        ({}, 0, 1),
        ({"tp": 2, "rank": 1}, 1, 2),
        ({"tp": 2, "pp": 2, "rank": 3}, 3, 4),
        ({"tp": 2, "pp": 2, "dp": 3, "index": 2, "rank": 1}, 9, 12),
        ({"dp": 2, "index": 1}, 1, 2),
    ],
)
def test_ranks_count_as_vllm_counts_them(place: dict[str, int], rank: int, size: int) -> None:
    worker = worker_rank(config(**place))
    assert (worker.rank, worker.world_size) == (rank, size)


def test_real_configurations_have_every_field_that_is_asked_for() -> None:
    from vllm.config import ParallelConfig

    real = ParallelConfig()
    for name in vars(config().parallel_config):
        assert hasattr(real, name), name
    assert worker_rank(SimpleNamespace(parallel_config=real, lora_config=None, cache_config=None)).world_size == 1


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"enable_eplb": True}, "expert load balancing"),
        ({"data_parallel_external_lb": True}, "external data-parallel"),
        ({"data_parallel_hybrid_lb": True}, "hybrid data-parallel"),
        ({"enable_elastic_ep": True}, "elastic expert"),
        ({"lora_config": object()}, "LoRA"),
        ({"cache_config": SimpleNamespace(cpu_offload_gb=4)}, "offloaded"),
    ],
)
def test_what_nobody_mapped_is_refused_by_name(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        worker_rank(config(**setting))


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "0.9.2"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(Unsupported, match=r"0\.26 to 0\.33") as caught:
        check_version(version)
    assert version in str(caught.value)


@pytest.mark.parametrize("version", ["0.26.0", "0.28.0+cpu", "0.32.0", "0.33.1rc1", "0.0.0.dev7"])
def test_supported_versions_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    ("arguments", "asks"),
    [
        (["vllm", "serve", "m", "--weight-transfer-config", '{"backend": "weightcast"}'], True),
        (["vllm", "serve", "m", '--weight-transfer-config={"backend": "weightcast"}'], True),
        (["vllm", "serve", "m", "--weight_transfer_config.backend", "weightcast"], True),
        (["vllm", "serve", "m", "--weight-transfer-config", '{"backend": "nccl"}'], False),
        (["vllm", "serve", "weightcast"], False),
        (["vllm", "serve", "m", "--weight-transfer-config"], False),
    ],
)
def test_the_command_line_asks_for_the_backend(arguments: list[str], asks: bool) -> None:
    assert plugin.asks_for_backend(arguments) is asks


class Points:
    """Installed plug-ins: names by group."""

    def __init__(self, **groups: list[str]) -> None:
        self._groups = groups

    def __call__(self, *, group: str) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self._groups.get(group.removeprefix("vllm."), [])]


def test_allowing_our_routes_changes_no_other_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    points = Points(
        general_plugins=["weightcast", "other", "lora_hf_hub_resolver"],
        platform_plugins=["chip"],
        endpoint_plugins=["weightcast", "strange"],
    )
    monkeypatch.setattr(plugin, "entry_points", points)
    monkeypatch.setenv(plugin.ALLOW_LIST, "")  # so that it is put back afterwards
    monkeypatch.delenv(plugin.ALLOW_LIST)
    plugin.allow_routes()
    assert plugin.os.environ[plugin.ALLOW_LIST].split(",") == ["chip", "other", "weightcast"]
    monkeypatch.setenv(plugin.ALLOW_LIST, "other")
    plugin.allow_routes()
    assert plugin.os.environ[plugin.ALLOW_LIST] == "other"


def test_routes_of_others_are_not_allowed_by_the_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = Points(general_plugins=["weightcast", "twofold"], endpoint_plugins=["weightcast", "twofold"])
    monkeypatch.setattr(plugin, "entry_points", points)
    monkeypatch.setenv(plugin.ALLOW_LIST, "")  # so that it is put back afterwards
    monkeypatch.delenv(plugin.ALLOW_LIST)
    plugin.allow_routes()
    assert plugin.ALLOW_LIST not in plugin.os.environ
    assert "twofold" in caplog.text
