"""A checkpoint folder that somebody else made: publishing or serving it reads what lies in it, and runs nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightcast.deadline import Deadline
from weightcast.engines.embedded import LLM
from weightcast.engines.embedded.config import EngineConfig
from weightcast.engines.embedded.loading import load_tokenizer
from weightcast.errors import DeadlineExceeded, InvalidInput
from weightcast.sources import SafetensorsSource
from weightcast.testing.models import build_tiny_model


class _Runs:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.mark, "ran"))


def _indexed(folder: Path, *names: str) -> Path:
    weight_map = {f"w{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "name", ["../outside/private.safetensors", "{absolute}", "sub/x.safetensors", "x.bin", "", ".."]
)
def test_an_index_lists_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for place in (folder, outside, folder / "sub"):
        place.mkdir()
    private = outside / "private.safetensors"
    for path in (private, folder / "sub" / "x.safetensors", folder / "x.bin"):
        save_file({"w0": torch.randn(4)}, path)
    with pytest.raises(InvalidInput, match="no safetensors file of the folder"):
        SafetensorsSource(_indexed(folder, name.format(absolute=private)))


def test_a_file_that_says_to_be_larger_than_any_memory_is_a_named_error(tmp_path: Path) -> None:
    nbytes = 2**42
    header = json.dumps({"a": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with contextlib.suppress(OSError):  # a file system without files of such a size has none to be afraid of
        os.truncate(path, 8 + len(header) + nbytes)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**41, limit[1]))  # as small as where the kernel overcommits nothing
    try:
        with pytest.raises(InvalidInput, match=r"model.safetensors"):
            SafetensorsSource(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.mark.parametrize("named", ["model.safetensors", "other.safetensors"])
def test_a_link_to_itself_is_a_named_error(tmp_path: Path, named: str) -> None:
    (tmp_path / named).symlink_to(tmp_path / named)
    with pytest.raises(InvalidInput, match=named):
        SafetensorsSource(tmp_path)


def test_a_link_out_of_the_folder_is_not_published(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    save_file({"w": torch.randn(4)}, outside / "private.safetensors")
    (folder / "model.safetensors").symlink_to(outside / "private.safetensors")
    with pytest.raises(InvalidInput, match=r"outside of the folder.*copy the file"):
        SafetensorsSource(folder)


def test_a_folder_of_hugging_faces_cache_is_published(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f2e", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    values = {name: torch.randn(4) for name in ("a", "b")}
    for number, (name, value) in enumerate(values.items()):
        blob = blobs / f"{number:064x}"
        save_file({name: value}, blob)
        (snapshot / f"model-{number}.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    source = SafetensorsSource(_indexed(snapshot, "model-0.safetensors", "model-1.safetensors"))
    assert all(torch.equal(source.tensor(name), value) for name, value in values.items())
    source.close()


@pytest.mark.parametrize("kind", ["pipe", "folder", "index is a pipe", "index is nested", "index is no map"])
def test_what_is_no_file_is_told_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("model.safetensors.index.json" if kind.startswith("index") else "model.safetensors")
    if "pipe" in kind:
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("[" * 300_000 if kind == "index is nested" else '{"weight_map": [1]}')
    with pytest.raises(InvalidInput, match=r"not a regular file|no index of a checkpoint"):
        SafetensorsSource(tmp_path)


def test_reading_headers_ends_with_the_deadline(tmp_path: Path) -> None:
    names = [f"model-{number}.safetensors" for number in range(3)]
    for name in names:
        save_file({name: torch.randn(4)}, tmp_path / name)
    deadline = Deadline(60)
    SafetensorsSource(_indexed(tmp_path, *names), deadline=deadline).close()
    deadline.cancel()
    with pytest.raises(DeadlineExceeded, match="reading the header of model-0"):
        SafetensorsSource(tmp_path, deadline=deadline)


def test_tensors_that_share_bytes_take_no_memory(tmp_path: Path) -> None:
    """Five thousand names for the same four megabytes, at an odd place: each would be copied."""
    nbytes = 4 * 2**20
    entries = {f"t{i}": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [1, 1 + nbytes]} for i in range(5000)}
    text = json.dumps(entries).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes + 1))
    with pytest.raises(InvalidInput, match="behind bytes of nobody"):
        SafetensorsSource(tmp_path)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder, mark = build_tiny_model(tmp_path / "model"), tmp_path / "mark"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')\nclass C: pass\n"
    (folder / "evil.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="trust_remote_code"):
        LLM(str(folder))
    assert not mark.exists()


def test_code_of_a_tokenizer_is_run_for_those_who_trust_it_only(tmp_path: Path) -> None:
    folder, mark = build_tiny_model(tmp_path / "model"), tmp_path / "mark"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    for trust in (False, True):
        config = EngineConfig(model=str(folder), trust_remote_code=trust)
        with contextlib.suppress(InvalidInput, AttributeError):  # it is no tokenizer
            load_tokenizer(config)
        assert mark.exists() == trust


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder, mark = build_tiny_model(tmp_path / "model"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": _Runs(mark)}))
    with pytest.raises(InvalidInput, match=r"safetensors.*trust"):
        LLM(str(folder))
    assert not mark.exists()
