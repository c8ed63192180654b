"""Adapters in a manifest: the names of PEFT's checkpoint form, and the config, which is a tensor of bytes beside them. Pure.

Load-bearing: what scales an adapter is published with its matrices, so digest and version cover both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from weightcast.errors import MERGED_HINT, InvalidInput, PlanMismatch
from weightcast.manifest.manifest import Manifest, TensorSpec, align

CONFIG_NAME = "adapter_config.json"
"""The name of the config's tensor, after the file that PEFT writes."""
PREFIX = "base_model.model."
"""What PEFT puts before the base model's names."""
_FACTORS = (".lora_A.weight", ".lora_B.weight")
MAX_CONFIG_NBYTES = 1 << 20
MAX_NAME = 64


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter's matrices mean. The first fields are PEFT's; ``scaling`` is what its layers multiply B A x by."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    scaling: float
    scalings: dict[str, float] = {}
    """The scaling of modules that have another one."""
    peft_type: str = "LORA"

    def scaling_of(self, module: str) -> float:
        """The scaling of one module of the base model."""
        return self.scalings.get(module, self.scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The two matrices of one module: A is (rank, inputs), B is (outputs, rank)."""

    a: TensorSpec
    b: TensorSpec

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def factor_names(module: str) -> tuple[str, str]:
    """The checkpoint names of a module's A and B."""
    return tuple(f"{PREFIX}{module}{factor}" for factor in _FACTORS)  # type: ignore[return-value]


def factors_of(manifest: Manifest) -> dict[str, Factors]:
    """The matrices of an adapter by the module of the base model; PlanMismatch names what is none."""
    found: dict[str, dict[str, TensorSpec]] = {}
    for spec in manifest.tensors:
        if spec.name == CONFIG_NAME:
            if spec.dtype != "uint8" or len(spec.shape) != 1 or spec.shape[0] > MAX_CONFIG_NBYTES:
                raise PlanMismatch(f"{CONFIG_NAME} is bytes, not {spec.dtype} of shape {spec.shape}")
            continue
        factor = next((each for each in _FACTORS if spec.name.endswith(each)), None)
        if factor is None or not spec.name.startswith(PREFIX) or len(spec.shape) != 2:
            raise PlanMismatch(f"{spec.name!r} is no matrix of a LoRA adapter", hint=MERGED_HINT)
        found.setdefault(spec.name[len(PREFIX) : -len(factor)], {})[factor] = spec
    halves = [module for module, pair in found.items() if len(pair) < len(_FACTORS)]
    if halves or not found or CONFIG_NAME not in manifest:
        what = f"{halves[0]} lacks A or B" if halves else "matrices or config are missing"
        raise PlanMismatch(f"the manifest is no whole adapter: {what}", hint=MERGED_HINT)
    factors = {module: Factors(a=pair[_FACTORS[0]], b=pair[_FACTORS[1]]) for module, pair in found.items()}
    for module, each in factors.items():
        if each.a.shape[0] != each.b.shape[1] or each.a.dtype != each.b.dtype:
            raise PlanMismatch(f"A and B of {module!r} do not fit together: {each.a.shape} and {each.b.shape}")
    return factors


def config_bytes(config: AdapterConfig) -> bytes:
    """A config as its tensor holds it: JSON, and spaces up to the next multiple of an alignment, so that the form seldom changes."""
    text = msgspec.json.encode(config)
    return text.ljust(align(len(text)))


def check_name(name: object) -> str:
    """The name under which an adapter is published and served; InvalidInput for one that no request could have."""
    usable = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()
    if not isinstance(name, str) or not usable or any(sign in name for sign in "@/ "):
        raise InvalidInput(
            f"an adapter's name is 1 to {MAX_NAME} printable characters without @, / and spaces, not {str(name)[:80]!r}",
            field="adapter",
        )
    return name


def version_label(name: str, version: str) -> str:
    """How a version of an adapter is named in requests, outputs and reports."""
    return f"{name}@{version}"


def merge_scalings(scalings: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The scaling that most modules have, and those of the others."""
    values: Sequence[float] = list(scalings.values())
    usual = max(sorted(set(values)), key=values.count)
    return usual, {module: value for module, value in sorted(scalings.items()) if value != usual}
