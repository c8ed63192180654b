"""The API reference: what it names is there, and every public name is in it."""

import importlib
import re
from types import ModuleType

import pytest
from tests.documents.blocks import ROOT

REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
TARGETS = re.findall(r"^::: (\S+)$", REFERENCE, re.M)
PUBLIC = ("weightcast", "weightcast.sources", "weightcast.report", "weightcast.trainer.clients")
SMALL = {"__version__", "Rename", "SourceLike", "Stream", "Outcome"}
"""A text and names of types, which the reference explains where they are used."""


def _found(target: str) -> object:
    module, _, name = target.rpartition(".")
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_reference_names_is_there_and_described(target: str) -> None:
    assert (_found(target).__doc__ or "").strip()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    described = [_found(target) for target in TARGETS]
    public = importlib.import_module(module)
    for name in set(public.__all__) - SMALL:
        value = getattr(public, name)
        within = [d for d in described if isinstance(d, ModuleType) and getattr(d, name, None) is value]
        assert value in described or within, f"{module}.{name} is not in docs/reference.md"
