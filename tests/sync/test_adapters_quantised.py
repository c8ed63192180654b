"""Adapters around layers that bitsandbytes has quantised: what is published is what PEFT merges into the dequantised model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from tiny_adapters import assert_same, learn, lora, merged, published
from torch import nn

from weightcast import Publisher
from weightcast.errors import Unsupported
from weightcast.sources import make_source
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def quantised(folder: Path, bits: int) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**(four if bits == 4 else {"load_in_8bit": True}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)


def dequantise(model: nn.Module) -> None:
    """Put a plain layer in the place of each quantised one, by bitsandbytes' own functions."""
    for part in model.modules():
        for name, layer in part.named_children():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
                scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
                weight = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, scales)
            else:
                continue
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            setattr(part, name, plain)


@pytest.mark.parametrize(("bits", "options"), [(4, {}), (4, {"use_dora": True}), (8, {})])
def test_quantised_base_layers_are_published_dequantised(bits: int, options: dict[str, Any], tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3", "bfloat16", hidden_size=64)
    model, alike = quantised(folder, bits), quantised(folder, bits)
    dequantise(alike)
    model, alike = (get_peft_model(each, lora(init_lora_weights=False, **options)) for each in (model, alike))
    model.train()  # as it learns; in a forward pass of another kind bitsandbytes rounds scales on some processors
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), lr=0.05)
    engine = LocalEngine("e", [DictModel(merged(alike))])
    try:
        with Publisher(model, [engine], timeout_s=30) as publisher:
            for _ in range(3):
                learn(model, optimizer)
                publisher.connect()  # on a CPU the first time moves parameters to memory that is shared
                then = [(id(v), v.data_ptr(), v.requires_grad, v.dtype) for v in model.parameters()]
                bytes_then = {name: value.detach().clone().data for name, value in model.named_parameters()}
                trained = {n: v for n, v in model.named_parameters() if v.requires_grad}
                alike.load_state_dict(trained, strict=False)
                report = publisher.publish()
                assert_same(engine.models[0].parameters(), merged(alike))
                assert report.own_nbytes > 0
                assert then == [(id(v), v.data_ptr(), v.requires_grad, v.dtype) for v in model.parameters()]
                assert_same({name: value.data for name, value in model.named_parameters()}, bytes_then)
    finally:
        engine.stop()


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_forward_pass_packed_for_the_processor_is_published_with_the_scales_that_it_rounded(
    nested: bool,
) -> None:
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs nothing for this processor")
    layer = bitsandbytes.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = bitsandbytes.nn.Params4bit(
        torch.randn(96, 64, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=nested, requires_grad=False
    ).to("cpu")
    model = get_peft_model(nn.Sequential(layer), lora(target_modules=["0"], init_lora_weights=False)).eval()
    data, state = layer.weight.data.clone(), copy.deepcopy(layer.weight.quant_state)
    if nested:
        state.absmax = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested = False
    state.absmax = state.absmax.to(torch.bfloat16).float()
    with torch.no_grad(), model.disable_adapter():
        model(torch.randn(1, 64, dtype=torch.bfloat16))
        assert layer.weight.quant_state.packing_format_for_cpu
        source = make_source(model)
        source.refresh()
    (found,) = published(source).values()
    assert torch.equal(found, bitsandbytes.functional.dequantize_4bit(data, state))
    assert layer.weight.quant_state.packing_format_for_cpu


def test_other_adapters_around_quantised_layers_are_refused_by_name(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "m", "qwen3", "bfloat16", hidden_size=64)
    model = get_peft_model(quantised(folder, 4), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(Unsupported, match=r"layers\.0\.self_attn\.q_proj.*quantised"):
        make_source(model)
