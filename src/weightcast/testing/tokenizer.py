"""A small byte-level BPE tokenizer built in memory: every text has tokens, every id below VOCAB_SIZE has text."""

from __future__ import annotations

from typing import Any

_PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le "
    "ve co me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur"
)
_MERGES = [(pair[0], pair[1]) for pair in _PAIRS.split()] + [("Ġ", "th"), ("Ġth", "e"), ("in", "g"), ("Ġ", "a")]
# Loading for Qwen2 adds "<|endoftext|>" where it is absent, so that is the eos.
_SPECIALS = ("<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")

PAD_ID = 256 + len(_MERGES)
EOS_ID = PAD_ID + 1
VOCAB_SIZE = PAD_ID + len(_SPECIALS)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """A transformers fast tokenizer with eos, pad and a chat template (roles system, user, assistant)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in _MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
