"""One worker of vLLM: wrong calls have answers, and an engine whose weights are of no version takes no request until it is healed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.vllm import offline
from tests.vllm.weights import replace

from weightcast import Publisher
from weightcast.engines.vllm import api
from weightcast.errors import InvalidInput, PlanMismatch, RoundFailed, StateError, Unsupported, WakeFailed
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint
from weightcast.trainer.clients import VllmClient


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "m", "qwen3", dtype="bfloat16", head_dim=32)


def test_every_call_has_an_answer_and_none_raises(model: Path) -> None:
    with offline.engine(model) as llm:

        def call(*arguments: Any) -> dict[str, Any]:
            (answer,) = llm.collective_rpc("weightcast_call", args=arguments)
            return dict(answer)

        for wrong in (("init", ["x"]), ("init", "x"), ("init", {}), ("update", 7), ("no such call", {})):
            assert call(*wrong)["error"]["kind"] == "InvalidInput", wrong
        assert call("shutdown")["error"] is None, "leaving when nobody was joined is no error"
        assert call("hold", {"held": True})["held"]
        assert call("status")["held"]
        assert not call("hold", {"held": False})["held"]
        norm = random_state_dict(model)["model.norm.weight"]
        only = {"tensors": [{"name": "model.norm.weight", "dtype": "bfloat16", "shape": list(norm.shape)}]}
        assert call("update", 7)["error"]["kind"] == "InvalidInput"
        for question, kind in (
            (("checksums", {}), ""),
            (("digests", {}), "InvalidInput"),
            (("digests", {"tensors": [{"name": 1}]}), "InvalidInput"),
            (("digests", only), "PlanMismatch"),
        ):
            assert (call(*question)["error"] or {}).get("kind", "") == kind, question
            assert call("status")["error"]["kind"] == "InvalidInput", (
                "asking does not hide what became of the last update"
            )
        call("shutdown")
        worker = llm.llm_engine.model_executor.driver_worker.worker
        backend, worker.weight_transfer_engine = worker.weight_transfer_engine, None
        assert call("status")["error"]["kind"] == "StateError"
        worker.weight_transfer_engine = backend
        assert call("status")["error"] is None

        loaded = worker.get_model()
        loaded._do_torchao_reload = True
        with pytest.raises(KeyError), api.layerwise_reload(loaded, worker.vllm_config):
            raise KeyError
        assert loaded._do_torchao_reload is True, "a reload that ends early puts back what it switched off"


def test_a_dirty_engine_takes_no_request_until_it_is_healed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_state_dict(model)
    with offline.engine(model) as llm, Publisher(weights, [llm], timeout_s=60, mode="in_place") as publisher:
        publisher.publish()
        worker = llm.llm_engine.model_executor.driver_worker.worker

        def stumble() -> None:
            raise RuntimeError("no memory left")

        with monkeypatch.context() as patch:
            patch.setattr(worker.weight_transfer_engine.calls.engine.model, "refresh", stumble)
            with pytest.raises(RoundFailed, match="no memory left") as caught:
                publisher.publish()
        assert len(caught.value.dirty) == 1
        with pytest.raises(StateError, match=r"publish\(\)"):
            offline.answers(llm)
        report = publisher.publish()
        assert llm.get_weight_version() == report.version
        offline.answers(llm)


def test_a_model_of_another_size_is_a_mismatch(model: Path, tmp_path: Path) -> None:
    wide = build_tiny_model(tmp_path / "wide", "qwen3", dtype="bfloat16", head_dim=32, intermediate_size=144)
    tall = build_tiny_model(tmp_path / "tall", "qwen3", dtype="bfloat16", head_dim=32, vocab_size=640)
    with offline.engine(model) as llm:
        served = offline.answers(llm)
        for other in (wide, tall):
            with (
                Publisher(random_state_dict(other), [llm], timeout_s=60) as publisher,
                pytest.raises(
                    PlanMismatch,
                    match=r"(refuses a tensor of this form|land only in part).*(Publish|Give) the model that the engine serves",
                ) as told,
            ):
                publisher.connect()
            assert "Traceback" not in "".join(
                [str(told.value), told.value.remote_trace, *getattr(told.value, "__notes__", [])]
            )
        assert offline.answers(llm) == served


def test_tensors_without_a_place_and_tied_ones_with_other_values_are_refused(tmp_path: Path) -> None:
    """More layers, biases, a value head; the reverse; two values for the weight that embedding and head share."""

    def build(name: str, arch: str = "qwen3", **more: Any) -> Path:
        return build_tiny_model(tmp_path / name, arch, dtype="bfloat16", head_dim=32, **more)

    two, four, biased = build("two"), build("four", num_hidden_layers=4), build("biased", attention_bias=True)
    head = {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}
    with offline.engine(two) as llm:
        served = offline.answers(llm)
        for more, pattern in (
            (random_state_dict(four), "model.layers.[23].*"),
            (random_state_dict(biased), "*.bias"),
            ({**random_state_dict(two), **head}, "v_head.*"),
        ):
            with Publisher(more, [llm], timeout_s=60) as publisher:
                with pytest.raises(PlanMismatch, match="no place for") as refused:
                    publisher.publish()
                lost = set(more) - set(random_state_dict(two))
                assert f"{len(lost)} of {len(more)} published tensors" in refused.value.message
            assert offline.answers(llm) == served
            with Publisher(more, [llm], unused=[pattern], timeout_s=60) as publisher:
                assert set(publisher.publish().unused) == lost
            with Publisher({n: t for n, t in more.items() if n not in lost}, [llm], timeout_s=60) as publisher:
                left_out = offline.answers(llm)
                publisher.publish()
                assert offline.answers(llm) == left_out, "what was left out made no difference"
            served = left_out
    for engine in (four, biased):
        with (
            offline.engine(engine) as llm,
            Publisher(random_state_dict(two), [llm], timeout_s=60) as publisher,
            pytest.raises(PlanMismatch, match="does not fill"),
        ):
            publisher.publish()
    tied = build("tied", "qwen3_tied")
    weights = random_state_dict(tied)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    with offline.engine(tied) as llm, Publisher(weights, [llm], timeout_s=60) as publisher:
        publisher.publish()
        served = offline.answers(llm)
        weights["lm_head.weight"].view(-1)[0] += 1
        with pytest.raises(RoundFailed, match=r"lm_head\.weight.*model\.embed_tokens\.weight"):
            publisher.publish()
        assert offline.answers(llm) == served


def test_one_engine_given_twice_is_told(model: Path) -> None:
    with offline.engine(model) as llm:
        with pytest.raises(InvalidInput, match="are one engine"):
            Publisher(random_state_dict(model), [llm, llm], timeout_s=60)
        with Publisher(random_state_dict(model), [llm], timeout_s=60) as publisher:
            assert publisher.publish().digests_match
            other = VllmClient(llm)
            other.target = None
            for engine in (llm, other):
                with pytest.raises(StateError, match="are one engine"):
                    publisher.add(engine)
                assert publisher.publish().digests_match


def scripted_memory() -> dict[int, SimpleNamespace]:
    """What vLLM's allocator records of weights, and of keys and values."""
    return {
        number: SimpleNamespace(tag=tag, is_asleep=False, handle=(0, 1 << 20, number, 0))
        for number, tag in ((1, "weights"), (2, "kv_cache"))
    }


