"""TRL's server mode (``use_vllm=True, vllm_mode="server"``) over weightcast: TRL generates as ever, and its weights go by a Publisher.

TRL looks its client up in one module and offers no hook, so a subclass takes the place of that client there. The trainer's process
needs no vLLM, no GPU and none of vLLM's development routes.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from weightcast.deadline import Deadline
from weightcast.integrations.given_streams import publish_to_its_end
from weightcast.integrations.plug_points import plug_point, put
from weightcast.sources.streamed import StreamSource
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.publisher import Publisher

GENERATION = "trl.generation.vllm_generation"
CLIENT = "trl.generation.vllm_client"
WANTED = "trl>=1.16"
REPLACED = ("check_server", "init_communicator", "update_named_params", "reset_prefix_cache", "close_communicator")
LEAST_S = 1.0


def use_in_server_mode(*, token: str | None = None, engines: Sequence[Any] = (), **options: Any) -> None:
    """Have TRL's trainers that are made from now on publish with weightcast in server mode.

    Args:
        token: the token that the server demands, for publishing and, where it demands one there, for generation.
        engines: more engines that get the same weights; TRL generates with the one at ``vllm_server_base_url`` alone.
        options: more arguments of Publisher.
    """
    plug_point(f"{GENERATION}:VLLMClient", package="trl", wanted=WANTED)
    client = plug_point(f"{CLIENT}:VLLMClient", package="trl", wanted=WANTED, members=REPLACED)
    for module in (GENERATION, CLIENT):
        plug_point(f"{module}:is_vllm_available", package="trl", wanted=WANTED)
        put(f"{module}:is_vllm_available", _not_needed)
    put(f"{GENERATION}:VLLMClient", _client_class(client, token, tuple(engines), options))


def _client_class(base: Any, token: str | None, engines: tuple[Any, ...], options: dict[str, Any]) -> type:
    class PublishingClient(base):  # type: ignore[misc]
        """TRL's client, whose weights a Publisher sends."""

        _publisher: Publisher | None = None

        def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
            # A server that waits for its first weights answers, and is not healthy before they came.
            HttpEngineClient(self.base_url, token=token).wait_until_there(Deadline(max(total_timeout, LEAST_S)))
            if token is not None:
                self.session.headers["Authorization"] = f"Bearer {token}"

        def init_communicator(self, device: object = 0) -> None:
            atexit.register(self.close_communicator)

        def update_named_params(
            self, metadata: Sequence[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, torch.Tensor]]
        ) -> None:
            if self._publisher is None:
                source = StreamSource(metadata=metadata)
                # TRL's main process streams whole tensors; the other ranks only gather with it.
                self._publisher = Publisher(
                    source, [self.base_url, *engines], **{"token": token, "process_group": None, **options}
                )
            publish_to_its_end(self._publisher, named_params)

        def reset_prefix_cache(self) -> None:
            """Nothing: a commit forgets what old weights computed."""

        def close_communicator(self) -> None:
            if self._publisher is not None:
                self._publisher.close()
                self._publisher = None

    return PublishingClient


def _not_needed(min_version: str | None = None) -> bool:
    """What TRL asks of vLLM before it makes a client: server mode calls nothing of vLLM's once the client publishes."""
    return True
