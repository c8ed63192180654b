"""Checks the documents: relative links lead somewhere, and docs/structure.md names every package and module."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(document: Path) -> list[str]:
    """Relative links of one document that lead nowhere."""
    found = []
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if path and "://" not in path and not path.startswith("mailto:") and not (document.parent / path).exists():
            found.append(f"{document.relative_to(ROOT)}: link to {target} leads nowhere")
    return found


def undescribed_modules(structure: Path) -> list[str]:
    """Modules under src/weightcast that the structure document does not name by their file name."""
    text = structure.read_text(encoding="utf-8")
    package = ROOT / "src" / "weightcast"
    modules = sorted(path for path in package.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
    return [
        f"{structure.relative_to(ROOT)}: {module.relative_to(package)} is not described"
        for module in modules
        if module.name not in text
    ]


def main() -> int:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    problems = [problem for document in documents for problem in broken_links(document)]
    structure = ROOT / "docs" / "structure.md"
    problems += undescribed_modules(structure) if structure.exists() else ["docs/structure.md is missing"]
    print("\n".join(problems) or f"{len(documents)} documents are fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
