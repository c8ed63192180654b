"""A browser for the tests that look at pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
WAIT_MS = 15_000
OpenPage = Callable[..., "sync_api.Page"]


def chromium() -> str | None:
    """A Chromium of this system; playwright's own download is not needed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    path = chromium()
    if path is None and "CI" in os.environ:
        pytest.fail("no Chromium on the path, and CI plays every test; .ci/run installs one where it can")
    if path is None:
        pytest.skip("no Chromium on the path; the variable CHROMIUM can name one")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    """A page that must report no error, and must ask nothing of anybody but the server that it came from."""
    made = browser.new_page()
    errors: list[str] = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    made.set_default_timeout(WAIT_MS)
    yield made
    made.close()
    assert [error for error in errors if "ERR_" not in error] == []
