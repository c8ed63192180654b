"""Recordings replayed from an image must write what the loader writes, byte for byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_views import SHAPES, random_chain

from weightcast.errors import ErrorForm, LoadError, PlanMismatch, Unsupported
from weightcast.layout import image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import name_of
from weightcast.plan import compile_plan
from weightcast.plan.replay import Replay
from weightcast.record import live_memory, record_layout

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int16]


def random_tensor(shape, dtype=torch.float32):
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype)
    return torch.randint(-30000, 30000, shape, dtype=dtype)


def manifest_of(tensors):
    return Manifest.of(
        TensorSpec(name=name, dtype=name_of(t.dtype), shape=tuple(t.shape)) for name, t in tensors.items()
    )


def image_of(manifest, tensors):
    memory = Memory([torch.randint(0, 256, (manifest.image_nbytes,), dtype=torch.uint8)])
    for place in image_layout(manifest).placements:
        memory.view(0, place.dtype, place.offset, place.region.sizes, place.strides).copy_(tensors[place.region.name])
    return memory


def same_bytes(a, b):
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def record(load, tensors, parameters):
    """Record; live bytes must not have changed."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    recording = record_layout(lambda items: load(dict(items)), manifest_of(tensors), parameters, "cpu")
    assert all(same_bytes(before[name], p.detach()) for name, p in parameters.items())
    return recording


def check_replay(load, tensors, parameters):
    """Record, replay from an image, and compare with what the loader writes itself."""
    recording = record(load, tensors, parameters)
    assert recording.reasons == {}
    assert recording.foreign_writes == ()
    manifest = manifest_of(tensors)
    recording.layout.check(manifest)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    plan = compile_plan(manifest, {0: image_layout(manifest)}, recording.layout)
    Replay(plan.get(0, ()), image_of(manifest, tensors), live_memory(parameters)).run()
    replayed = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
        load(tensors)
    for name, p in parameters.items():
        assert same_bytes(replayed[name], p.detach()), name
    return recording


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_random_views_land_like_the_loader_writes(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = {"w": random_tensor(data.draw(SHAPES), dtype)}
    view = random_chain(data, tensors["w"])
    drawn = view(tensors["w"])
    order = data.draw(st.permutations(range(drawn.dim())))
    back = [order.index(d) for d in range(drawn.dim())]
    live_dtype = data.draw(st.sampled_from([dtype, torch.float32]))
    parameters = {"p": random_tensor([3, *(drawn.shape[d] for d in order)], live_dtype)}
    check_replay(lambda w: parameters["p"][1].permute(back).copy_(view(w["w"])), tensors, parameters)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_assemblies_land_like_the_loader_writes(data):
    """Views of cats and stacks of views, some made contiguous or cloned on the way."""
    shape = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3).map(tuple))
    tensors = {name: random_tensor(shape) for name in "abcd"}
    dim = data.draw(st.integers(0, len(shape) - 1))
    flip = data.draw(st.permutations(range(len(shape))))
    copy = data.draw(
        st.sampled_from([torch.clone, torch.Tensor.contiguous, lambda t: t, lambda t: t.to(torch.float32)])
    )
    stacked = data.draw(st.integers(0, len(shape)))
    seed = data.draw(st.integers(0, 2**32))

    def build(w):
        fused = [copy(torch.cat([w[x].permute(flip), w[y].permute(flip)], dim)) for x, y in ("ab", "cd", "bd")]
        return copy(torch.stack(fused, stacked).transpose(0, -1))

    def view(tensor):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            at = int(torch.randint(tensor.dim(), (1,), generator=generator))
            size = int(torch.randint(1, tensor.shape[at] + 1, (1,), generator=generator))
            tensor = tensor.narrow(at, tensor.shape[at] - size, size)
        return tensor.reshape(-1)

    parameters = {"p": random_tensor(view(build(tensors)).shape)}
    check_replay(lambda w: parameters["p"].copy_(view(build(w))), tensors, parameters)


