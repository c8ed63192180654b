"""TRL's trainers, each by one line of weightcast's: after every step the server serves what the trainer would save."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tests.frameworks.served import Served
from tests.frameworks.trl_async import Rollouts, on_a_cpu
from tests.frameworks.trl_ranks import train_both_ways
from tests.frameworks.trl_runs import GROUP, PROMPTS, STEPS, After, grpo, rollouts
from tests.support.ports import HeldPort
from transformers import AutoTokenizer

from weightcast.errors import StateError, Unsupported
from weightcast.integrations.trl import PublishCallback, WeightTransfer, use_in_server_mode
from weightcast.testing.models import save_checkpoint
from weightcast.testing.ranks import run_ranks


@pytest.fixture(autouse=True)
def _no_versions_yet(served: Served) -> None:
    served.versions.clear()


@pytest.fixture
def server_mode(served: Served) -> Iterator[dict[str, Any]]:
    """TRL's config of server mode; what weightcast replaced is put back."""
    from trl.generation import vllm_client, vllm_generation

    kept = [(module, name, getattr(module, name)) for module in (vllm_client, vllm_generation) for name in PLACES]
    yield {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": served.url}
    for module, name, value in kept:
        setattr(module, name, value)


PLACES = ("VLLMClient", "is_vllm_available")


def test_the_callback_publishes_before_the_first_step_and_after_each(served: Served, tmp_path: Path) -> None:
    publish = PublishCallback([served.url], token=served.token)
    callbacks = [publish, After(served.holds_model)]
    grpo(served, tmp_path, callbacks=callbacks, rollout_func=rollouts(served)).train()
    assert len(served.versions) == len(set(served.versions)) == STEPS + 1
    with pytest.raises(StateError, match="while its trainer trains"):
        _ = publish.publisher


def test_the_callback_publishes_merged_adapters(served: Served, tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    callbacks = [
        PublishCallback([served.url], token=served.token),
        After(lambda model: served.holds_model(copy.deepcopy(model).merge_and_unload())),
    ]
    grpo(served, tmp_path, callbacks=callbacks, rollout_func=rollouts(served), peft_config=adapter).train()
    assert len(set(served.versions)) == STEPS + 1


def test_server_mode_generates_with_what_it_published(
    served: Served, tmp_path: Path, server_mode: dict[str, Any]
) -> None:
    use_in_server_mode(token=served.token)
    trainer = grpo(served, tmp_path, callbacks=[], **server_mode)
    _verify_each_sync(trainer, served)
    trainer.train()
    trainer.vllm_generation.vllm_client.close_communicator()
    assert len(served.versions) == len(set(served.versions)) == STEPS
    # On-policy and exact: what the engine sampled has the probabilities that the trainer computes.
    ratios = [entry for entry in trainer.state.log_history if "sampling/importance_sampling_ratio/mean" in entry]
    assert len(ratios) == STEPS
    for entry in ratios:
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1.0, abs=1e-3)
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3


def test_server_mode_publishes_merged_adapters(served: Served, tmp_path: Path, server_mode: dict[str, Any]) -> None:
    use_in_server_mode(token=served.token)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = grpo(served, tmp_path, callbacks=[], peft_config=adapter, **server_mode)
    _verify_each_sync(trainer, served)
    trainer.train()
    trainer.vllm_generation.vllm_client.close_communicator()
    assert len(set(served.versions)) == STEPS


@pytest.mark.parametrize("adapters", [False, True])
def test_async_grpo_samples_from_what_it_published(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    on_a_cpu(monkeypatch)
    transfer = WeightTransfer([served.url], token=served.token)
    config = AsyncGRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        max_steps=STEPS,
        max_staleness=0,
        token_budget=24 * GROUP,
        learning_rate=1e-2,
        dtype="float32",
        vllm_server_base_url=served.url,
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = AsyncGRPOTrainer(
        model=str(served.model),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(served.model),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]] * len(PROMPTS)}),
        weight_transfer=transfer,
        rollout_worker=Rollouts(served),
        peft_config=LoraConfig(r=4, init_lora_weights=False) if adapters else None,
    )
    send = transfer.send_weights

    def sent(iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if adapters else model  # TRL has merged the adapters into it for the send
        weights = {
            name.replace(".base_layer", ""): value.detach().clone()
            for name, value in model.named_parameters()
            if "lora_" not in name
        }
        send(iterator)
        served.holds(save_checkpoint(tmp_path / transfer.last_report.version, weights, like=served.model))

    monkeypatch.setattr(transfer, "send_weights", sent)
    trainer.train()
    assert len(served.versions) == len(set(served.versions)) == STEPS + 1
    # The first step learns from samples of the weights that it has; TRL fetches those of later steps before it syncs.
    first = next(entry for entry in trainer.state.log_history if "ratio" in entry)
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert abs(first["kl"]) < 1e-6


def test_another_trl_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.generation import vllm_client, vllm_generation

    with monkeypatch.context() as patched:
        patched.delattr(vllm_client.VLLMClient, "update_named_params")
        with pytest.raises(Unsupported, match=r"trl 1\.\d+.* has no .*VLLMClient\.update_named_params") as caught:
            use_in_server_mode()
        assert caught.value.hint == "pip install 'trl>=1.16'"
    monkeypatch.delattr(vllm_generation, "VLLMClient")
    with pytest.raises(Unsupported, match=r"has no trl\.generation\.vllm_generation:VLLMClient"):
        use_in_server_mode()


def test_two_processes_publish_together(served: Served, tmp_path: Path) -> None:
    with closing(HeldPort()) as port:
        number = port.number
    first, second = run_ranks(train_both_ways, 2, served, tmp_path, number, timeout_s=200)
    assert first == (STEPS + 1, 1)
    assert second == (0, 0)


def _verify_each_sync(trainer: Any, served: Served) -> None:
    """Behind each of TRL's syncs, compare what is live with the trainer's model, saved as it is: merged, where it has adapters."""
    generation = trainer.vllm_generation
    sync = generation.sync_weights

    def synced() -> None:
        model = copy.deepcopy(trainer.model)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
        sync()
        served.holds_model(model)
        for name, value in trainer.model.named_parameters():
            assert name not in before or torch.equal(value, before[name]), name

    generation.sync_weights = synced
