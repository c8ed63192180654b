"""SGLang's API key and weightcast's token guard routes of their own."""

from pathlib import Path

import httpx
from tests.sglang.servers import Launcher

from weightcast import Publisher
from weightcast.testing.models import build_tiny_model, random_state_dict

KEY = "sglangs-own-key"


def test_weightcasts_token_is_beside_sglangs_key(launcher: Launcher, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "m", "llama", dtype="float32")
    weights = random_state_dict(model)
    with launcher.server(model, "--api-key", KEY) as server:
        with Publisher(weights, [server.url], token=server.token, timeout_s=60) as publisher:
            report = publisher.publish()
        assert server.get("/model_info").status_code == 401
        assert server.post("/weightcast/commit", {}, headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
        theirs = httpx.get(f"{server.url}/model_info", headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        assert theirs.json()["weight_version"] == report.version
        assert server.post("/continue_generation", {}, headers=server.headers).status_code == 401
