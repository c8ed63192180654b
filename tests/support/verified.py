"""What ``weightcast verify`` finds of a server, for tests."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from weightcast.deadline import Deadline
from weightcast.sources.safetensors import SafetensorsSource
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.comparison import Comparison, compare


def comparison(url: str, token: str, checkpoint: Path) -> Comparison:
    """The server's live weights beside a checkpoint folder."""
    with closing(SafetensorsSource(checkpoint)) as source, closing(HttpEngineClient(url, token=token)) as client:
        return compare(client, source, Deadline(60))
