"""What is decided before anything runs: versions, plug-ins, who is which worker, and what is refused."""

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig, VllmConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

import vllm
from weightcast.engines.stock.refused import Refused, setting_of
from weightcast.engines.vllm import plugin
from weightcast.engines.vllm.parallelism import REFUSED, worker_rank
from weightcast.engines.vllm.versions import SUPPORTED, check_version
from weightcast.errors import Unsupported


def config(**parallel: Any) -> Any:
    """A real VllmConfig without a model, as the workers of such an engine have it."""
    return VllmConfig(parallel_config=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("sizes", "place", "rank", "size"),
    [
        ({}, {}, 0, 1),
        ({"tensor_parallel_size": 2}, {"rank": 1}, 1, 2),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {"rank": 3}, 3, 4),
        (
            {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 3},
            {"data_parallel_index": 2, "rank": 1},
            9,
            12,
        ),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, {"rank": 1}, 1, 2),
        # A replica of a dense model is an engine of its own that knows its number, and not how many there are.
        ({}, {"data_parallel_index": 1}, 1, 2),
    ],
    ids=["one", "tp", "pp", "dp", "ep", "replica"],
)
def test_ranks_count_as_vllm_counts_them(sizes: dict[str, Any], place: dict[str, int], rank: int, size: int) -> None:
    real = config(distributed_executor_backend="mp", **sizes)
    for name, value in place.items():
        assert hasattr(real.parallel_config, name), name
        setattr(real.parallel_config, name, value)
    worker = worker_rank(real)
    assert (worker.rank, worker.world_size) == (rank, size)


def set_to(vllm_config: Any, setting: str, value: Any) -> None:
    """Change a setting, by its dotted name."""
    *path, last = setting.split(".")
    target = vllm_config
    for name in path:
        target = getattr(target, name)
    setattr(target, last, value)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.setting)
def test_what_nobody_mapped_is_refused_by_name(refused: Refused) -> None:
    real = config()
    assert setting_of(real, refused.setting, SUPPORTED) == refused.harmless
    harmful: Any = {int: 2, bool: True}.get(type(refused.harmless), object())
    set_to(real, refused.setting, harmful)
    with pytest.raises(Unsupported, match=re.escape(refused.setting)) as caught:
        worker_rank(real)
    assert caught.value.hint == refused.hint


def test_a_setting_that_vllm_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"parallel_config\.colour"):
        setting_of(config(), "parallel_config.colour", SUPPORTED)


@pytest.mark.parametrize(
    ("method", "stages", "refused"),
    [
        ("eagle", 1, ""),
        ("draft_model", 1, ""),
        ("mtp", 1, ""),
        ("ngram", 2, ""),
        ("suffix", 1, ""),
        ("medusa", 1, r"of this kind \(medusa\).*speculative_config"),
        ("eagle3", 2, "pipeline parallelism"),
    ],
)
def test_what_nobody_can_bring_to_a_version_is_refused_by_name(method: str, stages: int, refused: str) -> None:
    real = config()
    real.speculative_config = object.__new__(SpeculativeConfig)
    real.speculative_config.method = method
    real.parallel_config.pipeline_parallel_size = stages
    if refused:
        with pytest.raises(Unsupported, match=refused):
            worker_rank(real)
    else:
        assert worker_rank(real).rank == 0


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "0.9.2", "0.34.0.dev12+g1a2b3c4"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(Unsupported, match=r"0\.26 to 0\.33") as caught:
        check_version(version)
    assert version in str(caught.value)


@pytest.mark.parametrize(
    "version", ["0.26.0", "0.28.0+cpu", "0.32.0", "0.33.1rc1", "0.33.1.dev3+gabc", "0.0.0.dev7", "dev"]
)
def test_supported_versions_pass(version: str) -> None:
    check_version(version)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """vLLM's backends as they are before any plug-in was called; put back afterwards."""
    others = {name: make for name, make in WeightTransferEngineFactory._registry.items() if name != plugin.BACKEND}
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", others)
    return others


def test_a_version_out_of_range_starts_without_us_and_is_refused_where_asked_for(
    registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    plugin.register()
    plugin.register()
    asked = SimpleNamespace(backend=plugin.BACKEND)
    with pytest.raises(Unsupported, match=r"vLLM 0\.34\.0 is not supported.*0\.26 to 0\.33"):
        WeightTransferEngineFactory.create_engine(asked, config(), None, None)


def test_a_version_before_weight_transfer_starts_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.10.2")
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", None)  # its import fails
    plugin.register()


def test_a_supported_version_gets_the_backend(registry: dict[str, Any]) -> None:
    plugin.register()
    plugin.register()
    assert registry[plugin.BACKEND]().__name__ == "VllmBackend"


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
