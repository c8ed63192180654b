"""Modules whose tensors are not those of their checkpoints: fused, transposed and renamed ones arrive as save_pretrained writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_modules import ARCHS, fill, new_model, random_seed, saved
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from weightcast import Publisher
from weightcast.engines.embedded import LLM
from weightcast.errors import Unsupported
from weightcast.sources import checkpoint_tensors, make_source
from weightcast.testing.local_engine import DictModel, LocalEngine
from weightcast.testing.models import build_tiny_model
from weightcast.testing.ranks import run_ranks


@pytest.mark.parametrize("arch", ARCHS)
def test_a_module_with_fused_experts_arrives_as_its_checkpoint(arch: str, tmp_path: Path) -> None:
    model = new_model(arch)
    start = saved(model, tmp_path)
    source = make_source(model)
    assert {(t.name, t.dtype, t.shape) for t in source.manifest.tensors} == {
        (name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in start.items()
    }
    engine = LocalEngine("e", [DictModel(start, rows=(rank, 2)) for rank in range(2)])
    try:
        with Publisher(model, [engine], timeout_s=20) as publisher:
            for _ in range(3):
                fill(model, random_seed())
                assert publisher.publish().digests_match
                truth = saved(model, tmp_path)
                assert all(worker.holds(truth) for worker in engine.models)
    finally:
        engine.stop()


def test_a_loaded_module_is_published_under_the_names_it_was_loaded_from(tmp_path: Path) -> None:
    """From a folder to the embedded engine, whose experts are fused as well, compared by what the engine's model saves."""
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model(tmp_path / "start", "qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    llm = LLM(str(folder), dtype="float32", device="cpu", max_model_len=64)
    try:
        with Publisher(model, [llm], timeout_s=20) as publisher:
            for number in range(3):
                fill(model, random_seed())
                assert publisher.publish().digests_match
                served = llm.run_between_steps(lambda: saved(llm.engine.model, tmp_path / "served"))
                truth = saved(model, tmp_path / "truth")
                assert list(served) == list(truth), number
                assert all(torch.equal(served[name], value) for name, value in truth.items())
    finally:
        llm.shutdown()


def sharded_by_rows(model: nn.Module) -> None:
    """FSDP2 as most use it: dimension 0, which here no number of ranks divides for experts."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def sharded_through_experts(model: nn.Module) -> None:
    """FSDP2 that cuts every expert along its second dimension where ranks divide that."""
    size = dist.get_world_size()

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.dim() == 3 and parameter.shape[1] % size == 0 else 0)

    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=place)
    fully_shard(model)


def sharded_by_hand(model: nn.Module) -> None:
    """DTensors cut unevenly along each tensor's last dimension."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            cut = distribute_tensor(value.detach(), mesh, [Shard(value.dim() - 1)])
            module.register_parameter(name, nn.Parameter(cut))


def publish_shards(
    rank: int, size: int, folder: str, cases: list[tuple[str, Callable[[nn.Module], None], str]]
) -> list[str]:
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    told = []
    for arch, shard, transport in cases:
        model, whole = new_model(arch), new_model(arch)
        shard(model)
        engines = []
        if rank == 0:
            start = saved(whole, Path(folder, "start"))
            engines = [LocalEngine("e", [DictModel(start, rows=(worker, 2)) for worker in range(2)])]
        try:
            with Publisher(
                model, engines, process_group=dist.group.WORLD, transport=transport, timeout_s=30
            ) as publisher:
                for _ in range(3):
                    seed = torch.tensor(random_seed())
                    dist.broadcast(seed, 0)
                    fill(model, int(seed))
                    report = publisher.publish()
                    assert report.digests_match
                    told.append(report.version)
                    if rank == 0:
                        fill(whole, int(seed))
                        truth = saved(whole, Path(folder, "truth"))
                        assert all(worker.holds(truth) for worker in engines[0].models), (arch, shard.__name__)
        finally:
            for engine in engines:
                engine.stop()
    dist.destroy_process_group()
    return told


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, [(arch, sharded_by_rows, "shm" if number % 2 else "tcp") for number, arch in enumerate(ARCHS)]),
        (2, [("qwen3_moe", sharded_through_experts, "tcp"), ("deepseek_v3", sharded_by_hand, "shm")]),
        (3, [("qwen3_moe", sharded_through_experts, "shm"), ("mixtral", sharded_by_hand, "tcp")]),
    ],
)
def test_shards_of_fused_experts_arrive_as_the_checkpoint(
    tmp_path: Path, size: int, cases: list[tuple[str, Callable[[nn.Module], None], str]]
) -> None:
    told = run_ranks(publish_shards, size, str(tmp_path), cases, timeout_s=110)
    assert len(set(told[0])) == 3 * len(cases)
    assert all(versions == told[0] for versions in told)


def conversion(model: Any, operation: Any) -> None:
    """Have the model believe that its head was loaded through one operation."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    head = WeightConverter(r"lm_head\.weight", "lm_head.weight", operations=[operation])
    model._weight_conversions = [*get_model_conversion_mapping(model, add_legacy=False), head]


def operations() -> list[Any]:
    from transformers.core_model_loading import Interleave, PermuteForRope, Transpose

    return [Interleave(dim=0), Interleave(dim=0, inverse=True), Interleave(dim=1), PermuteForRope(), Transpose()]


@pytest.mark.parametrize("number", range(5))
def test_what_a_conversion_only_moves_is_published_in_place(number: int, tmp_path: Path) -> None:
    model = new_model("olmoe")
    conversion(model, operations()[number])
    engine = LocalEngine("e", [DictModel(saved(model, tmp_path))])
    try:
        with Publisher(model, [engine], timeout_s=20) as publisher:
            for _ in range(3):
                fill(model, random_seed())
                publisher.publish()
                assert engine.models[0].holds(saved(model, tmp_path))
                assert not torch.equal(engine.models[0].parameters()["lm_head.weight"], model.lm_head.weight)
    finally:
        engine.stop()


def test_what_a_conversion_computes_is_refused_by_name_with_a_way_that_works(tmp_path: Path) -> None:
    from transformers.core_model_loading import ConversionOps

    class Halved(ConversionOps):
        def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
            (values,) = input_dict.values()
            return {target_patterns[0]: values[0] * 0.5}

        @property
        def reverse_op(self) -> ConversionOps:
            return self

    model = new_model("olmoe")
    conversion(model, Halved())
    with pytest.raises(
        Unsupported, match=r"'lm_head\.weight' is computed from lm_head\.weight \(used by mul"
    ) as caught:
        make_source(model)
    assert "__getitem__" in str(caught.value)

    truth = saved(model, tmp_path)
    model._weight_conversions = None
    views = checkpoint_tensors(model)

    class Made(Mapping[str, torch.Tensor]):
        """What the hint says."""

        def __getitem__(self, name: str) -> torch.Tensor:
            return views[name] * 0.5 if name == "lm_head.weight" else views[name]

        def __iter__(self) -> Iterator[str]:
            return iter(views)

        def __len__(self) -> int:
            return len(views)

    conversion(model, Halved())
    engine = LocalEngine("e", [DictModel(truth)])
    try:
        with Publisher(Made(), [engine], timeout_s=20) as publisher:
            for _ in range(3):
                fill(model, random_seed())
                publisher.publish()
                assert engine.models[0].holds(saved(model, tmp_path))
    finally:
        engine.stop()