def test_recorded_chains_are_followed_through_every_view_operation():
    tensors = {"w": random_tensor((6, 8))}
    views = [
        lambda t: t[1:5, 2:],
        lambda t: t[3],
        lambda t: t[..., 1],
        lambda t: t.T,
        lambda t: t.chunk(3)[1],
        lambda t: t.split([1, 5])[1],
        lambda t: t.unbind(1)[7],
        lambda t: t.view(2, 3, 8).permute(1, 0, 2),
        lambda t: t.unflatten(1, (2, 4)).flatten(0, 1),
        lambda t: t.reshape(3, -1),
        lambda t: t.t().reshape(4, 12),
        lambda t: t.movedim(0, 1).unsqueeze(1).squeeze(1),
        lambda t: t.swapaxes(0, 1).contiguous().view(-1)[5:29],
        lambda t: t.tensor_split(4, dim=1)[2],
        lambda t: t.data.detach().to("cpu"),
        lambda t: t.narrow(0, 2, 2).clone().t(),
        lambda t: torch.hstack([t[:, :2], t[:, 5:]]),
        lambda t: torch.vstack([t[1], t[0]]),
    ]
    parameters = {str(i): torch.nn.Parameter(random_tensor(view(tensors["w"]).shape)) for i, view in enumerate(views)}

    def load(w):
        for i, view in enumerate(views):
            parameters[str(i)].data.copy_(view(w["w"]))

    check_replay(load, tensors, parameters)


def test_loaders_see_a_tensor_of_the_checkpoint_on_the_engine_device():
    def load(w):
        tensor = w["w"]
        assert tensor.shape == (4, 6)
        assert (tensor.size(0), tensor.dim(), tensor.ndim, tensor.numel(), tensor.nbytes) == (4, 2, 2, 24, 48)
        assert (tensor.dtype, tensor.device.type, tensor.is_meta) == (torch.bfloat16, "cpu", False)
        assert tensor.is_contiguous()
        assert not tensor.t().is_contiguous()
        assert tensor[2:].storage_offset() == 12
        assert tensor.is_floating_point()
        assert isinstance(tensor, torch.Tensor)
        assert len(tensor) == 4

    assert record(load, {"w": random_tensor((4, 6), torch.bfloat16)}, {"p": random_tensor((3,))}).unused == ("w",)


def test_fused_experts_land_piece_by_piece():
    tensors = {f"{e}.{kind}": random_tensor((6, 4)) for e in range(5) for kind in ("gate", "up")}
    parameters = {"gate_up": torch.nn.Parameter(random_tensor((5, 12, 4)))}

    def load(w):
        gate = torch.stack([w[f"{e}.gate"] for e in range(5)])
        up = torch.stack([w[f"{e}.up"] for e in range(5)])
        parameters["gate_up"].copy_(torch.cat([gate, up], dim=1))

    recording = check_replay(load, tensors, parameters)
    assert len(recording.layout.placements) == 10
    assert recording.unwritten() == {}


def test_sliced_fused_experts_resolve_into_their_pieces_only():
    tensors = {str(e): random_tensor((4, 6)) for e in range(6)}
    parameters = {"p": random_tensor((2, 6, 2))}
    load = lambda w: parameters["p"].copy_(torch.stack([w[str(e)] for e in range(6)])[2:4, 2:].transpose(1, 2))  # noqa: E731
    recording = check_replay(load, tensors, parameters)
    assert [p.region.name for p in recording.layout.placements] == ["2", "3"]
    assert recording.unused == ("0", "1", "4", "5")


def test_foreach_copy_lands():
    tensors = {"a": random_tensor((3,)), "b": random_tensor((2, 2))}
    parameters = {"a": random_tensor((3,)), "b": random_tensor((2, 2))}
    check_replay(lambda w: torch._foreach_copy_(list(parameters.values()), [w["a"], w["b"]]), tensors, parameters)


