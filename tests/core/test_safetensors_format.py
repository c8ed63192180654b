"""The safetensors format: what the library writes is read, and every other file is a named error in a moment."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from weightcast.errors import InvalidInput
from weightcast.manifest.dtypes import name_of
from weightcast.untrusted import safetensors_format
from weightcast.untrusted.safetensors_format import DTYPES, Header, open_regular, read_header

DTYPES_OF_TORCH = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


def header_of(path: Path) -> Header:
    descriptor = open_regular(str(path))
    try:
        return read_header(descriptor, str(path))
    finally:
        os.close(descriptor)


def written(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_shape_with_more_dimensions_than_a_tensor_can_have_is_not_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_format.math, "prod", lambda sizes: pytest.fail("multiplied"))
    path = written(tmp_path / "x", {"a": entry(0, 4, [2**63 - 1] * 1000)}, bytes(4))
    with pytest.raises(InvalidInput, match="tensor a has 1000 dimensions, more than 64"):
        header_of(path)


@pytest.mark.parametrize("shape", [[2**63, 0], [2**32, 2**31, 0], [int("9" * 4000), 0]])
def test_a_tensor_without_bytes_has_sizes_that_a_message_can_carry(tmp_path: Path, shape: list[int]) -> None:
    with pytest.raises(InvalidInput, match="bad safetensors header"):
        header_of(written(tmp_path / "x", {"a": entry(0, 0, shape)}, b""))


def entry(begin: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@given(st.lists(st.tuples(st.sampled_from(DTYPES_OF_TORCH), st.lists(st.integers(0, 4), max_size=3)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_what_the_library_writes_is_read(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:  # type: ignore[type-arg]
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    save_file(tensors, path, metadata={"format": "pt"})
    header, data = header_of(path), path.read_bytes()
    assert set(header.tensors) == set(tensors)
    for name, stored in header.tensors.items():
        assert (stored.dtype, stored.shape) == (name_of(tensors[name].dtype), tuple(tensors[name].shape))
        assert data[stored.begin : stored.end] == bytes(tensors[name].reshape(-1).view(torch.uint8).tolist())
        assert stored.begin == stored.end or header.holds(stored.begin, stored.end)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4, [4]), "b": entry(0, 4, [4])}, bytes(4), "'?b'? shares bytes with another one"),
        ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, bytes(6), "shares bytes with another one"),
        ({"a": entry(0, 4, [4]), "b": entry(5, 9, [4])}, bytes(9), "behind bytes of nobody"),
        ({"a": entry(1, 4, [3])}, bytes(4), "behind bytes of nobody"),
        ({"a": entry(0, 4, [4])}, bytes(5), "end at byte"),
        ({"a": entry(0, 8, [8])}, bytes(4), "end at byte"),
        ({"a": entry(0, 4, [5])}, bytes(4), "does not|do not need"),
        ({"a": entry(0, 4, [2, -2])}, bytes(4), "do not need"),
        ({"a": entry(4, 0, [4])}, bytes(4), "do not need"),
        ({"a": entry(0, 4, [1], "F31")}, bytes(4), "unknown type F31"),
        ({"a": entry(0, 4, [1], "F\x1b[2J" + "x" * 9000)}, bytes(4), r"unknown type F\\x1b"),
        ({"a": 7}, b"", "bad safetensors header"),
        ([1, 2], b"", "bad safetensors header"),
        (b"{" + b'"a":[' * 200_000, b"", "bad safetensors header"),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, b"", "bad safetensors header"),
        (b"\xff\xfe\xfd", b"", "bad safetensors header"),
    ],
)
def test_a_header_that_is_not_the_format_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InvalidInput, match=message) as caught:
        header_of(path)
    assert len(str(caught.value)) < 5000
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x02", struct.pack("<Q", 2**63), struct.pack("<Q", 10**8) + bytes(100)])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InvalidInput, match="is not a safetensors file"):
        header_of(tmp_path / "x")


def test_more_tensors_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_format, "MAX_TENSORS", 10)
    header_of(written(tmp_path / "x", {f"t{i}": entry(i, i + 1, [1]) for i in range(10)}, bytes(10)))
    with pytest.raises(InvalidInput, match="11 tensors; at most 10"):
        header_of(written(tmp_path / "x", {f"t{i}": entry(i, i + 1, [1]) for i in range(11)}, bytes(11)))


def test_pipes_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InvalidInput, match="not a regular file"):
            open_regular(str(path))


def test_every_type_of_the_format_is_one_of_ours() -> None:
    assert {torch.empty(0, dtype=getattr(torch, name)).dtype for name in DTYPES.values()}


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_a_header_or_a_named_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = written(tmp_path_factory.getbasetemp() / "arbitrary", text, b"")
    try:
        header_of(path)
    except InvalidInput:
        return
