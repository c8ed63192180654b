"""A served SGLang passes the conformance suite of engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.sglang.servers import Launcher, Server

from weightcast.testing.engine_suite import NEVER_ENDING, Answer, EngineSuite, Running
from weightcast.testing.models import random_state_dict
from weightcast.testing.reference import PROMPTS, Reference, replace


class TestSglang(EngineSuite):
    """Messages go by msgpack between the server's processes; servers of the other tests have SGLang's own choice."""

    @pytest.fixture(scope="class")
    @classmethod
    def running(cls, launcher: Launcher, model: Path) -> Iterator[Server]:
        room = str(NEVER_ENDING + 64)
        options = ("--context-length", room, "--max-total-tokens", str(2 * NEVER_ENDING))
        with launcher.server(model, *options, env={"SGLANG_USE_PICKLE_IPC": "0"}) as running:
            cls.launcher, cls.folder = launcher, model.parent
            yield running

    def stream(self, running: Running, ids: list[int], num_tokens: int) -> Iterator[Answer]:
        assert isinstance(running, Server)
        for part in running.stream(ids, num_tokens):
            meta = part["meta_info"]
            yield Answer(
                tokens=part["output_ids"],
                finish_reason=(meta["finish_reason"] or {}).get("type"),
                spans=[(span["version"], span["start"], span["end"]) for span in meta.get("weight_versions") or ()],
            )

    def killed(self, running: Running, checkpoint: Path, moment: str) -> int:
        """Without the seconds of importing torch."""
        words = (str(checkpoint), running.url, running.token, moment)
        log = self.folder / "doomed.log"
        return self.launcher.wait(self.launcher.run("weightcast.testing.doomed_trainer:main", *words, log=log))

    def test_sglangs_own_update_takes_the_version_with_it(self, running: Server, model: Path) -> None:
        weights = random_state_dict(model)
        other = Reference(model, random_state_dict(model))
        with self.publisher(running, weights) as publisher:
            publisher.publish()
            running.load_from(other.checkpoint)
            assert running.answers(PROMPTS) == other.answers()
            assert (running.status["weight_version"], running.status["digest"]) == ("default", None)
            assert running.generate([7])["meta_info"]["weight_version"] == "default"
            replace(weights, model)
            report = publisher.publish()
            assert report.digests_match
            self.serves(running, Reference(model, weights), report.version)
            assert running.version == report.version
