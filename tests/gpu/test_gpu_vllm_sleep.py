"""A stock vLLM engine that sleeps on a GPU: rounds into it are refused and it lives, rounds after it are exact, and no memory stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from card import TOLERANCE, change, in_use, large_model, module_of, until_in_use_is_below
from gpu_vllm import answers, engine, tiny_model, vllm_server
from tests.support.verified import comparison

from weightcast import Publisher
from weightcast.errors import RoundFailed, StateError
from weightcast.testing.models import random_state_dict, save_checkpoint

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton", reason="needs a CUDA build of torch")

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


SLEEPY = {"enable_sleep_mode": True}


def on_gpu(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in random_state_dict(path).items()}


def refill(weights: dict[str, torch.Tensor], path: Path) -> None:
    for name, tensor in random_state_dict(path).items():
        weights[name].copy_(tensor)


def served(llm: Any) -> dict[str, Any]:
    (outcome,) = llm.collective_rpc("weightcast_call", args=("status", {}))
    return dict(outcome)


def expected(folder: Path, weights: dict[str, torch.Tensor], like: Path) -> list[list[int]]:
    """What a fresh load of these weights answers."""
    path = save_checkpoint(folder, {name: tensor.cpu() for name, tensor in weights.items()}, like=like)
    with engine(path) as llm:
        return answers(llm)


@pytest.mark.parametrize("mode", ["in_place", "staged"])
@pytest.mark.parametrize("level", [1, 2])
def test_rounds_around_a_sleep(tmp_path: Path, mode: str, level: int) -> None:
    path = tiny_model(tmp_path / "m", "qwen3")
    got, sets = [], []
    with engine(path, **SLEEPY) as llm:
        weights = on_gpu(path)
        with Publisher(weights, [llm], timeout_s=60, mode=mode) as publisher:
            version = publisher.publish().version
            before = answers(llm)
            for number in range(2):
                llm.sleep(level=level)
                refill(weights, path)
                with pytest.raises((RoundFailed, StateError), match="asleep"):
                    publisher.publish()
                outcome = served(llm)
                wanted = (version, False) if level == 1 else ("none", True)
                assert (outcome["weight_version"], outcome["dirty"]) == wanted
                assert "weights" in outcome["asleep"]
                if level == 1 and number == 0:
                    llm.wake_up()
                    assert answers(llm) == before, "it serves what it served"
                    llm.sleep(level=level)
                llm.wake_up(["weights"])
                version = publisher.publish().version
                outcome = served(llm)
                assert (outcome["weight_version"], outcome["dirty"]) == (version, False)
                assert outcome["asleep"], "keys and values sleep on"
                llm.wake_up(["kv_cache"])
                got.append(answers(llm))
                sets.append({name: tensor.cpu().clone() for name, tensor in weights.items()})
    assert got[0] != got[1]
    for number, values in enumerate(sets):
        assert expected(tmp_path / f"fresh-{number}", values, path) == got[number]


@pytest.mark.parametrize("mode", ["in_place", "staged"])
def test_no_memory_stays_in_its_sleep(tmp_path: Path, mode: str) -> None:
    large = large_model(tmp_path / "m")
    with engine(large, **SLEEPY) as llm:
        answers(llm)
        llm.sleep(level=2)
        torch.cuda.empty_cache()
        asleep = in_use()
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        module, nbytes = module_of(large)
        torch.cuda.empty_cache()
        awake = in_use()
        with Publisher(module, [llm], timeout_s=120, mode=mode) as publisher:
            publisher.publish()
            if mode == "staged":
                assert in_use() - awake > nbytes - TOLERANCE, "the shadow is seen"
            llm.sleep(level=2)
            slept = in_use() - nbytes
            assert slept - asleep < TOLERANCE, f"{slept - asleep} bytes stay in its sleep"
            llm.wake_up(["weights"])
            publisher.publish()
            llm.wake_up(["kv_cache"])
            answers(llm)


@pytest.mark.parametrize("mode", ["in_place", "staged"])
def test_no_memory_stays_when_trainers_have_left(tmp_path: Path, mode: str) -> None:
    """Neither awake nor asleep has the card more in use than with an engine that never met a trainer."""
    large = large_model(tmp_path / "m")
    with engine(large, **SLEEPY) as llm:
        answers(llm)
        llm.sleep(level=2)
        torch.cuda.empty_cache()
        asleep = in_use()
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        module, nbytes = module_of(large)
        torch.cuda.empty_cache()
        awake = in_use()
        for _ in range(2):
            change(module)
            torch.cuda.empty_cache()
            with Publisher(module, [llm], timeout_s=120, mode=mode) as publisher:
                publisher.publish()
                if mode == "staged":
                    assert in_use() - awake > nbytes - TOLERANCE, "the shadow is seen"
            until_in_use_is_below(awake + TOLERANCE)
            answers(llm)
        llm.sleep(level=2)
        until_in_use_is_below(asleep + nbytes + TOLERANCE)


@pytest.mark.parametrize(("level", "mode"), [(2, "auto"), (1, "auto"), (2, "staged")])
def test_one_call_around_a_sleep(tmp_path: Path, level: int, mode: str) -> None:
    large = large_model(tmp_path / "m")
    module, nbytes = module_of(large)
    got, sets = [], []
    with engine(large, **SLEEPY) as llm:
        before = answers(llm)
        with Publisher(module, [llm], timeout_s=120, mode=mode) as publisher:
            for _ in range(2):
                llm.sleep(level=level)
                values = change(module)
                seen: dict[str, Any] = {}

                def release(seen: dict[str, Any] = seen) -> None:
                    seen["asleep"] = served(llm)["asleep"]
                    held = in_use()
                    module.to("cpu")
                    torch.cuda.empty_cache()
                    seen["freed"] = held - in_use()

                report = publisher.publish(wake=True, release=release)
                assert report.digests_match
                assert "kv_cache" in seen["asleep"]
                assert "weights" not in seen["asleep"]
                assert seen["freed"] > nbytes - TOLERANCE, "the trainer's memory is really free"
                outcome = served(llm)
                assert (outcome["weight_version"], outcome["dirty"]) == (report.version, False)
                assert not outcome["asleep"]
                got.append(answers(llm))
                sets.append(values)
                module.to("cuda")
    assert got[0] != got[1]
    assert before not in got
    module.to("cpu")
    for number, values in enumerate(sets):
        assert expected(tmp_path / f"fresh-{number}", values, large) == got[number]


def test_one_call_into_a_server_that_sleeps(tmp_path: Path) -> None:
    """Its worker maps the trainer's memory from a process of its own: it has to let go of that for it to be freed."""
    large = large_model(tmp_path / "m")
    options = ("--enable-sleep-mode", "--enforce-eager")
    with vllm_server(large, "weightcast", *options, VLLM_SERVER_DEV_MODE="1") as server:
        token = server.token  # type: ignore[attr-defined]

        def fall_asleep() -> None:
            httpx.post(f"{server.url}/sleep?level=2", timeout=60, trust_env=False).raise_for_status()
            info = httpx.get(f"{server.url}/weight_info", timeout=10, trust_env=False).json()
            assert info["weight_version"] == "none"
            status = httpx.get(f"{server.url}/weightcast/status", timeout=10, trust_env=False).json()
            assert (status["weight_version"], status["ready"]) == ("none", False)

        fall_asleep()
        asleep = in_use()
        module, nbytes = module_of(large)
        with Publisher(module, [server.url], token=token, timeout_s=100) as publisher:
            for number in range(2):
                if number:
                    fall_asleep()
                values = change(module)
                freed: list[int] = []

                def release(freed: list[int] = freed) -> None:
                    held = in_use()
                    module.to("cpu")
                    torch.cuda.empty_cache()
                    freed.append(held - in_use())

                report = publisher.publish(wake=True, release=release)
                assert report.digests_match
                assert freed[0] > nbytes - TOLERANCE
                assert comparison(
                    server.url, token, save_checkpoint(tmp_path / f"v{number}", values, like=large)
                ).proven
                server.answers()
                module.to("cuda")
        module.to("cpu")
        torch.cuda.empty_cache()
        fall_asleep()
        until_in_use_is_below(asleep + 4 * TOLERANCE)