def test_inference_mode_loaders_are_followed():
    tensors = {"a": random_tensor((6, 4)), "b": random_tensor((2, 4))}
    parameters = {"p": random_tensor((8, 4)), "q": random_tensor((4, 3))}

    def load(w):
        with torch.inference_mode():
            parameters["p"].copy_(torch.cat([w["a"].contiguous(), w["b"]]))
            parameters["q"].copy_(w["a"].chunk(2)[1].t().contiguous().reshape(4, 3))

    check_replay(load, tensors, parameters)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda p, t: p.copy_(t * 2), "mul"),
        (lambda p, t: p.copy_(-t), "neg"),
        (lambda p, t: p.copy_(t[torch.tensor([1, 0, 2, 3])]), "index"),
        (lambda p, t: p.copy_(t.flip(0)), "flip"),
        (lambda p, t: p.copy_(t.sum(0)), "sum"),
        (lambda p, t: p.copy_(t.to(torch.float16)), "was cast to torch.float16"),
        (lambda p, t: p.copy_(t.half().float()), "changed on the way"),
        (lambda p, t: p.copy_(t[0]), "repeats"),
        (lambda p, t: p.copy_(t.view(torch.int32)), "view.dtype"),
        (lambda p, t: p.copy_(t.mul_(3)), "mul_"),
        (lambda p, t: p.fill_(t[0, 0].item()), "read by"),
        (lambda p, t: p.fill_(t[0, 0]), "fill_"),
        (lambda p, t: p.add_(t), "add_"),
        (lambda p, t: torch.add(t, 1, out=p), "add"),
        (lambda p, t: p.masked_scatter_(torch.rand(4, 4) > 0.5, t), "masked_scatter_"),
        (lambda p, t: p.__setitem__((slice(None), torch.tensor([3, 1, 0, 2])), t), "index_put_"),
        (lambda p, t: setattr(p, "data", t), "replaces"),
        (lambda p, t: p.set_(t), "set_"),
        (lambda p, t: torch.empty(4, 4).copy_(t), "no live parameter"),
        (lambda p, t: p.copy_(torch.zeros_like(t).copy_(t)), "zeros_like"),
        (lambda p, t: p.copy_(torch.cat([t[:2], torch.ones(2, 4)])), "cat"),
        (lambda p, t: float(t.max()) > 0 and p.copy_(t), "max"),
    ],
)
def test_what_cannot_be_followed_goes_through_the_loader_and_writes_nothing(operation, reason):
    tensors = {"w": random_tensor((4, 4)), "v": random_tensor((4, 4))}
    parameters = {"p": random_tensor((4, 4)), "q": random_tensor((4, 4))}
    address = parameters["p"].data_ptr()

    def load(w):
        parameters["q"].copy_(w["v"])
        operation(parameters["p"], w["w"])

    recording = record(load, tensors, parameters)
    assert parameters["p"].data_ptr() == address
    assert recording.layout.through_loader == ("w",)
    assert reason in recording.reasons["w"]
    assert {p.region.name for p in recording.layout.placements} == {"v"}


def test_a_cast_to_the_dtype_of_the_parameter_is_left_to_the_plan():
    tensors = {"w": random_tensor((4, 4)), "v": random_tensor((4, 4), torch.bfloat16)}
    parameters = {"p": random_tensor((8, 4), torch.bfloat16)}

    def load(w):
        parameters["p"].copy_(torch.cat([w["w"].to(torch.bfloat16).t(), w["v"]]))

    check_replay(load, tensors, parameters)


