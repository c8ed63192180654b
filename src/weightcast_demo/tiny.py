"""A tiny model on disk, with random weights and a tokenizer: what the README and the tutorial start from."""

from __future__ import annotations

from pathlib import Path

from weightcast.errors import InvalidInput, Unsupported


def write_model(folder: Path, seed: int) -> int:
    """Write the model and return the size of its weights; equal seeds give equal weights. A folder that has files is left as it is."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(
            f"{folder} exists and is not empty", field="folder", hint="Name a folder that does not exist yet"
        )
    try:
        from weightcast.testing.models import build_tiny_model

        # Heads of 32: the smallest that vLLM's attention on CPUs runs.
        build_tiny_model(folder, "qwen3", dtype="bfloat16", seed=seed, head_dim=32)
    except ImportError as error:
        raise Unsupported(f"a model needs {error.name}", hint="pip install 'weightcast[server]'") from None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
