"""The live page in a browser: versions, rounds and phases of a fleet, as they come."""

from __future__ import annotations

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


@pytest.fixture
def engines() -> Iterator[list[EngineProcess]]:
    made = [EngineProcess("staged"), EngineProcess("staged")]
    yield made
    for engine in made:
        engine.close()


@pytest.fixture
def watching(engines: list[EngineProcess], tmp_path: Path) -> Iterator[WatchServer]:
    with WatchServer([engine.url for engine in engines], log=tmp_path / "rounds.jsonl") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
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
        trainer.locator("tr.why:has-text('aborted'):has-text('staged weights have digest')").wait_for()
        tensors.update(values_of(2))
        second = publisher.publish()
        page.get_by_text(f"2 engines, serving {second.version}").wait_for()
        for version in (first.version, second.version):
            assert page.locator(f"#lanes rect[data-version='{version}']").count() == len(engines)
        assert page.locator(".tiles:has-text('2 of 2')").count() == 1
    engines[1].kill()
    gone = page.locator(f"[data-engine='{engines[1].url}']")
    gone.locator(".badge.bad:text-is('not reached')").wait_for()
    assert "ConnectError" in (gone.locator(".error").text_content() or "")
    assert "not reached" in (page.locator("#lanes .bad").text_content() or "")


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
