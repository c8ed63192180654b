"""The live page in a browser: versions, rounds and phases of a fleet, as they come."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.support.engine_process import SLICE_NBYTES, TOKEN, EngineProcess, values_of

from weightcast import Publisher
from weightcast.cli.watch import WatchServer
from weightcast.errors import RoundFailed

sync_api = pytest.importorskip("playwright.sync_api")
WAIT_MS = 15_000


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
def engines() -> Iterator[list[EngineProcess]]:
    made = [EngineProcess("staged"), EngineProcess("staged")]
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    """A page that must report no error."""
    made = browser.new_page()
    errors: list[str] = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    made.set_default_timeout(WAIT_MS)
    yield made
    made.close()
    assert [error for error in errors if "favicon" not in error and "ERR_" not in error] == []


@pytest.fixture
def watching(engines: list[EngineProcess], tmp_path: Path) -> Iterator[WatchServer]:
    with WatchServer([engine.url for engine in engines], log=tmp_path / "rounds.jsonl") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_fleet_round_by_round(
    engines: list[EngineProcess], watching: WatchServer, page: sync_api.Page, tmp_path: Path
) -> None:
    tensors = values_of(0)
    with Publisher(
        tensors,
        [engine.url for engine in engines],
        token=TOKEN,
        log=tmp_path / "rounds.jsonl",
        bucket_nbytes=SLICE_NBYTES,
        timeout_s=20,
    ) as publisher:
        page.goto(watching.url)
        page.get_by_text("no round yet").first.wait_for()
        tensors.update(values_of(1))
        first = publisher.publish()
        for engine in engines:
            box = page.locator(f"[data-engine='{engine.url}']")
            box.locator(f".round-version:text-is('{first.version}')").wait_for()
            box.locator("rect.phase[data-phase='resume']").first.wait_for()
            assert box.locator(".serves").text_content() == first.version
            phases = {bar.get_attribute("data-phase") for bar in box.locator("rect.phase").all()}
            assert phases == {"pause", "apply", "resume"}
        trainer = page.locator("[data-engine='trainer']")
        trainer.locator("rect.phase[data-phase='commit']").first.wait_for()
        shown = {bar.get_attribute("data-phase") for bar in trainer.locator("rect.phase").all()}
        assert {"begin", "transfer", "verify", "commit"} <= shown
        engines[0].arm("transfer:end", "corrupt")
        with pytest.raises(RoundFailed):
            publisher.publish()
        trainer.locator("tr.failed:has-text('aborted')").wait_for()
        tensors.update(values_of(2))
        second = publisher.publish()
        page.get_by_text(f"2 engines, serving {second.version}").wait_for()
        lanes = page.locator("#lanes rect.version title").all_text_contents()
        assert sum(first.version in title for title in lanes) == len(engines)
        assert sum(second.version in title for title in lanes) == len(engines)
    engines[1].kill()
    page.locator(f"[data-engine='{engines[1].url}'] .badge.bad:text-is('not reached')").wait_for()


def test_an_engine_serves_the_page_itself(engines: list[EngineProcess], page: sync_api.Page) -> None:
    tensors = values_of(3)
    with Publisher(tensors, [engines[0].url], token=TOKEN, timeout_s=20) as publisher:
        report = publisher.publish()
    page.goto(f"{engines[0].url}/weightcast")
    page.locator(f".round-version:text-is('{report.version}')").wait_for()
    page.get_by_text(f"1 engine, serving {report.version}").wait_for()


def test_another_name_for_this_machine_is_refused(watching: WatchServer) -> None:
    port = watching.server_address[1]
    answer = httpx.get(watching.url, headers={"Host": f"evil.example:{port}"}, timeout=5)
    assert answer.status_code == 403
    assert httpx.get(f"{watching.url}secrets", timeout=5).status_code == 404