def test_values_from_no_checkpoint_tensor_are_foreign_and_not_written():
    tensors = {"w": random_tensor((2, 3))}
    parameters = {"p": random_tensor((4, 3)), "q": random_tensor((3,))}

    def load(w):
        parameters["p"][:2].copy_(w["w"])
        parameters["p"][2:].zero_()
        parameters["q"].copy_(torch.rand(3))
        parameters["q"].data = torch.rand(3)

    recording = record(load, tensors, parameters)
    assert len(recording.foreign_writes) == 3
    assert recording.unwritten() == {}
    assert recording.unused == ()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constants_that_are_there_already_are_no_foreign_writes(value):
    """Padding: rows of a vocabulary, columns of an expert, before and after the values next to it."""
    tensors = {"embed": random_tensor((5, 4)), "expert": random_tensor((4, 3))}
    parameters = {"embed": random_tensor((8, 4)), "experts": random_tensor((2, 4, 6))}

    def load(w):
        parameters["embed"][:5].copy_(w["embed"])
        parameters["embed"][5:].fill_(value)
        parameters["experts"][1].fill_(value)
        parameters["experts"][1].narrow(1, 0, 3).copy_(w["expert"])

    assert len(record(load, tensors, parameters).foreign_writes) == 2
    load(tensors)
    recording = check_replay(load, {name: random_tensor(t.shape) for name, t in tensors.items()}, parameters)
    assert recording.unwritten() == {1: [(0, 96)]}
    parameters["experts"][1, 3, 5] += 1
    assert len(record(load, tensors, parameters).foreign_writes) == 1


def test_a_value_overwritten_by_a_constant_has_no_landing():
    tensors = {"a": random_tensor((4, 4)), "b": random_tensor((4, 4))}
    parameters = {"p": random_tensor((8, 4))}

    def load(w):
        parameters["p"][:4].copy_(w["a"])
        parameters["p"][4:].copy_(w["b"])
        parameters["p"][2:4].zero_()

    recording = record(load, tensors, parameters)
    assert recording.layout.through_loader == ("a",)
    assert "over it afterwards" in recording.reasons["a"]


def test_unwritten_bytes_are_exact():
    tensors = {"w": random_tensor((2, 3)), "v": random_tensor((4, 2))}
    parameters = {"p": random_tensor((4, 3)), "q": random_tensor((4, 5)), "r": random_tensor((7,))}

    def load(w):
        parameters["p"][1:3].copy_(w["w"])
        parameters["q"][:, 1:3].copy_(w["v"])

    holes = [(0, 4), (12, 24), (32, 44), (52, 64), (72, 80)]
    assert record(load, tensors, parameters).unwritten() == {0: [(0, 12), (36, 48)], 1: holes, 2: [(0, 28)]}


def test_overlapping_landings_are_kept_and_named_in_order():
    tensors = {name: random_tensor((4, 4)) for name in ("embed", "other", "head")}
    parameters = {"p": random_tensor((4, 8)), "q": random_tensor((4, 4))}

    def load(w):
        parameters["p"][:, :4].copy_(w["embed"])
        parameters["p"][:, 4:].copy_(w["other"])
        parameters["q"].copy_(w["other"])
        parameters["p"][1:3, 2:4].copy_(w["head"][:2, :2])

    recording = record(load, tensors, parameters)
    assert recording.overlaps == (("embed", "head"),)
    assert len(recording.layout.placements) == 4


def test_storages_are_found_by_identity_and_parameters_may_be_slices_of_one():
    arena = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    memory = Memory([arena[512:2048], arena[2048:]])
    first, second = (memory.view(i, "float32", 8, (6, 4), (4, 1)) for i in (0, 1))
    tensors = {"a": random_tensor((6, 4)), "b": random_tensor((4, 6))}

    def load(items):
        for name, tensor in items:
            first.copy_(tensor) if name == "a" else second.copy_(tensor.t())

    placements = record_layout(load, manifest_of(tensors), memory, "cpu").layout.placements
    assert [(p.region.name, p.storage, p.offset, p.strides) for p in placements] == [
        ("a", 0, 8, (4, 1)),
        ("b", 1, 8, (1, 4)),
    ]


