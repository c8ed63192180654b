"""What no module does: unpickle or run what comes in, compare a secret byte by byte, give msgspec a type that it does not know, or make
a tensor of whatever type and device the user's program has set. Read from the syntax trees."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import weightcast
from weightcast.untrusted.secret import same_secret

ROOT = Path(weightcast.__file__).parent
PICKLERS = {
    "pickle", "_pickle", "cPickle", "pickletools", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle",
    "ray",
}  # fmt: skip
LOADERS = {
    "torch.load", "torch.serialization", "torch.jit", "torch.hub", "torch.package", "yaml.load", "yaml.load_all",
    "multiprocessing.connection", "multiprocessing.get_context", "multiprocessing.Pipe", "multiprocessing.Queue",
    "multiprocessing.Pool", "multiprocessing.Manager", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
}  # fmt: skip
OBJECT_CALLS = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
EXEMPT = {
    "testing/ranks.py": "a private pipe between a test and its child",
    "trainer/clients/ray.py": "Ray pickles what goes between its own actors",
}
SECRETS = {"token", "ticket", "secret", "api_key", "password"}
DECODERS = {"decode": 1, "convert": 1, "Decoder": 0}
"""Functions of msgspec that take a type, and its place among their arguments."""
TENSOR_MAKERS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
"""Functions of torch whose results have the default type, or lie on the default device, where nobody says."""
OWN_TENSORS = {"cli", "engines/embedded", "testing"}
"""Where tensors are no business of a trainer's program."""
LANGUAGE_TOKENS = {"engines", "testing"}
"""Packages in which a token is a piece of text."""


@functools.cache
def tree_of(text: str) -> ast.Module:
    """Every rule reads every module, which is parsed once."""
    return ast.parse(text)


def modules() -> dict[str, str]:
    """The text of every module, by its path in the package."""
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
    assert "untrusted/secret.py" in texts, "the package was not found"
    return texts


def found_by(
    rule: Callable[[str], Iterable[str]], exempt: Callable[[str], bool] = lambda name: False
) -> dict[str, list[str]]:
    """What a rule finds in the modules that are not exempt: the module, and its pieces of code."""
    found = {name: list(rule(text)) for name, text in modules().items() if not exempt(name)}
    return {name: pieces for name, pieces in found.items() if pieces}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of attributes; what precedes it is left away."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        parts.append(node.id)
    return ".".join(reversed(parts))


