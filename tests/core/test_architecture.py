"""Arrows point inward: what each package may import is a table, and the table is checked against the source."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import weightcast

ROOT = Path(weightcast.__file__).parent

# Each package, or module beside the packages, and the others that it imports, at whatever depth of its text. A line may name only
# lines above it, so that there is no circle. Packages within a package have lines of their own where that package is listed in parts.
MAY_IMPORT = {
    "lazy": "",
    "quoted": "",
    "unix_urls": "",
    "at_exit": "",
    "room": "",
    "errors": "quoted",
    "deadline": "quoted errors",
    "logs": "",
    "facts": "quoted",
    "manifest": "errors",
    "layout": "errors manifest",
    "untrusted": "quoted errors manifest",
    "plan": "errors manifest layout",
    "delta": "errors",
    "messages": "quoted errors deadline facts manifest layout untrusted plan",
    "digest": "manifest layout",
    "record": "quoted errors manifest layout",
    "cpu": "layout digest",
    "cuda": "errors deadline layout digest plan",
    "content": "manifest layout digest plan cpu cuda",
    "control": "errors deadline untrusted messages",
    "transports": "errors deadline facts manifest layout untrusted digest plan delta cpu cuda content",
    "report": "quoted errors deadline manifest untrusted",
    "commit": "quoted errors deadline logs manifest untrusted content",
    "sources": "room quoted errors deadline manifest layout untrusted digest plan record cpu cuda transports",
    "receiver": "at_exit room errors deadline logs facts manifest layout messages digest plan cuda content control transports untrusted commit",
    "weight_transfer": "errors deadline untrusted control receiver",
    "vllm_protocol": "",
    "vllm_protocol.eras": "errors commit",
    "vllm_protocol.nccl.wire": "errors deadline manifest",
    "trainer.progress": "",
    "trainer.settings": "errors deadline manifest untrusted messages transports trainer.progress",
    "trainer.clients": "lazy quoted unix_urls errors deadline manifest untrusted commit vllm_protocol.eras",
    "trainer.ranks": "errors deadline facts manifest layout untrusted messages digest plan cuda content control transports report sources",
    "trainer.fleet": "commit quoted errors deadline logs facts manifest layout messages digest plan record content control transports report sources trainer.progress trainer.settings trainer.clients trainer.ranks",
    "trainer.round": "errors deadline logs manifest layout messages digest content control transports report trainer.progress trainer.settings trainer.clients trainer.ranks trainer.fleet",
    "trainer": "at_exit cuda errors deadline logs manifest digest plan content control transports report sources trainer.settings trainer.clients trainer.ranks trainer.fleet trainer.round",
    "engines": "errors manifest content",
    "server": "lazy quoted unix_urls errors deadline manifest untrusted report commit engines",
    "engines.embedded": "at_exit room quoted errors deadline manifest layout digest record content receiver weight_transfer engines",
    "engines.stock": "errors deadline manifest layout untrusted digest record content commit receiver weight_transfer engines server",
    "engines.vllm": "errors manifest layout untrusted record content commit receiver weight_transfer vllm_protocol.eras server engines.stock",
    "engines.sglang": "errors manifest layout untrusted digest record content commit weight_transfer server engines.stock",
    "vllm_protocol.nccl.trainer": "quoted errors deadline manifest cuda vllm_protocol.nccl.wire trainer.clients",
    "vllm_protocol.nccl.worker": "errors deadline manifest digest cuda receiver weight_transfer vllm_protocol.nccl.wire",
    "weightcast": "lazy errors report sources weight_transfer trainer",
    "testing": "errors deadline messages manifest layout untrusted digest plan content transports receiver weight_transfer trainer.clients trainer.fleet trainer.round engines weightcast",
    "cli": "quoted room errors deadline logs manifest layout untrusted plan cuda transports report sources weight_transfer trainer.progress trainer.clients trainer.fleet trainer server engines.embedded weightcast",
    "integrations": "errors report sources trainer",
    "integrations.vllm": "errors report sources trainer",
    "integrations.verl": "errors deadline report trainer.clients integrations",
    "integrations.nemo_rl": "errors report trainer.clients integrations",
    "integrations.skyrl": "integrations integrations.vllm",
    "integrations.trl": "lazy errors deadline report sources trainer.clients trainer integrations",
    "__main__": "cli",
}
PURE = (
    "quoted",
    "unix_urls",
    "errors",
    "deadline",
    "facts",
    "manifest",
    "layout",
    "untrusted",
    "messages",
    "digest",
    "plan",
    "delta",
    "record",
)
"""Packages that do arithmetic and checks: no sockets, no processes, no HTTP."""
PURE_MODULES = ("commit/machine.py", "commit/order.py", "receiver/worker_round.py")
PURE_LIBRARIES = {"torch", "numpy", "msgspec", "zstandard", "weightcast"} | set(sys.stdlib_module_names)
IMPURE = {"socket", "http", "asyncio", "multiprocessing", "subprocess", "pickle", "zmq", "httpx"}


def package_of(parts: tuple[str, ...]) -> str:
    """The line of the table that a dotted name below ``weightcast`` belongs to; the top of the package has one of its own."""
    for cut in range(min(3, len(parts)), 0, -1):
        if ".".join(parts[:cut]) in MAY_IMPORT:
            return ".".join(parts[:cut])
    return (
        parts[0]
        if (parts and (ROOT / parts[0]).exists()) or (parts and (ROOT / f"{parts[0]}.py").exists())
        else "weightcast"
    )


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Dotted names that a module imports, wherever in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def arrows() -> dict[str, dict[str, str]]:
    """For each package the packages that it imports, with a module that does."""
    found: dict[str, dict[str, str]] = {name: {} for name in MAY_IMPORT}
    for path in modules():
        inside = path.relative_to(ROOT).with_suffix("").parts
        importer = package_of(inside[:-1] if inside[-1] == "__init__" else inside)
        for name in imports_of(path):
            head, *rest = name.split(".")
            if head == "weightcast" and (imported := package_of(tuple(rest))) != importer:
                found.setdefault(importer, {})[imported] = str(path.relative_to(ROOT))
    return found


def test_packages_import_what_the_table_says_and_nothing_else() -> None:
    actual = {name: " ".join(sorted(imported)) for name, imported in arrows().items()}
    assert actual == {name: " ".join(sorted(allowed.split())) for name, allowed in MAY_IMPORT.items()}, arrows()


def test_the_table_has_no_circle() -> None:
    above: list[str] = []
    for name, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= set(above), f"{name} imports what is below it"
        above.append(name)


def test_trainer_and_engine_do_not_know_each_other() -> None:
    found = arrows()
    for name in ("sources", "trainer", "trainer.clients", "trainer.ranks", "trainer.fleet", "trainer.round"):
        assert not {"receiver", "weight_transfer", "server"} & set(found[name]), found[name]
    for name in (
        "receiver",
        "weight_transfer",
        "server",
        "engines",
        "engines.stock",
        "engines.embedded",
        "engines.vllm",
        "engines.sglang",
    ):
        assert not {other for other in found[name] if other.split(".")[0] in ("trainer", "sources")}, found[name]


@pytest.mark.parametrize("name", [*PURE, *PURE_MODULES])
def test_the_core_is_pure(name: str) -> None:
    path = ROOT / name
    for module in [path] if path.suffix else sorted(path.rglob("*.py")) or [path.with_suffix(".py")]:
        for imported in imports_of(module):
            assert imported.split(".")[0] in PURE_LIBRARIES - IMPURE, f"{module.relative_to(ROOT)} imports {imported}"


def test_only_the_command_imports_the_demo() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        if any(n.startswith("weightcast_demo") for n in imports_of(path))
    }
    assert found == {"cli/demo.py"}


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
    """weightcast.testing is for tests: the library, whose demos are none of it, must not need what that needs."""
    for path in modules():
        inside = path.relative_to(ROOT).parts
        if inside[0] not in ("testing", "demo"):
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