def test_a_failing_loader_is_a_load_error_with_its_traceback():
    def load(w):
        raise KeyError("no such module")

    with pytest.raises(LoadError, match=r"last tensor taken: w\): KeyError: 'no such module'") as caught:
        record(load, {"w": random_tensor((2,))}, {"p": random_tensor((2,))})
    assert "\n" not in caught.value.message
    assert "in load" in ErrorForm.of(caught.value).trace


def test_tensors_of_other_sizes_are_a_mismatch_that_names_the_last_without_a_traceback():
    def asserts(w):
        for name, tensor in w.items():
            assert tensor.shape == parameters[name].shape

    parameters = {"v": random_tensor((2,)), "p": random_tensor((3,))}
    for load, told in ((asserts, ""), (lambda w: parameters["p"].copy_(w["p"]), ".*must match")):
        with pytest.raises(PlanMismatch, match=rf"last tensor taken: v, \(2,\) float32\){told}") as caught:
            record(load, {"v": random_tensor((2,)), "p": random_tensor((2,))}, parameters)
        assert not ErrorForm.of(caught.value).trace


def test_new_parameters_and_kept_tensors_are_refused():
    kept = []
    with pytest.raises(Unsupported, match="makes new parameters out of w"):
        record(lambda w: torch.nn.Parameter(w["w"]), {"w": random_tensor((2,))}, {"p": random_tensor((2,))})
    record(lambda w: kept.append(w["w"]), {"w": random_tensor((2,))}, {"p": random_tensor((2,))})
    with pytest.raises(Unsupported, match="outside of its recording"):
        kept[0] + 1


def test_zero_size_and_scalar_tensors():
    tensors = {"scalar": random_tensor(()), "empty": random_tensor((0, 4)), "one": random_tensor((1,))}
    parameters = {"scalar": random_tensor(()), "empty": random_tensor((0, 4)), "one": random_tensor(())}

    def load(w):
        parameters["scalar"].copy_(w["scalar"].clone())
        parameters["empty"].copy_(w["empty"])
        parameters["one"].copy_(w["one"].reshape(()))

    assert len(check_replay(load, tensors, parameters).layout.placements) == 2


def test_a_loader_that_knows_no_such_tensor_goes_on_with_the_next():
    tensors = {name: random_tensor((3,)) for name in ("a", "no such", "b", "neither", "c")}
    parameters = {name: random_tensor((3,)) for name in ("a", "b", "c")}
    live = live_memory(parameters)

    def load(items):
        for name, tensor in items:
            parameters[name].copy_(tensor)

    manifest = Manifest.of(
        TensorSpec(name=name, dtype="float32", shape=tuple(tensor.shape)) for name, tensor in tensors.items()
    )
    asked = []

    def refuses(error, name):
        asked.append((type(error), name))
        return isinstance(error, KeyError)

    recording = record_layout(load, manifest, live, "cpu", refuses)
    assert set(recording.unused) == {"no such", "neither"}
    assert {p.region.name for p in recording.layout.placements} == {"a", "b", "c"}
    assert set(asked) == {(KeyError, "no such"), (KeyError, "neither")}
    with pytest.raises(LoadError, match=r"no such|neither"):
        record_layout(load, manifest, live, "cpu")


def test_what_a_refused_tensor_had_landed_before_counts_as_unfilled():
    parameter = random_tensor((4,))
    memory = live_memory({"p": parameter})

    def load(items):
        for _, tensor in items:
            parameter[:2].copy_(tensor[:2])
            raise KeyError("p")

    manifest = Manifest.of([TensorSpec(name="p", dtype="float32", shape=(4,))])
    recording = record_layout(load, manifest, memory, "cpu", lambda error, name: True)
    assert recording.unused == ("p",)
    assert recording.layout.placements == ()
    assert recording.unwritten() == {0: [(0, 16)]}