def aliases_of(tree: ast.AST) -> dict[str, str]:
    """What names of a module stand for: ``import numpy as np`` and ``from torch import load as l``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def full_name(node: ast.expr, aliases: Mapping[str, str]) -> str:
    """``dotted``, with what an alias at its head stands for."""
    head, _, rest = dotted(node).partition(".")
    return f"{aliases.get(head, head)}.{rest}".rstrip(".")


def unpickles(text: str) -> Iterator[str]:
    """Imports and calls that can turn bytes into objects of any class, or into code."""
    tree = tree_of(text)
    aliases = aliases_of(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [full_name(node, aliases)]
        for name in names:
            imports = not isinstance(node, ast.Attribute | ast.Name)
            if name.split(".")[0] in PICKLERS and (imports or "." in name):
                yield name
            if any(name == loader or name.startswith(f"{loader}.") for loader in LOADERS):
                yield name
            if name.rpartition(".")[2] in OBJECT_CALLS:
                yield name
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
                yield node.func.id
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                yield "allow_pickle"


def compares_a_secret(text: str) -> Iterator[str]:
    """Comparisons by value of something that is called like a secret."""
    for node in ast.walk(tree_of(text)):
        if not isinstance(node, ast.Compare):
            continue
        if not any(isinstance(operator, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for operator in node.ops):
            continue
        sides = [node.left, *node.comparators]
        for side in sides:
            if isinstance(side, ast.Tuple | ast.List | ast.Set):
                sides.extend(side.elts)
            while isinstance(side, ast.Call | ast.Subscript):
                side = side.func if isinstance(side, ast.Call) else side.value
                if isinstance(side, ast.Attribute) and side.attr in ("encode", "decode", "strip"):
                    side = side.value
            last = dotted(side).rpartition(".")[2].lower() if isinstance(side, ast.Attribute | ast.Name) else ""
            if last.lstrip("_") in SECRETS or last.endswith(("_token", "_secret", "_ticket")):
                yield ast.unparse(node)


def unknown_types(text: str) -> Iterator[str]:
    """Types that go to msgspec as they are and not through ``known``."""
    tree = tree_of(text)
    aliases = aliases_of(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)):
            continue
        name = full_name(node.func, aliases)
        place = DECODERS.get(name.rpartition(".")[2])
        if place is None or name.split(".")[0] != "msgspec":
            continue
        kinds = [*node.args[place : place + 1], *(word.value for word in node.keywords if word.arg == "type")]
        for kind in kinds:
            if not (isinstance(kind, ast.Call) and ast.unparse(kind.func) == "known"):
                yield ast.unparse(node)


def test_every_type_is_known_before_it_is_decoded() -> None:
    assert not found_by(unknown_types, lambda name: name == "untrusted/known.py")


@pytest.mark.parametrize(
    "text",
    [
        "msgspec.json.decode(data, type=Offer)",
        "msgspec.msgpack.Decoder(Offer)",
        "msgspec.convert(fields, dict[str, Entry])",
        "msgspec.convert(fields, type=Entry, strict=False)",
        "import msgspec as m\nm.json.decode(data, type=Offer)",
        "from msgspec.msgpack import decode\ndecode(data, type=Offer)",
    ],
)
def test_a_type_that_goes_to_msgspec_as_it_is_is_found(text: str) -> None:
    assert list(unknown_types(text))


def test_nothing_unpickles() -> None:
    found = found_by(unpickles)
    assert not {name: calls for name, calls in found.items() if name not in EXEMPT}
    assert found.keys() >= EXEMPT.keys(), "an exemption is not needed"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads\nloads(x)",
        "from torch import load\nload(f)",
        "import torch as t\nt.load(f)",
        "import torch\ntorch.serialization.load(f)",
        "import dill; dill.loads(x)",
        "from marshal import loads",
        "import numpy\nnumpy.load(f, allow_pickle=True)",
        "torch.distributed.broadcast_object_list(x)",
        "from torch.distributed import all_gather_object as g\ng(x, y)",
        "from multiprocessing.connection import Client",
        "def f():\n    import cloudpickle",
        "eval(x)",
        "exec(x)",
        "import yaml\nyaml.load(f)",
    ],
)
def test_what_unpickles_is_found(text: str) -> None:
    assert list(unpickles(text))


@pytest.mark.parametrize("text", ["model.eval()", "import torch\ntorch.loads", "pickled = 1", "re.compile(x)"])
def test_what_looks_alike_is_not(text: str) -> None:
    assert not list(unpickles(text))


def test_secrets_are_compared_by_one_helper() -> None:
    assert [name for name, text in modules().items() if "compare_digest" in text] == ["untrusted/secret.py"]
    assert not found_by(compares_a_secret, lambda name: Path(name).parts[0] in LANGUAGE_TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        "given == self._token",
        "ticket.secret != hello.ticket",
        "shown == self.secret",
        "token.encode() == given",
        "given in (token, other)",
        "presented_token(request) == wanted",
    ],
)
def test_a_comparison_of_a_secret_is_found(text: str) -> None:
    assert list(compares_a_secret(text))


def test_secrets_are_equal_or_not() -> None:
    assert same_secret("é", "é".encode())
    assert same_secret(b"", "")
    assert not same_secret("a", "b")
    assert not same_secret("a", "aa")
    assert not same_secret("\ud800", "a")


def relies_on_defaults(text: str) -> Iterator[str]:
    """Calls that make a tensor without naming its element type and its device."""
    tree = tree_of(text)
    aliases = aliases_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            library, _, name = full_name(node.func, aliases).rpartition(".")
            named = {keyword.arg for keyword in node.keywords}
            if library == "torch" and name in TENSOR_MAKERS and not named >= {"dtype", "device"}:
                yield f"line {node.lineno}: torch.{name}"


def test_tensors_are_what_their_makers_say() -> None:
    """A default device, a default type or ``with torch.device("meta")`` around publish() changes nothing."""
    assert not found_by(relies_on_defaults, lambda name: name.startswith(tuple(OWN_TENSORS)))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.empty(3, dtype=torch.uint8)",
        "import torch as t\nt.arange(3, device='cpu')",
        "from torch import zeros\nzeros(3)",
    ],
)
def test_a_tensor_of_whatever_type_is_found(text: str) -> None:
    assert list(relies_on_defaults(text))
