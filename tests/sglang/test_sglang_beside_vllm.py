"""One Publisher over a vLLM server, an SGLang server and an embedded server, each in an environment of its own."""

import os
from pathlib import Path

import pytest
from tests.sglang.servers import Launcher
from tests.support.embedded_server import embedded_server

from weightcast import Publisher
from weightcast.errors import ProtocolError, RoundFailed
from weightcast.testing.models import build_tiny_model, random_state_dict
from weightcast.testing.reference import PROMPTS, Reference, replace
from weightcast.testing.vllm_server import vllm_server

ROOT = Path(__file__).parents[2]
VLLM = Path(os.environ.get("WEIGHTCAST_TEST_VLLM_VENV", ROOT / ".venv-vllm")) / "bin"
EMBEDDED = ROOT / ".venv" / "bin"
VLLM_NEAR = 0.25
"""On a CPU, vLLM's attention multiplies in bfloat16 (see test_vllm_suite.py)."""


@pytest.mark.skipif(not (VLLM / "vllm").exists(), reason=f"there is no vLLM in {VLLM}: make setup-vllm")
@pytest.mark.timeout(420)
def test_one_publisher_drives_three_engines(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model(tmp_path / "m", "qwen3", dtype="float32", head_dim=32)
    weights = random_state_dict(model)
    programs = EMBEDDED if (EMBEDDED / "weightcast").exists() else None
    with (
        launcher.server(model) as sglang,
        vllm_server(model, env={"WEIGHTCAST_TOKEN": sglang.token}, programs=VLLM) as vllm,
        embedded_server(model, sglang.token, programs) as (embedded, _),
        Publisher(weights, [sglang.url, vllm.url, embedded.url], token=sglang.token, timeout_s=60) as publisher,
    ):

        def serve(fresh: Reference, version: str) -> None:
            wanted = fresh.answers()
            assert sglang.answers(PROMPTS) == wanted
            assert [ids for ids, _ in embedded.answers(PROMPTS)] == wanted
            for ids, (answer, _) in zip(PROMPTS, vllm.answers(PROMPTS), strict=True):
                assert all(fresh.follows([*ids, *answer], len(ids), VLLM_NEAR))
            assert {sglang.version, vllm.version, embedded.version} == {version}

        for _ in range(2):
            replace(weights, model)
            report = publisher.publish()
            assert report.digests_match
            assert {engine.version for engine in report.engines} == {report.version}
            serve(Reference(model, weights), report.version)
        before, version = Reference(model, weights), report.version
        replace(weights, model)
        monkeypatch.setattr("weightcast.trainer.round.proof.RoundProof.check", _differs)
        with pytest.raises(RoundFailed, match="says the test"):
            publisher.publish()
        monkeypatch.undo()
        serve(before, version)
        report = publisher.publish()
        serve(Reference(model, weights), report.version)


def _differs(*_: object) -> None:
    """A digest that is not the trainer's."""
    raise ProtocolError("the digests differ, says the test")
