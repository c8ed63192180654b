"""Given: what an engine is started with, checked before anything is loaded: the device, the folders, the backend."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from weightcast.engines.embedded.config import EngineConfig
from weightcast.errors import InvalidInput
from weightcast.weight_transfer.factory import WeightTransferEngineFactory

DEVICES = ("cpu", "cuda")
MOST_THREADS = 1024


def check_given(config: EngineConfig) -> None:
    """Raise InvalidInput or Unsupported for what cannot work on this machine, whatever the model is."""
    device = device_of(config.device)
    WeightTransferEngineFactory.engine_class(config.transfer.backend).check_device(device)
    check_folder(config.model, "model", "config.json")
    if config.tokenizer is not None:
        check_folder(config.tokenizer, "tokenizer", "tokenizer_config.json")
    if config.num_threads is not None and config.num_threads > MOST_THREADS:
        raise InvalidInput(
            f"num_threads {config.num_threads} is more than {MOST_THREADS}",
            field="num_threads",
            hint=f"This machine has {os.cpu_count()} cores; more threads than cores are of no use",
        )


def device_of(given: str | None) -> torch.device:
    """Return the device of that name, or the device that the engine chooses. InvalidInput when the device is not there."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in DEVICES:
        raise InvalidInput(
            f"there is no device {given!r} to run on", field="device", hint="Choose cpu, cuda, or one GPU: cuda:1 say"
        )
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        sees = (
            "no GPU" if not count else "one GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        )
        raise InvalidInput(
            f"device {given} was asked for, and torch sees {sees} here",
            field="device",
            hint="Choose another device, cpu say; `weightcast doctor` shows what torch is built for",
        )
    return device


def check_folder(given: Any, field: str, file: str) -> None:
    """Raise InvalidInput where ``given`` can only mean a folder and no folder is there. For any other name the hub is asked later."""
    if isinstance(given, str) and not given:
        raise InvalidInput(f"{field} is empty", field=field, hint="Give a folder or the name of a model on a hub")
    if not isinstance(given, str | Path):
        return
    folder = Path(given)
    if folder.is_dir():
        if field == "model" and not (folder / file).is_file():
            raise InvalidInput(
                f"the folder {folder.absolute()} has no {file}, so there is no model in it",
                field=field,
                hint="Give the folder that save_pretrained wrote",
            )
    elif folder.exists():
        hint = f"Give the folder: {folder.parent}"
        raise InvalidInput(f"{folder.absolute()} is a file, and the {field} is a folder", field=field, hint=hint)
    elif _can_only_be_a_path(given):
        raise InvalidInput(
            f"there is no folder {folder.absolute()}",
            field=field,
            hint="Give a folder, or a hub's name such as Qwen/Qwen3-0.6B",
        )


def _can_only_be_a_path(given: str | Path) -> bool:
    """Whether no hub has a model of such a name: names there are ``name`` or ``owner/name``."""
    text = str(given)
    return (
        isinstance(given, Path) or text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or text.endswith("/")
    )
