"""SkyRL's released weight sync, whose backend is weightcast, into a stock vLLM server."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.vllm.offline import PROMPTS, FreshLoads
from tests.vllm.skyrl_package import IS_THERE, open_skyrl

from weightcast.errors import Unsupported
from weightcast.testing.models import build_tiny_model
from weightcast.testing.ranks import run_ranks
from weightcast.testing.vllm_server import vllm_server

pytestmark = pytest.mark.skipif(not IS_THERE, reason="SkyRL is not installed beside vLLM")
ROUNDS = 3


def test_a_trainer_of_two_ranks_syncs_a_server(
    tmp_path: Path, fresh: FreshLoads, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.vllm.skyrl_ranks import sync

    model = build_tiny_model(tmp_path / "m", "qwen3", dtype="bfloat16", head_dim=32)
    with vllm_server(model) as served:
        monkeypatch.setenv("WEIGHTCAST_TOKEN", served.token)
        found = run_ranks(
            sync, 2, str(tmp_path / "store"), str(model), served.url, served.token, ROUNDS, timeout_s=200
        )[0]
        assert [(proven, whole) for _, proven, whole, _, _ in found] == [(True, True)] * ROUNDS
        assert found[-1][0] < found[0][0], "the policy learns"
        assert len({version for *_, version, _ in found}) == ROUNDS
        assert served.version == found[-1][3]
        weights = load_file(Path(found[-1][4]) / "model.safetensors")
        assert served.answers(PROMPTS) == fresh.answers(model, weights, PROMPTS)


@pytest.fixture
def sync(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SkyRL's package of weight sync, which is as it was afterwards."""
    open_skyrl()
    from skyrl.backends.skyrl_train import weight_sync
    from skyrl.backends.skyrl_train.weight_sync import weight_senders

    monkeypatch.setattr(weight_sync, "get_transfer_strategy", weight_sync.get_transfer_strategy)
    monkeypatch.setattr(weight_sync, "_VLLM_RECEIVE_BACKENDS", dict(weight_sync._VLLM_RECEIVE_BACKENDS))
    monkeypatch.setattr(weight_senders, "_build_sender_init_info", weight_senders._build_sender_init_info)
    return weight_sync


def test_other_backends_stay_what_they_are(sync: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightcast.integrations.skyrl import register

    early = sys.modules["skyrl.early"] = SimpleNamespace(  # type: ignore[assignment]
        get_transfer_strategy=sync.get_transfer_strategy, __name__="skyrl.early"
    )
    monkeypatch.setitem(sys.modules, "skyrl.early", early)  # type: ignore[arg-type]
    asked = [("nccl", False), ("nccl", True), ("delta", False), ("rdt", False), ("what", False)]
    before = [(sync.get_transfer_strategy(*each), sync.get_vllm_receive_backend(*each)) for each in asked]
    for _ in range(2):
        register()
    assert [(sync.get_transfer_strategy(*each), sync.get_vllm_receive_backend(*each)) for each in asked] == before
    for colocated in (False, True):
        assert sync.get_vllm_receive_backend("weightcast", colocated) == "weightcast"
        assert early.get_transfer_strategy("weightcast", colocated) == "weightcast", "imported before"


def test_a_draft_model_is_refused(sync: Any) -> None:
    from skyrl.backends.skyrl_train.weight_sync.weight_senders import build_trainer_engine
    from skyrl.train.config import InferenceEngineConfig

    from weightcast.integrations.skyrl import register

    register()
    config = InferenceEngineConfig(weight_sync_backend="weightcast", model_dtype="bfloat16")
    config.speculative_config = {"method": "mtp"}
    with pytest.raises(Unsupported, match="draft model") as refused:
        build_trainer_engine(
            ie_cfg=config,
            colocate_all=False,
            rank=0,
            inference_world_size=1,
            source_factory=lambda dtype, backend: [],
            draft_source_factory=lambda dtype: [],
            server_urls=["http://127.0.0.1:1"],
            data_parallel_size=1,
        )
    assert "speculative_config=null" in str(refused.value)


def test_the_entry_point_reaches_every_process(sync: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL calls the module that ``trainer.override_entrypoint`` names; its workers start with Ray's hook."""
    import ray
    from skyrl.train.utils import utils

    from weightcast.integrations import skyrl

    asked: dict[str, Any] = {}

    def train() -> None:
        asked["given"] = sys.argv[1:]
        ray.init(runtime_env={"env_vars": {"A": "1"}}, log_to_driver=True)
        asked["config"] = SimpleNamespace(
            generator=SimpleNamespace(inference_engine=SimpleNamespace(weight_sync_backend="weightcast", backend="x"))
        )
        with pytest.raises(AssertionError, match="only vllm is supported"):
            utils.validate_megatron_cfg(asked["config"])

    monkeypatch.setitem(sys.modules, "skyrl.train.entrypoints.main_base", SimpleNamespace(main=train))  # type: ignore[arg-type]
    monkeypatch.setattr(ray, "init", lambda **given: asked.update(ray=given))
    monkeypatch.setattr(utils, "validate_megatron_cfg", utils.validate_megatron_cfg)
    monkeypatch.setattr(sys, "argv", ["x", "trainer.override_entrypoint=weightcast.integrations.skyrl", "a=b"])
    skyrl.main()
    assert asked["given"] == ["a=b"]
    hook = asked["ray"]["runtime_env"]["worker_process_setup_hook"]
    assert asked["ray"]["runtime_env"]["env_vars"] == {"A": "1"}
    module, _, name = hook.rpartition(".")
    assert getattr(sys.modules[module], name) is skyrl.register
    assert asked["config"].generator.inference_engine.weight_sync_backend == "weightcast"
