"""LoRA adapters of a trainer on a stock vLLM server: requests in flight keep their version, and no request, however late, ends the server."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.vllm.adapters import PROMPTS, greedy, greedy_on, rebase, scatter, trainer_of
from tests.vllm.weights import replace

from weightcast import Publisher
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, RoundFailed
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.vllm_server import Served, vllm_server

LONG = 150
OPTIONS = ("--enable-lora", "--max-loras", "3", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("served") / "m", "qwen3", dtype="float32", head_dim=32)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with vllm_server(model, *OPTIONS) as running:
        yield running


def complete(served: Served, ids: list[int], name: str = "tuned", status: int = 200, **fields: Any) -> Any:
    body = {"model": name, "prompt": ids, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    answer = served.post("/v1/completions", {**body, "return_token_ids": True, **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


def test_a_stream_keeps_its_version_through_rounds(served: Served, model: Path) -> None:
    trainer = trainer_of(model, "tuned")
    with Publisher(trainer, [served.url], token=served.token, adapter="tuned", timeout_s=60) as publisher:
        complete(served, PROMPTS[0], status=404)
        publisher.publish()
        for _ in range(2):
            truth, answers = greedy(trainer, PROMPTS[0], LONG), list[Any]()
            before = served.tokens_made()
            thread = threading.Thread(
                target=lambda: answers.append(complete(served, PROMPTS[0], max_tokens=LONG))  # noqa: B023 - ends in here
            )
            thread.start()
            deadline = Deadline(120)
            while served.tokens_made() < before + 3:
                deadline.check("the first tokens")
                time.sleep(0.02)
            scatter(trainer)
            report = publisher.publish()
            label = f"tuned@{report.version}"
            during = complete(served, PROMPTS[1])
            thread.join(120)
            (old,) = answers
            assert old["choices"][0]["token_ids"] == truth
            assert old["model"] != label
            assert during["model"] == label
            assert during["choices"][0]["token_ids"] == greedy(trainer, PROMPTS[1])
            assert complete(served, PROMPTS[1], label)["choices"][0]["token_ids"] == greedy(trainer, PROMPTS[1])
            with trainer.disable_adapter():
                assert served.complete(PROMPTS[2], 24)["token_ids"] == greedy_on(trainer, PROMPTS[2])
        status = served.get("/weightcast/status").json()
        assert status["weight_version"] == "default"
        assert status["adapters"]["tuned"]["weight_version"] == report.version
        assert status["adapters"]["tuned"]["versions"][label] == 0
        assert label in {each["id"] for each in served.get("/v1/models").json()["data"]}
        assert f'version="{report.version}"' in served.get("/weightcast/metrics").text
        assert served.get("/weightcast/rounds").json()["engines"][0]["rounds"][-1]["version"] == label
        assert served.get("/weight_info").json()["weight_version"] == "default"


def test_rounds_back_to_back_lose_no_request_and_the_server_lives(served: Served, model: Path) -> None:
    """Requests come all the time, by the adapter's name and by versions that are retired meanwhile."""
    trainer, labels, over = trainer_of(model, "tuned"), list[str](), threading.Event()
    truths, seen, refused = dict[str, list[int]](), list[tuple[str, list[int]]](), list[int]()
    failures = list[str]()

    def ask(by_label: bool) -> None:
        while not over.is_set():
            name = labels[-1] if by_label else "tuned"
            body = {"model": name, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            answer = served.post("/v1/completions", {**body, "return_token_ids": True})
            if answer.status_code == 200:
                seen.append((answer.json()["model"], answer.json()["choices"][0]["token_ids"]))
            else:
                refused.append(answer.status_code)

    with Publisher(trainer, [served.url], token=served.token, adapter="tuned", timeout_s=60) as publisher:

        def publish() -> None:
            scatter(trainer)
            label = f"tuned@{publisher.publish().version}"
            truths[label] = greedy(trainer, PROMPTS[0])
            labels.append(label)

        publish()
        threads = [threading.Thread(target=ask, args=(by_label,)) for by_label in (False, False, True)]
        for thread in threads:
            thread.start()
        try:
            while len(labels) < 9:
                count = len(seen)
                try:
                    publish()
                except RoundFailed as error:
                    failures.append(str(error))
                while len(seen) == count:
                    assert all(thread.is_alive() for thread in threads)
                    time.sleep(0.02)
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        assert all("--max-loras" in failure for failure in failures), failures
        assert {label for label, _ in seen} <= truths.keys()
        assert all(tokens == truths[label] for label, tokens in seen)
        assert set(refused) <= {404, 500}, "a version that was retired before, or on the way (vLLM says 500 then)"
        assert complete(served, PROMPTS[0])["choices"][0]["token_ids"] == truths[labels[-1]]
        complete(served, PROMPTS[0], labels[0], status=404)


def test_rounds_of_the_model_and_of_an_adapter(served: Served, model: Path) -> None:
    trainer, weights = trainer_of(model, "tuned"), random_state_dict(model)
    settings: dict[str, Any] = {"token": served.token, "timeout_s": 60}
    with (
        Publisher(trainer, [served.url], adapter="tuned", **settings) as adapters,
        Publisher(weights, [served.url], **settings) as whole,
    ):
        version = adapters.publish().version
        replace(weights, model)
        rebase(trainer, weights)
        report = whole.publish()
        answer = complete(served, PROMPTS[0])
        assert answer["model"] == f"tuned@{version}"
        assert answer["choices"][0]["token_ids"] == greedy(trainer, PROMPTS[0])
        status = served.get("/weightcast/status").json()
        assert (status["weight_version"], status["adapters"]["tuned"]["weight_version"]) == (report.version, version)


def test_the_name_of_the_model_is_no_adapters(served: Served, model: Path) -> None:
    with (
        Publisher(trainer_of(model), [served.url], token=served.token, adapter="policy", timeout_s=60) as publisher,
        pytest.raises(InvalidInput, match="name of the model itself"),
    ):
        publisher.connect()
