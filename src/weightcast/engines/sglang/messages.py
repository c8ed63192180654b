"""What goes between the process that serves requests and the schedulers, over SGLang's own channel.

An order is a kind of pause: where SGLang takes messages in while a step runs, pauses wait for the end of that step.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.managers.io_struct import BaseReq, PauseGenerationReqInput


class WeightcastOrder(PauseGenerationReqInput, kw_only=True):  # type: ignore[misc, call-arg]
    """A call of weightcast's in every scheduler. ``number`` tells its answers from those to a call that was given up."""

    number: int = 0
    action: str = "status"
    payload: bytes = b""


class WeightcastAnswer(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """The outcomes of the workers of one replica, or of one stage of a pipeline there. ``still``: no batch is on its way there."""

    number: int = 0
    outcomes: bytes = b""
    paused: bool = False
    still: bool = True


def packed(value: Any) -> bytes:
    """The value, of builtin types, as a field of a message."""
    return msgspec.msgpack.encode(value)


def unpacked(field: bytes) -> Any:
    """What ``packed`` was given."""
    return msgspec.msgpack.decode(field)
