"""shm: the suite, and what only it does."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

from weightcast import cpu
from weightcast.content.layout_digest import LayoutDigest
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, InvalidInput, PeerLost, StateError, TransportError, Unsupported
from weightcast.facts import Facts
from weightcast.layout import Layout, Placement, Region, image_layout
from weightcast.layout.memory import FileSpan, Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.plan import Copy, compile_plan
from weightcast.testing.ranks import Peer
from weightcast.testing.transport_cases import CASES, TransportCase, bulk_case
from weightcast.testing.transport_sides import TrainerSide, WorkerSide, census
from weightcast.testing.transport_suite import TransportSuite
from weightcast.transports import files, shm
from weightcast.transports.base import WorkerEnd
from weightcast.transports.files import CHECKPOINT_ROOT, FileRef, OpenFile, file_ref
from weightcast.transports.shm import ShmTransport


class TestShm(TransportSuite):
    transport = "shm"
    bucket_sizes = (2**20,)


def _connected(memory: Memory, copies: tuple[Copy, ...]) -> WorkerEnd:
    transport = ShmTransport()
    trainer = transport.trainer_end(copies, memory)
    worker = transport.worker_end(trainer.offer(), copies)
    worker.connect(Deadline(5))
    return worker


def test_adopted_memory_keeps_values_and_layout() -> None:
    values = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in (1000, 0, 7, 4096)]
    adopted = ShmTransport().adopt(Memory([value.clone() for value in values]))
    assert all(torch.equal(a, b) for a, b in zip(adopted.storages, values, strict=True))
    assert ShmTransport().adopt(adopted) is adopted
    view = adopted.view(3, "float64", 3, (2, 2), (1, 9))
    view.copy_(torch.tensor([[1.5, 2.5], [3.5, 4.5]]))
    assert adopted.view(3, "float64", 12, (1,), (1,)).item() == 2.5
    ShmTransport().release(adopted)
    ShmTransport().release(adopted)
    assert view[1, 1].item() == 4.5


def test_released_memory_cannot_be_connected_to() -> None:
    case = bulk_case(100)
    transport = ShmTransport()
    memory = transport.adopt(Memory([torch.zeros(100, dtype=torch.uint8)]))
    trainer = transport.trainer_end(case.copies, memory)
    worker = transport.worker_end(trainer.offer(), case.copies)
    transport.release(memory)
    with pytest.raises(PeerLost):
        worker.connect(Deadline(5))


def test_a_descriptor_that_now_means_something_else_is_not_read(tmp_path: Path) -> None:
    case = bulk_case(100)
    transport = ShmTransport()
    memory = transport.adopt(Memory([torch.zeros(100, dtype=torch.uint8)]))
    assert isinstance(memory, shm.ShmMemory)
    assert memory.arena is not None
    worker = transport.worker_end(transport.trainer_end(case.copies, memory).offer(), case.copies)
    transport.release(memory)
    other = tmp_path / "other"
    other.write_bytes(os.urandom(100))
    descriptor = os.open(other, os.O_RDONLY)
    try:
        os.dup2(descriptor, memory.arena.ref.descriptor)
        with pytest.raises(PeerLost, match="no longer has"):
            worker.connect(Deadline(5))
    finally:
        os.close(memory.arena.ref.descriptor)
        if descriptor != memory.arena.ref.descriptor:
            os.close(descriptor)


def test_memory_of_another_kind_is_refused() -> None:
    with pytest.raises(StateError, match="not adopted"):
        ShmTransport().trainer_end((), Memory([]))
    with pytest.raises(InvalidInput, match="CPU"):
        ShmTransport().adopt(Memory([torch.empty(8, dtype=torch.uint8, device="meta")]))


def test_a_worker_that_is_killed_frees_nothing_of_the_trainer_and_the_reverse() -> None:
    """After kill -9 of both at any moment the kernel has taken everything back: there is no name that could stay."""
    case = bulk_case(2**22)
    with Peer(TrainerSide, rank=0) as trainer, Peer(WorkerSide) as first, Peer(WorkerSide) as second:
        offer = trainer.call("open", "shm", "cpu", case.copies, case.src_nbytes, 4096)
        values = random.randbytes(2**22)
        trainer.call("write", [values])
        for worker in (first, second):
            worker.call("open", "shm", "cpu", offer, case.copies)
            worker.call("make", 0, case.dst_nbytes)
            worker.call("connect")
        for peer in (trainer, first, second):
            assert "/dev/shm/" not in Path(f"/proc/{peer.pid}/maps").read_text()
        os.kill(first.pid, signal.SIGKILL)
        second.call("receive", 0)
        assert second.call("read") == [values]
        trainer.kill()
        second.call("receive", 0)
        assert second.call("read") == [values]
        assert second.call("census")["arenas"] == 1
        second.call("close")
        assert second.call("census")["arenas"] == 0


def test_what_lies_between_copies_of_one_storage_does_not_reach_an_arena() -> None:
    """An arena's gaps are zero; a trainer's storage may hold anything between the tensors that a worker wants."""
    specs = [TensorSpec(name=name, dtype="uint8", shape=(100,)) for name in ("a", "b")]
    layout = image_layout(Manifest.of(specs))
    copies = compile_plan(Manifest.of(specs), {0: layout}, layout)[0]
    values = torch.randint(1, 256, layout.storage_nbytes, dtype=torch.uint8)
    worker = _connected(ShmTransport().adopt(Memory([values])), copies)
    shadow = Memory([torch.zeros(layout.storage_nbytes, dtype=torch.uint8)], is_arena=True)
    worker.receive(shadow, Deadline(5))
    worker.close()
    expected = torch.zeros_like(values)
    for start in (0, 256):
        expected[start : start + 100] = values[start : start + 100]
    assert torch.equal(shadow.storages[0], expected)


def test_bytes_and_their_digest_come_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into an arena and into one storage a tensor; again for the next round's values."""
    pytest.importorskip("numba")
    monkeypatch.setattr(cpu, "WORTH_NBYTES", 0)
    monkeypatch.setattr(shm.Replay, "run", lambda self: pytest.fail("copied without a digest"))
    specs = [TensorSpec(name=f"w{i:02}", dtype="bfloat16", shape=(random.randint(1, 900), 8)) for i in range(50)]
    manifest = Manifest.of(specs)
    held = image_layout(manifest)
    alone = Layout(
        placements=tuple(replace(p, storage=i, offset=0) for i, p in enumerate(held.placements)),
        storage_nbytes=tuple(spec.nbytes for spec in specs),
    )
    adopted = ShmTransport().adopt(Memory([torch.zeros(held.storage_nbytes, dtype=torch.uint8)], is_arena=True))
    for landings in (held, alone):
        worker = _connected(adopted, compile_plan(manifest, {0: held}, landings)[0])
        target = Memory([torch.zeros(n, dtype=torch.uint8) for n in landings.storage_nbytes])
        for _ in range(2):
            for spec, placement in zip(specs, held.placements, strict=True):
                values = torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8)
                adopted.storages[0][placement.offset * 2 :][: spec.nbytes] = values
            nbytes, digest = worker.receive_proven(target, manifest, Deadline(20))
            assert nbytes == sum(spec.nbytes for spec in specs)
            assert digest == LayoutDigest(manifest, held).of(adopted)
            for there, here in zip(landings.placements, held.placements, strict=True):
                got, sent = target.storages[there.storage], adopted.storages[0]
                size = manifest[there.region.name].nbytes
                assert torch.equal(got[there.offset * 2 :][:size], sent[here.offset * 2 :][:size])
        worker.close()
    ShmTransport().release(adopted)


