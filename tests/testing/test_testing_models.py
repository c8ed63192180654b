"""Tiny models: complete checkpoints that load, vary and differ by seed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from weightcast.errors import InvalidInput
from weightcast.testing.models import ARCHS, build_tiny_model, random_state_dict, save_checkpoint
from weightcast.testing.tokenizer import EOS_ID, PAD_ID, VOCAB_SIZE, build_tokenizer


def _generate(folder, prompt):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.generation_config.eos_token_id = None
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "gpt_oss"])
def test_greedy_tokens_vary_and_differ_by_seed(arch, tmp_path):
    tokens = [_generate(build_tiny_model(tmp_path / str(seed), arch, seed=seed), [5, 80, 33]) for seed in (11, 12)]
    assert all(len(set(output)) >= 3 for output in tokens)
    assert tokens[0] != tokens[1]


def test_equal_seeds_give_equal_bytes_and_no_seed_gives_fresh_ones(tmp_path):
    folders = [build_tiny_model(tmp_path / str(i), "qwen3_moe", seed=seed) for i, seed in enumerate((3, 3, None, None))]
    files = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]
    assert len(set(files)) == 3


def test_random_state_dict_has_the_names_of_the_checkpoint(tmp_path):
    folder = build_tiny_model(tmp_path, "qwen3_moe", dtype="bfloat16")
    fresh, stored = random_state_dict(folder), load_file(folder / "model.safetensors")
    forms = [{name: (t.dtype, t.shape) for name, t in tensors.items()} for tensors in (fresh, stored)]
    assert forms[0] == forms[1]
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in fresh
    assert fresh["model.norm.weight"].dtype == torch.bfloat16


def test_tied_changes_the_checkpoint(tmp_path):
    untied = random_state_dict(build_tiny_model(tmp_path / "a", "qwen3_tied", tied=False))
    tied = random_state_dict(build_tiny_model(tmp_path / "b", "qwen3", tied=True))
    assert set(untied) - set(tied) == {"lm_head.weight"}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_save_checkpoint_loads_with_the_given_weights(tmp_path, num_shards):
    first = build_tiny_model(tmp_path / "first", "llama")
    weights = random_state_dict(first)
    second = save_checkpoint(tmp_path / "second", weights, like=first, num_shards=num_shards)
    loaded = AutoModelForCausalLM.from_pretrained(second).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma2"])
def test_tokenizer_round_trips_and_knows_chat(tmp_path, arch):
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_model(tmp_path, arch))
    text = "the rain in Späin \N{SNOWMAN}\n  12+3"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (VOCAB_SIZE, EOS_ID, PAD_ID)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi<|assistant|>"


def test_every_id_has_text():
    tokenizer = build_tokenizer()
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))


def test_overrides_reach_the_config_and_unknown_ones_are_refused(tmp_path):
    folder = build_tiny_model(tmp_path / "a", "qwen3", num_hidden_layers=3)
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 3
    with pytest.raises(InvalidInput, match="no field 'num_layerz'"):
        build_tiny_model(tmp_path / "b", "qwen3", num_layerz=3)
    with pytest.raises(InvalidInput, match="unknown arch"):
        build_tiny_model(tmp_path / "c", "bert")
