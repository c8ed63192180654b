"""A stock vLLM engine that sleeps on a GPU: rounds into it are refused and it lives, rounds after it are exact, and no memory stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_vllm import DIMENSIONS, answers, engine, tiny_model

from weightcast import Publisher
from weightcast.errors import RoundFailed, StateError
from weightcast.testing.models import build_tiny_model, random_state_dict, save_checkpoint

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("triton", reason="needs a CUDA build of torch")

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("default"), pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


TOLERANCE = 50 << 20
SLEEPY = {"enable_sleep_mode": True}


def on_gpu(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in random_state_dict(path).items()}


def refill(weights: dict[str, torch.Tensor], path: Path) -> None:
    for name, tensor in random_state_dict(path).items():
        weights[name].copy_(tensor)


def in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


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
    """A model of about 500 MB in bf16: a shadow that stayed would be seen."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    large = build_tiny_model(tmp_path / "m", "qwen3", "bfloat16", **{**DIMENSIONS, **sizes})
    with engine(large, **SLEEPY) as llm:
        answers(llm)
        llm.sleep(level=2)
        torch.cuda.empty_cache()
        asleep = in_use()
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        module = AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16).cuda()
        nbytes = sum(parameter.nbytes for parameter in module.parameters())
        assert nbytes > 4 * TOLERANCE
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