@pytest.mark.parametrize("worth_nbytes", [0, 2**40])
def test_what_is_prepared_is_not_compiled_again_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, worth_nbytes: int
) -> None:
    """Both ways of copying; a memory that nobody prepared is compiled when it comes."""
    pytest.importorskip("numba")
    monkeypatch.setattr(cpu, "WORTH_NBYTES", worth_nbytes)
    manifest = Manifest.of([TensorSpec(name="w", dtype="bfloat16", shape=(random.randint(1, 900), 8))])
    held = image_layout(manifest)
    values = torch.randint(0, 256, held.storage_nbytes, dtype=torch.uint8)
    adopted = ShmTransport().adopt(Memory([values], is_arena=True))
    worker = _connected(adopted, compile_plan(manifest, {0: held}, held)[0])
    before = torch.randint(0, 256, held.storage_nbytes, dtype=torch.uint8)
    target, other = Memory([before.clone()]), Memory([before.clone()])
    worker.warm_up(target, manifest)
    assert torch.equal(target.storages[0], before)
    compiled: list[str] = []
    for name in ("ProvenReplay", "Replay"):
        real = getattr(shm, name)
        monkeypatch.setattr(shm, name, lambda *args, real=real: (compiled.append("once"), real(*args))[1])
    size = manifest.nbytes
    for memory, times in ((target, 0), (other, 1), (target, 1)):
        worker.receive_proven(memory, manifest, Deadline(20))
        assert len(compiled) == times
        assert torch.equal(memory.storages[0][:size], adopted.storages[0][:size])
    worker.abort()
    with pytest.raises(TransportError):
        worker.warm_up(target, manifest)
    worker.close()
    ShmTransport().release(adopted)


