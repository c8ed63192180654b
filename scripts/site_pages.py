"""Hooks of mkdocs: pages that lie beside docs/ are part of the site, and links lead to the page wherever its file lies.

The README is the first page. A link to another file of the repository takes that file into the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "", "SECURITY.md": "", "CHANGELOG.md": ""}
"""Files beside docs/ and where they lie in the site; the same name where none is given."""

_LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Take in the pages beside docs/, and each file of the repository that a page links to."""
    for name, place in PAGES.items():
        files.append(File.generated(config, place or name, content=(ROOT / name).read_text(encoding="utf-8")))
    documents = [ROOT / name for name in PAGES] + sorted(DOCS.rglob("*.md"))
    for document in documents:
        for match in _LINK.finditer(document.read_text(encoding="utf-8")):
            target = _target(document, match[2])
            if target is not None and files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Write each link to a file of the repository as a link inside the site."""
    beside = next((name for name, place in PAGES.items() if (place or name) == page.file.src_uri), None)
    document = DOCS / page.file.src_uri if beside is None else ROOT / beside

    def link(match: re.Match[str]) -> str:
        target = _target(document, match[2])
        if target is None:
            return match[0]
        inside = os.path.relpath(_place(target), Path(page.file.src_uri).parent)
        return f"{match[1]}{inside}{match[3] or ''}{match[4]}"

    return _LINK.sub(link, markdown)


def _target(document: Path, link: str) -> Path | None:
    """The file of the repository that a link of a document leads to; None for other links, and for links that lead nowhere."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = (document.parent / link).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _place(target: Path) -> str:
    """Where a file of the repository lies in the site."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix()
    return PAGES.get(name) or name
