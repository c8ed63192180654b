"""The policy: a Qwen3 of 0.6 million parameters, built from its config, and the folder that a server starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from weightcast.errors import Unsupported
from weightcast_demo import task

MAX_LENGTH = 64


def policy_config() -> Any:
    """The Qwen3Config of the policy; a fresh object at each call, as modelling code writes into it."""
    try:
        from transformers import Qwen3Config
    except ImportError:
        raise Unsupported("the demo needs transformers", hint="pip install 'weightcast[server]'") from None
    return Qwen3Config(
        vocab_size=len(task.ALPHABET),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=task.BEGIN,
        eos_token_id=task.END,
        pad_token_id=task.PAD,
        architectures=["Qwen3ForCausalLM"],
        dtype=torch.float32,
    )


def build_policy(seed: int) -> Any:
    """A freshly initialised policy in float32; equal seeds give equal weights. Leaves torch's global generator as it was."""
    from transformers import Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(policy_config())


def save_folder(folder: Path) -> None:
    """Write config and tokenizer, and no weights: a server that starts from it waits for them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    policy_config().save_pretrained(folder)
    GenerationConfig(eos_token_id=task.END, pad_token_id=task.PAD).save_pretrained(folder)
    vocabulary = {character: number for number, character in enumerate(task.ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="?",
        bos_token="^",
        eos_token=".",
        pad_token="_",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def answer_scores(model: Any, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all tokens at each place of the answers, float32 [rows, answer, vocabulary].

    Prompts all have one length; short answers are padded on the right, and what is returned there has no meaning.
    """
    first = prompts.shape[1] - 1
    inputs = torch.cat([prompts, tokens[:, :-1]], dim=1)
    logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits[:, first:]
    return logits.float().log_softmax(-1)


def chosen(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of ``answer_scores``, those of the answers' own tokens."""
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def answer_logprobs(model: Any, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each answer token given its prompt and the tokens before it, float32 like ``tokens``."""
    return chosen(answer_scores(model, prompts, tokens), tokens)
