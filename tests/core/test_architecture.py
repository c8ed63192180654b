"""Arrows point inward: what each package may import is a table, and the table is checked against the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import weightcast

ROOT = Path(weightcast.__file__).parent
CORE = {
    "errors",
    "dtypes",
    "manifest",
    "layout",
    "memory",
    "plan",
    "digest",
    "round",
    "messages",
    "facts",
    "geometry",
    "deadline",
    "secret",
    "invalid",
    "known",
    "replay",
    "held",
    "quoted",
    "names",
    "unix_urls",
}
PURE_LIBRARIES = {"torch", "msgspec", "weightcast"} | set(sys.stdlib_module_names)
FORBIDDEN_IN_CORE = {"socket", "http", "asyncio", "multiprocessing", "subprocess", "pickle", "zmq", "httpx"}

# Package -> packages of weightcast it must never import, at any depth of a module's text.
FORBIDDEN = {
    "trainer": {"engines", "server", "cli", "demo", "receiver", "weight_transfer"},
    "receiver": {"engines", "server", "cli", "demo", "trainer"},
    "weight_transfer": {"engines", "server", "cli", "demo", "trainer"},
    "transports": {"engines", "server", "cli", "demo", "trainer", "receiver", "control"},
    "cuda": {"engines", "server", "cli", "demo", "trainer", "receiver", "control", "transports"},
    "cpu": {"engines", "server", "cli", "demo", "trainer", "receiver", "control", "transports", "cuda"},
    "control": {"engines", "server", "cli", "demo", "trainer", "receiver", "transports"},
    "commit": {"engines", "server", "cli", "demo", "trainer", "receiver", "control", "transports"},
    "record": {"engines", "server", "cli", "demo", "trainer", "receiver", "control", "transports"},
    "report": {"engines", "server", "cli", "demo", "trainer", "receiver", "control", "transports"},
    "vllm_eras": {"engines", "server", "cli", "demo", "trainer", "receiver", "control", "transports"},
    "engines": {"trainer", "cli", "demo"},
    "server": {"trainer", "cli", "demo"},
}


def imports_of(path: Path) -> set[str]:
    """Dotted names that a module imports, wherever in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_is_pure(name: str) -> None:
    for imported in imports_of(ROOT / f"{name}.py"):
        head = imported.split(".")[0]
        assert head in PURE_LIBRARIES - FORBIDDEN_IN_CORE, f"{name} imports {imported}"
        if head == "weightcast" and "." in imported:
            assert imported.split(".")[1] in CORE | {"cuda", "cpu"}, f"{name} imports {imported}"


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_packages_keep_their_distance(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        for imported in imports_of(path):
            parts = imported.split(".")
            if parts[0] == "weightcast" and len(parts) > 1:
                assert parts[1] not in FORBIDDEN[package], f"{path.relative_to(ROOT)} imports {imported}"


@pytest.mark.parametrize("name", ["order", "machine"])
def test_the_order_of_a_commit_is_pure(name: str) -> None:
    for imported in imports_of(ROOT / "commit" / f"{name}.py"):
        parts = imported.split(".")
        assert parts[0] in PURE_LIBRARIES - FORBIDDEN_IN_CORE, f"{name} imports {imported}"
        if parts[0] == "weightcast" and len(parts) > 1:
            assert parts[1] in CORE | {"commit", "outcome"}, f"{name} imports {imported}"


def test_only_the_vllm_adapter_imports_vllm() -> None:
    for path in modules():
        if "vllm" not in path.relative_to(ROOT).parts:
            assert "vllm" not in {name.split(".")[0] for name in imports_of(path)}, path


def test_importing_weightcast_loads_no_engine() -> None:
    code = (
        "import sys\n"
        "from weightcast import *\n"
        "heavy = {'transformers', 'vllm', 'ray', 'starlette', 'uvicorn', 'triton', 'nccl', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_library_does_without_its_test_tools() -> None:
    """weightcast.testing is for tests: whoever imports the library must not need what that needs."""
    for path in modules():
        inside = path.relative_to(ROOT).parts
        if inside[0] != "testing":
            found = {name for name in imports_of(path) if name.split(".")[:2] == ["weightcast", "testing"]}
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_the_public_names_are_there() -> None:
    for name in weightcast.__all__:
        assert getattr(weightcast, name) is not None


def test_what_a_package_lists_is_what_is_public() -> None:
    """``dir`` is what a completion shows: no helper, no submodule that happens to be imported."""
    code = (
        "import weightcast, weightcast.trainer.publisher, weightcast.trainer.clients\n"
        "assert dir(weightcast) == sorted(weightcast.__all__), dir(weightcast)\n"
        "assert not [name for name in dir(weightcast) if name.startswith('_') and name != '__version__']\n"
        "clients = weightcast.trainer.clients\n"
        "assert dir(clients) == sorted(clients.__all__)\n"
        "assert all(getattr(clients, name) is not None for name in clients.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_error_is_importable_from_the_package() -> None:
    kinds = {
        name
        for name, kind in vars(weightcast.errors).items()
        if isinstance(kind, type) and issubclass(kind, weightcast.WeightcastError)
    }
    assert kinds <= set(weightcast.__all__)
    assert all(getattr(weightcast, name) is getattr(weightcast.errors, name) for name in kinds)