def test_storages_side_by_side_become_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [TensorSpec(name=f"w{i:03}", dtype="bfloat16", shape=(random.randint(1, 300),)) for i in range(200)]
    manifest = Manifest.of(specs)
    placements = tuple(
        Placement(region=Region.whole(spec), dtype="bfloat16", storage=i, offset=0, strides=(1,))
        for i, spec in enumerate(specs)
    )
    held = Layout(placements=placements, storage_nbytes=tuple(spec.nbytes for spec in specs))
    landings = image_layout(manifest)
    values = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in held.storage_nbytes]
    copies = compile_plan(manifest, {0: held}, landings)[0]
    worker = _connected(ShmTransport().adopt(Memory(values)), copies)
    shadow = Memory([torch.zeros(landings.storage_nbytes, dtype=torch.uint8)], is_arena=True)
    run, runs = shm.Replay.run, []

    def counted(self: shm.Replay) -> int:
        runs.append(len(self))
        return run(self)

    monkeypatch.setattr(shm.Replay, "run", counted)
    worker.receive(shadow, Deadline(5))
    assert runs == [1]
    worker.close()
    for placement, value in zip(landings.placements, values, strict=True):
        assert torch.equal(shadow.storages[0][placement.offset * 2 :][: value.numel()], value)


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(shm, "SLICE_NBYTES", 2**16)
    return 2**16


def test_abort_ends_a_receive_between_two_slices(small_slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(1, 256, (2**24,), dtype=torch.uint8)
    worker = _connected(ShmTransport().adopt(Memory([values])), bulk_case(2**24).copies)
    memory = Memory([torch.zeros(2**24, dtype=torch.uint8)])
    _act_after_slices(monkeypatch, 3, lambda: _on_a_thread(worker.abort))
    with pytest.raises(TransportError, match="aborted"):
        worker.receive(memory, Deadline(20))
    assert torch.equal(memory.storages[0][: 3 * small_slices], values[: 3 * small_slices])
    assert not memory.storages[0][3 * small_slices :].any()
    worker.close()


def test_the_deadline_ends_a_receive_between_two_slices(small_slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(1, 256, (2**24,), dtype=torch.uint8)
    worker = _connected(ShmTransport().adopt(Memory([values])), bulk_case(2**24).copies)
    memory = Memory([torch.zeros(2**24, dtype=torch.uint8)])
    deadline = Deadline(20)
    _act_after_slices(monkeypatch, 5, lambda: setattr(deadline, "at", deadline.at - 30))
    with pytest.raises(DeadlineExceeded):
        worker.receive(memory, deadline)
    assert torch.equal(memory.storages[0][: 5 * small_slices], values[: 5 * small_slices])
    assert not memory.storages[0][5 * small_slices :].any()
    with pytest.raises(TransportError, match="is dead"):
        worker.receive(memory, Deadline(20))
    worker.close()


def _on_a_thread(action: Callable[[], None]) -> None:
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def _act_after_slices(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], None]) -> None:
    run, done = shm.Replay.run, []

    def counted(self: shm.Replay) -> int:
        nbytes = run(self)
        done.append(nbytes)
        if len(done) == count:
            action()
        return nbytes

    monkeypatch.setattr(shm.Replay, "run", counted)