def test_a_worker_that_sleeps_touches_nothing_and_leaves(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU workers do not sleep: the allocator is scripted, and vLLM's call is the one that its GPU worker would get."""
    from vllm.device_allocator.cumem import CuMemAllocator
    from vllm.v1.worker.gpu_worker import Worker

    memory = scripted_memory()
    monkeypatch.setattr(CuMemAllocator, "instance", SimpleNamespace(pointer_to_data=memory))
    weights = random_state_dict(model)
    with offline.engine(model) as llm, Publisher(weights, [llm], timeout_s=60) as publisher:
        assert hasattr(Worker.sleep, "_weightcast_heard")
        backend = llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine

        def status() -> tuple[str, bool, tuple[str, ...]]:
            (answer,) = llm.collective_rpc("weightcast_call", args=("status", {}))
            return answer["weight_version"], answer["dirty"], tuple(answer["asleep"])

        for level in (1, 2):
            version = publisher.publish().version
            before = offline.answers(llm)
            backend.calls.before_sleep(loses=level >= 2)
            assert not backend.calls.engine.receiver.has_session
            for data in memory.values():
                data.is_asleep = True
            assert status() == (*((version, False) if level == 1 else ("none", True)), ("kv_cache", "weights"))
            with pytest.raises(RoundFailed, match="asleep"):
                publisher.publish()
            (answer,) = llm.collective_rpc("weightcast_call", args=("checksums", {}))
            assert answer["error"]["kind"] == "StateError"
            memory[1].is_asleep = False
            if level == 1:
                assert offline.answers(llm) == before
            replace(weights, model)
            version = publisher.publish().version
            assert status() == (version, False, ("kv_cache",))
            assert offline.answers(llm) != before
            memory[2].is_asleep = False


def test_one_call_wakes_publishes_releases_and_lets_vllm_go_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own order of things: its core pauses the scheduler to sleep, and lets it go on when nothing sleeps any more."""
    from vllm.device_allocator.cumem import CuMemAllocator

    memory = scripted_memory()
    monkeypatch.setattr(CuMemAllocator, "instance", SimpleNamespace(pointer_to_data=memory))
    weights = random_state_dict(model)
    with offline.engine(model) as llm, Publisher(weights, [llm], timeout_s=60) as publisher:
        with pytest.raises(Unsupported, match="without sleep mode"):
            publisher.publish(wake=True)
        publisher.publish()
        llm.llm_engine.vllm_config.model_config.enable_sleep_mode = True
        worker = llm.llm_engine.model_executor.driver_worker.worker
        core = llm.llm_engine.engine_core.engine_core

        def sleep(level: int = 1) -> None:
            worker.weight_transfer_engine.calls.before_sleep(loses=level >= 2)
            for data in memory.values():
                data.is_asleep = True

        def wake_up(tags: list[str] | None = None) -> None:
            for data in memory.values():
                assert data.is_asleep or data.tag not in (tags or ()), "vLLM 0.26 would map it twice"
                data.is_asleep = data.is_asleep and tags is not None and data.tag not in tags

        monkeypatch.setattr(worker, "sleep", sleep)
        monkeypatch.setattr(worker, "wake_up", wake_up)
        released = 0

        def release() -> None:
            nonlocal released
            released += 1
            assert core.is_scheduler_paused()
            assert not worker.weight_transfer_engine.calls.engine.receiver.has_session
            assert [data.is_asleep for data in memory.values()] == [False, True]

        seen = [offline.answers(llm)]
        for level in (2, 1, 2):
            llm.sleep(level=level)
            replace(weights, model)
            if level == 1:
                with pytest.raises(WakeFailed, match="no room"):
                    publisher.publish(wake=True, release=lambda: (_ for _ in ()).throw(MemoryError("no room")))
                assert core.is_scheduler_paused()
            report = publisher.publish(wake=True, release=release)
            assert report.digests_match
            assert not core.is_scheduler_paused()
            (answer,) = llm.collective_rpc("weightcast_call", args=("status", {}))
            assert (answer["weight_version"], answer["dirty"], list(answer["asleep"])) == (report.version, False, [])
            seen.append(offline.answers(llm))
            assert all(seen[-1] != before for before in seen[:-1])
        assert released == 3
    path = save_checkpoint(model.parent / "fresh", weights, like=model)
    with offline.engine(path) as llm:
        assert offline.answers(llm) == seen[-1]
