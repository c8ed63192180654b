"""No two modules of weightcast import each other, directly or through others, wherever in their text the imports stand."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import weightcast

ROOT = Path(weightcast.__file__).parent


def module_name(path: Path) -> str:
    parts = ("weightcast", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, modules: set[str]) -> set[str]:
    """Modules of weightcast that a text imports: on loading, inside functions, and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
            }
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, its first module again at its end; empty without any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_modules_import_each_other() -> None:
    texts = {module_name(path): path.read_text() for path in ROOT.rglob("*.py")}
    graph = {name: imported(text, set(texts)) - {name} for name, text in texts.items()}
    assert sum(map(len, graph.values())) > 1000
    assert not circle(graph), " <- ".join(circle(graph))


def test_a_circle_is_found_wherever_its_imports_stand() -> None:
    modules = {"weightcast.a", "weightcast.b", "weightcast.c"}
    late = "def f():\n    from weightcast import c\n"
    typing = "if TYPE_CHECKING:\n    from weightcast.a import X\n"
    texts = {"weightcast.a": "import weightcast.b", "weightcast.b": late, "weightcast.c": typing}
    graph = {name: imported(text, modules) for name, text in texts.items()}
    assert set(circle(graph)) == modules
    assert circle({**graph, "weightcast.c": set()}) == []
