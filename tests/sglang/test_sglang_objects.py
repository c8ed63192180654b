"""``sglang.Engine`` objects as engines of a Publisher, and what is refused by name."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.sglang.servers import Launcher

from weightcast.engines.sglang.refused import NOT_EVERYWHERE, REFUSED, refuse_settings
from weightcast.engines.sglang.versions import SUPPORTED
from weightcast.errors import EngineError, Unsupported
from weightcast.testing.models import build_tiny_model

HARMFUL: dict[str, Any] = {
    "tokenizer_worker_num": 2,
    "quantization": "fp8",
    "speculative_algorithm": "EAGLE",
    "enable_dp_attention": True,
    "disaggregation_mode": "decode",
    "cpu_offload_gb": 1,
    "offload_group_size": 2,
    "kt_weight_path": "/experts",
    "enable_eplb": True,
    "init_expert_location": "/locations.json",
    "ep_num_redundant_experts": 2,
    "elastic_ep_backend": "mooncake",
    "enable_hierarchical_cache": True,
    "enable_lmcache": True,
    "enable_flexkv": True,
    "dllm_algorithm": "LowConfidence",
    "torchao_config": "int8wo",
    "weight_cache_mode": "daemon",
    "enable_lora": True,
    "lora_paths": ["a"],
}


def test_an_engine_object_takes_rounds(launcher: Launcher, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "m", "llama", dtype="float32")
    result, log = tmp_path / "seen.json", tmp_path / "engine.log"
    ended = launcher.wait(launcher.run("tests.sglang.offline:publishes", str(model), str(result), log=log))
    assert ended == 0, log.read_text()[-4000:]
    seen = json.loads(result.read_text())
    assert len(seen) == 4
    assert len({round["version"] for round in seen}) == 4
    for round in seen:
        assert round["matches"]
        assert set(round["named"]) == {round["version"]}
        assert round["got"] == round["wanted"]
    assert [round.get("beside") for round in seen] == [None, True, None, True]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """SGLang's settings as they are where nobody says otherwise."""
    from sglang.srt.server_args import ServerArgs

    return {name: getattr(ServerArgs(model_path="/nowhere"), name) for name in ServerArgs.__struct_fields__}


def test_settings_are_refused_by_name(settings: dict[str, Any]) -> None:
    assert set(HARMFUL) == {refused.setting for refused in REFUSED} | set(NOT_EVERYWHERE)
    refuse_settings(_Args(settings))
    for name, value in HARMFUL.items():
        with pytest.raises(Unsupported, match=name):
            refuse_settings(_Args({**settings, name: value}))


def test_a_pipeline_over_several_machines_is_refused_by_name(settings: dict[str, Any]) -> None:
    refuse_settings(_Args({**settings, "pp_size": 2}))
    refuse_settings(_Args({**settings, "nnodes": 2}))
    with pytest.raises(Unsupported, match="pp_size, nnodes"):
        refuse_settings(_Args({**settings, "pp_size": 2, "nnodes": 2}))


def test_a_setting_that_is_not_known_any_more_is_told(settings: dict[str, Any]) -> None:
    del settings["enable_eplb"]
    with pytest.raises(Unsupported, match="no setting enable_eplb"):
        refuse_settings(_Args(settings))


@pytest.mark.parametrize(
    ("version", "fits"), [("0.5.16", True), ("0.5.23.post1", True), ("0.5.15", False), ("0.6.0", False)]
)
def test_versions_out_of_range_are_told_the_range(version: str, fits: bool) -> None:
    if fits:
        SUPPORTED.check(version)
        return
    with pytest.raises(Unsupported) as caught:
        SUPPORTED.check(version)
    assert "0.5.16 to 0.5.23" in str(caught.value)


class _Args:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.__dict__.update(settings)