# ---- files


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this process may open files in, as a worker."""
    monkeypatch.setenv(CHECKPOINT_ROOT, os.pathsep.join(["/nowhere", str(tmp_path)]))
    return tmp_path


def _in_files(case: TransportCase, values: list[torch.Tensor], folder: Path) -> Memory:
    """A memory whose storages are the data parts of safetensors files, the last one excepted."""
    spans: list[FileSpan | None] = []
    storages = []
    for number, value in enumerate(values[:-1]):
        path = folder / f"part-{number}.safetensors"
        save_file({"bytes": value}, path)
        offset = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        mapped = torch.empty(0, dtype=torch.uint8).set_(storage, offset, (value.numel(),), (1,))
        storages.append(mapped)
        spans.append(FileSpan(str(path), offset))
    return Memory([*storages, values[-1]], files=[*spans, None])


@pytest.mark.parametrize("name", ["strided", "casts", "dtypes", "large"])
def test_file_backed_storages_are_read_by_the_worker_itself(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "SLICE_NBYTES", 3000)
    seed = random.SystemRandom().getrandbits(32)
    case = CASES[name](random.Random(seed))
    generator = torch.Generator().manual_seed(seed)
    values, canary = case.new_values(generator), case.new_canary(generator)
    memory = _in_files(case, values, root)
    adopted = ShmTransport().adopt(memory)
    assert isinstance(adopted, shm.ShmMemory)
    assert adopted.arena is not None
    assert adopted.arena.ref.nbytes < values[-1].numel() + 256, "only what is in no file is moved"
    worker = _connected(adopted, case.copies)
    destination = Memory([storage.clone() for storage in canary])
    worker.receive(destination, Deadline(20))
    worker.close()
    got = [storage.numpy().tobytes() for storage in destination.storages]
    assert got == case.expected(values, canary), f"seed {seed}"


def test_files_that_change_are_noticed(root: Path) -> None:
    case = CASES["large"](random.Random(random.SystemRandom().getrandbits(32)))
    generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(32))
    memory = ShmTransport().adopt(_in_files(case, case.new_values(generator), root))
    destination = Memory(case.new_canary(generator))
    worker = _connected(memory, case.copies)
    worker.receive(destination, Deadline(20))
    path = root / "part-0.safetensors"
    os.truncate(path, 100)
    with pytest.raises(TransportError, match=r"part-0\.safetensors was changed"):
        worker.receive(destination, Deadline(20))
    worker.close()
    path.unlink()
    with pytest.raises(TransportError, match="cannot open"):
        ShmTransport().trainer_end(case.copies, memory)


def _ref(path: Path, **other: Any) -> FileRef:
    about = {"offset": 0, "nbytes": 64, "device": 0, "inode": 0, "modified_ns": 0}
    if path.exists():
        stat = path.stat()
        about |= {"device": stat.st_dev, "inode": stat.st_ino, "modified_ns": stat.st_mtime_ns}
    return FileRef(**{"path": str(path), **about, **other})


@pytest.mark.parametrize("kind", ["random", "directory", "pipe", "relative", "empty"])
def test_only_safetensors_files_are_opened(kind: str, root: Path) -> None:
    path = root / "x.safetensors"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"" if kind == "empty" else os.urandom(64))
    before = census()
    with pytest.raises((Unsupported, TransportError), match="safetensors"):
        OpenFile(_ref(Path(path.name) if kind == "relative" else path, nbytes=0))
    assert census()["descriptors"] == before["descriptors"]


@pytest.mark.parametrize("kind", ["beside", "link out", "link to a folder", "dots", "no root"])
def test_files_outside_of_what_the_operator_allowed_are_not_opened(
    kind: str, root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path_factory.mktemp("private") / "x.safetensors"
    save_file({"w": torch.randn(16)}, private)
    path = private
    if kind == "link out":
        path = root / "x.safetensors"
        path.symlink_to(private)
    elif kind == "link to a folder":
        (root / "folder").symlink_to(private.parent)
        path = root / "folder" / private.name
    elif kind == "dots":
        path = root / ".." / private.parent.name / private.name
    elif kind == "no root":
        monkeypatch.delenv(CHECKPOINT_ROOT)
    before = census()
    with pytest.raises(Unsupported, match=r"opens no files in.*--checkpoint-root"):
        OpenFile(_ref(path))
    assert census()["descriptors"] == before["descriptors"]
    monkeypatch.setenv(CHECKPOINT_ROOT, str(private.parent))
    OpenFile(_ref(path)).close()


@pytest.mark.parametrize("allowed", [True, False])
def test_the_refusal_of_a_path_outside_does_not_tell_what_is_there(
    allowed: bool, root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not allowed:
        monkeypatch.delenv(CHECKPOINT_ROOT)
    private = tmp_path_factory.mktemp("private")
    (private / "is there").write_bytes(os.urandom(64))
    (private / "folder").mkdir()
    os.mkfifo(private / "pipe")
    monkeypatch.setattr(files, "open_regular", lambda path: pytest.fail(f"{path} was opened"))
    said = set()
    for name in ("is there", "is not there", "folder", "pipe", "is there/below"):
        with pytest.raises(Unsupported, match="opens no files in") as caught:
            OpenFile(msgspec.structs.replace(_ref(root), path=str(private / name)))
        said.add(str(caught.value).replace("is there/below", "").replace("/is there", ""))
    assert len(said) == 1


def test_a_path_that_the_system_cannot_be_asked_for_is_refused_by_name(root: Path) -> None:
    with pytest.raises(Unsupported, match="is no absolute path"):
        OpenFile(msgspec.structs.replace(_ref(root), path=f"{root}/a\0b"))


def test_files_are_recognised_through_links_and_without_a_suffix(root: Path) -> None:
    """As Hugging Face's cache keeps them."""
    (root / "blobs").mkdir()
    blob = root / "blobs" / ("5" * 64)
    save_file({"w": torch.randn(16)}, blob)
    link = root / "model.safetensors"
    link.symlink_to(blob)
    for path in (blob, link):
        OpenFile(_ref(path)).close()
    assert file_ref(str(link), 0, 8).path == str(blob)


