"""A trainer that kills itself while it publishes: python -m weightcast.testing.doomed_trainer CHECKPOINT URL TOKEN MOMENT."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from weightcast import Publisher
from weightcast.messages import Staged
from weightcast.trainer.clients.http import HttpEngineClient
from weightcast.trainer.fleet import set_up
from weightcast.trainer.round.commits import Commits
from weightcast.trainer.round.delivery import Delivery
from weightcast.trainer.round.round import Round
from weightcast.transports.connection import Connection

Served = Literal["before", "after", "nothing or before"]
MOMENTS: dict[str, Served] = {
    "set-up": "before",
    "begin": "before",
    "transfer": "before",
    "tcp transfer": "before",
    "verify": "before",
    "commit": "before",
    "in place": "nothing or before",
    "answer": "after",
    "confirm": "after",
}
"""When the trainer dies, and what the engine then serves: the version before, the trainer's, or nothing until it is published
to again. An engine that was not told to write before the trainer died serves the version before.

    set-up        the worker knows its plan, and no pair is connected
    begin         the worker was told to receive, and nothing is digested
    transfer      the worker copies what the trainer holds
    tcp transfer  between two pieces of what the trainer sends
    verify        all bytes are there, and no digest is compared
    commit        all digests are right, and nothing is ordered
    in place      between two pieces of what the worker writes over its live weights
    answer        the engine has answered the order, and the trainer has not read on
    confirm       the trainer knows the answer, and waits for the proof of what is live
"""
BUCKET_NBYTES = 4096
PIECES = 12
"""So many pieces are sent before a trainer dies between two of them."""
LINGER_S = 1.0
"""Pieces are sent before the order is: in that time the order arrives and the engine begins to write them."""


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_for_staged(take: Callable[..., Any]) -> Callable[..., Any]:
    """Return a way to wait for messages that ends the trainer where the trainer waits for staged bytes."""

    def waiting(*arguments: Any, **named: Any) -> Any:
        if Staged in arguments:
            die()
        return take(*arguments, **named)

    return waiting


def dying_of_engines(commits: Commits, engines: Sequence[Any]) -> None:
    """End the trainer once there are engines that have answered: those in place and those that stage are asked one after the other."""
    if engines:
        die()


def dying_after(work: Callable[..., Any], times: int = 1, linger_s: float = 0.0) -> Callable[..., Any]:
    """Return the function that ends the trainer once ``work`` has been done so many times, and a moment later."""
    done = [0]

    def working(*arguments: Any, **named: Any) -> Any:
        result = work(*arguments, **named)
        done[0] += 1
        if done[0] == times:
            time.sleep(linger_s)
            die()
        return result

    return working


def die_at(moment: str) -> None:
    """Arm the moment's fault."""
    places: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "set-up": (set_up._SetUp, "_connect_pairs", die),
        "begin": (Delivery, "begin", dying_after(Delivery.begin)),
        "tcp transfer": (Connection, "send", dying_after(Connection.send, PIECES)),
        "verify": (Round, "_verify", die),
        "commit": (Round, "_commit", die),
        "in place": (Connection, "send", dying_after(Connection.send, PIECES, LINGER_S)),
        "answer": (HttpEngineClient, "commit", dying_after(HttpEngineClient.commit)),
        "confirm": (Commits, "_confirm", dying_of_engines),
    }
    if moment == "transfer":
        for name in ("take", "take_each"):
            setattr(Delivery, name, dying_for_staged(getattr(Delivery, name)))
        return
    owner, name, fault = places[moment]
    setattr(owner, name, fault)


def main() -> None:
    checkpoint, url, token, moment = sys.argv[1:]
    publisher = Publisher(
        load_file(Path(checkpoint) / "model.safetensors"),
        [url],
        token=token,
        timeout_s=60,
        transport="tcp" if moment in ("tcp transfer", "in place") else "auto",
        mode="in_place" if moment == "in place" else "staged",
        bucket_nbytes=BUCKET_NBYTES,
    )
    if moment == "set-up":
        die_at(moment)
    publisher.connect()
    die_at(moment)
    publisher.publish()


if __name__ == "__main__":
    main()
