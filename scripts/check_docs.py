"""Checks the documents: relative links lead somewhere, and docs/structure.md says about every module what its docstring says.

python scripts/check_docs.py            # judge
python scripts/check_docs.py --write    # write the list of modules anew
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "weightcast"
STRUCTURE = ROOT / "docs" / "structure.md"
HEADING = "## Modules, one sentence each\n"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SILENT = ("__init__.py", "__main__.py")


def broken_links(document: Path) -> list[str]:
    """Relative links of one document that lead nowhere."""
    found = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:") and not (document.parent / path).exists():
            found.append(f"{document.relative_to(ROOT)}: link to {target} leads nowhere")
    return found


def missing_modules(text: str) -> list[str]:
    """Modules that a text names by their path below the package and that are not there."""
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    return [
        f"docs/structure.md: there is no {name}"
        for name in named
        if not (PACKAGE / name).exists() and not (ROOT / name).exists()
    ]


def missing_names(text: str) -> list[str]:
    """Functions that a text names behind their module, as in "`a/b.py`, `Class.method`", and that are not there."""
    return [
        f"docs/structure.md: {module} has no {name}"
        for module, name in re.findall(r"`((?:\w+/)+\w+\.py)`, `([\w.]+)`", text)
        if (PACKAGE / module).exists() and name not in defined(PACKAGE / module)
    ]


def defined(module: Path) -> set[str]:
    """Functions, classes and methods of a module, methods behind the name of their class."""
    found = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {
                f"{node.name}.{part.name}" for part in inner if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def first_line(module: Path) -> str:
    """What a module's docstring says first: its first line, and the lines after it that end the sentence."""
    doc = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if not doc:
        raise SystemExit(f"{module.relative_to(ROOT)}: no docstring")
    said: list[str] = []
    for line in doc.splitlines():
        if not line or (said and said[-1].endswith(".")):
            break
        said.append(line)
    return " ".join(said)


def list_of_modules() -> str:
    """Every package with its modules, and what the first line of each docstring says."""
    lines = [HEADING]
    for package in (PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))):
        name = package.relative_to(PACKAGE).as_posix()
        title = "The core and its nearest helpers" if package == PACKAGE else f"{name}/"
        lines += [f"### {title}", "", first_line(package / "__init__.py"), ""]
        modules = sorted(path for path in package.glob("*.py") if path.name not in SILENT)
        lines += [*(f"- `{module.name}`: {first_line(module)}" for module in modules), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the documents.")
    parser.add_argument("--write", action="store_true", help="write the list of modules in docs/structure.md anew")
    options = parser.parse_args()
    written, _, listed = STRUCTURE.read_text(encoding="utf-8").partition(HEADING)
    modules = list_of_modules()
    if options.write:
        STRUCTURE.write_text(written + modules, encoding="utf-8")
        listed = modules.removeprefix(HEADING)
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    problems = [problem for document in documents for problem in broken_links(document)]
    problems += [*missing_modules(written), *missing_names(written)]
    if HEADING + listed != modules:
        problems.append(
            "docs/structure.md: the list of modules is not what they say; run scripts/check_docs.py --write"
        )
    print("\n".join(problems) or f"{len(documents)} documents are fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