def test_only_parts_of_the_tensors_of_a_file_are_read(root: Path) -> None:
    """A range over two tensors, into the header, or beyond the end is refused before a byte is read."""
    path = root / "x.safetensors"
    save_file({"a": torch.randn(4), "b": torch.randn(4)}, path)
    start = path.stat().st_size - 32
    file = OpenFile(_ref(path, nbytes=path.stat().st_size))

    def copy_at(begin: int, numel: int) -> Copy:
        region = Region(name="w", offsets=(0,), sizes=(numel,))
        where = {"src_storage": 0, "src_offset": begin, "src_strides": (1,), "dst_storage": 0, "dst_offset": 0}
        return Copy(region=region, src_dtype="uint8", dst_dtype="uint8", dst_strides=(1,), **where)  # type: ignore[arg-type]

    for begin, numel in ((start, 16), (start + 16, 16), (start + 3, 1), (start + 15, 1)):
        file.check_copy(copy_at(begin, numel))
    for begin, numel in ((0, 8), (start - 1, 1), (start - 1, 2), (start + 15, 2), (start, 32), (start + 31, 2)):
        with pytest.raises(TransportError, match="no part of one tensor"):
            file.check_copy(copy_at(begin, numel))
    file.close()


def test_shm_is_refused_where_the_engine_may_not_open_the_files() -> None:
    trainer = Facts(host="h", pid=1, device="cpu", folders=("/data/model", "/data/more"))
    worker = Facts(host="h", pid=2, device="cpu")
    transport = ShmTransport()
    assert "opens no files in /data/model" in (transport.refusal(trainer, worker) or "")
    assert "opens no files in /data/more" in (transport.refusal(trainer, replace(worker, roots=("/data/model",))) or "")
    assert "/data/m" in (transport.refusal(trainer, replace(worker, roots=("/data/mod", "/dat"))) or "")
    for roots in (("/data",), ("/",), ("/data/more", "/data/model")):
        assert transport.refusal(trainer, replace(worker, roots=roots)) is None
    assert transport.refusal(replace(trainer, folders=()), worker) is None


def test_an_offer_that_reaches_outside_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(os.urandom(64))
    memory = Memory([torch.zeros(100, dtype=torch.uint8)], files=[FileSpan(str(path), 0)])
    with pytest.raises(TransportError, match="64 bytes"):
        ShmTransport().trainer_end((), ShmTransport().adopt(memory))


def test_a_view_outside_of_its_storage_is_refused() -> None:
    """torch itself would enlarge the storage, and every other view of it would dangle."""
    memory = Memory([torch.zeros(64, dtype=torch.uint8)])
    assert memory.view(0, "float32", 12, (2, 2), (1, 2)).numel() == 4
    assert memory.view(0, "float32", 16, (0, 5), (5, 1)).numel() == 0
    with pytest.raises(InvalidInput, match="has 64 bytes, not 68"):
        memory.view(0, "float32", 13, (2, 2), (1, 2))
    assert memory.storages[0].untyped_storage().nbytes() == 64