@pytest.mark.parametrize(
    ("tags", "saves", "backup", "wanted"),
    [(None, True, False, True), (["weights"], True, True, False), (["kv_cache"], True, False, None), (None, False, False, None)],
)  # fmt: skip
def test_a_scheduler_hears_that_weights_go(
    tags: list[str] | None, saves: bool, backup: bool, wanted: bool | None
) -> None:
    from weightcast.engines.sglang import plugin
    from weightcast.engines.sglang.worker import SchedulerCalls

    calls = SchedulerCalls(Scheduled(enable_memory_saver=saves, enable_weights_cpu_backup=backup))
    heard: list[bool] = []
    calls.worker.before_sleep = lambda *, loses: heard.append(loses)  # type: ignore[method-assign]
    manager = SimpleNamespace(scheduler=SimpleNamespace(weightcast=calls))
    plugin._before_sleep(manager, SimpleNamespace(tags=tags))
    assert heard == ([] if wanted is None else [wanted])


def test_a_cache_that_is_not_flushed_changes_nothing_and_the_queue_is_kept() -> None:
    from weightcast.engines.sglang.scheduler import standing_scheduler

    scheduler = Scheduled()
    scheduler.flushes = False
    with pytest.raises(EngineError, match="keeps keys and values"):
        standing_scheduler(scheduler).forget()
    assert scheduler.waiting_queue == ["a request"]
    assert scheduler.seen == [[]], "requests that wait hold no keys and values"
    assert scheduler._engine_paused


def test_every_worker_has_a_rank_of_its_own() -> None:
    """Tensor-parallel ranks of one stage come first, then the stages of one replica."""
    from weightcast.engines.sglang.worker import SchedulerCalls

    scheduler, ranks = Scheduled(), []
    for dp_rank in range(2):
        for pp_rank in range(3):
            for tp_rank in range(2):
                place = {"tp_rank": tp_rank, "tp_size": 2, "pp_rank": pp_rank, "pp_size": 3, "dp_rank": dp_rank}
                scheduler.ps = SimpleNamespace(**place)
                ranks.append(SchedulerCalls(scheduler).rank)
    assert ranks == list(range(12))


class Scheduled:
    """As much of a scheduler of SGLang 0.5.16 as standing still needs."""

    def __init__(self, **args: bool) -> None:
        self.ps = SimpleNamespace(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=None)
        self.server_args = SimpleNamespace(**args)
        self.waiting_queue = ["a request"]
        self.flushes, self._engine_paused = True, False
        self.seen: list[list[str]] = []

    def pause_generation(self, request: Any) -> None:
        self._engine_paused = True

    def continue_generation(self, request: Any) -> None:
        self._engine_paused = False

    def flush_cache(self, empty_cache: bool) -> bool:
        self.seen.append(self.waiting_queue)
        return self.flushes


def by_msgpack(message: Any) -> Any:
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    return msgpack_decode(msgpack_encode(message))


def by_pickle(message: Any) -> Any:
    from sglang.srt.environ import envs

    assert envs.SGLANG_USE_PICKLE_IPC.get(), "the servers of all tests but the conformance suite go by pickle"
    return pickle.loads(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


@pytest.mark.parametrize("sent", [by_msgpack, by_pickle])
def test_a_message_goes_through_both_encodings_of_sglang(sent: Callable[[Any], Any]) -> None:
    from sglang.srt.managers.io_struct import PauseGenerationReqInput, hook_custom_types

    from weightcast.engines.sglang.messages import WeightcastAnswer, WeightcastOrder, packed, unpacked

    hook_custom_types(WeightcastOrder, WeightcastAnswer)
    order = WeightcastOrder(mode="in_place", number=7, action="update", payload=packed({"info": {"round": 1}}))
    again = sent(order)
    assert type(again) is WeightcastOrder
    assert isinstance(again, PauseGenerationReqInput), "an order waits for the end of a step, as a pause does"
    assert (again.number, again.action, unpacked(again.payload)) == (7, "update", {"info": {"round": 1}})
    assert msgspec.to_builtins(sent(WeightcastAnswer(number=3))) == msgspec.to_builtins(WeightcastAnswer(number=3))
