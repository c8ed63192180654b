"""A trainer that is killed while it publishes: python -m tests.vllm.doomed_trainer MODEL URL TOKEN MOMENT."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from weightcast import Publisher
from weightcast.messages import Staged
from weightcast.testing.models import random_state_dict
from weightcast.trainer.round.delivery import Delivery
from weightcast.trainer.round.round import Round
from weightcast.transports.connection import Connection

MOMENTS = ("transfer", "tcp transfer", "commit")
"""While the engine copies what the trainer holds; between two pieces of what the trainer sends; all is there, nothing ordered."""
BUCKET_NBYTES = 4096


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_for_staged(take: Callable[..., Any]) -> Callable[..., Any]:
    """A way to wait for messages that ends the trainer where it waits for staged bytes."""

    def waiting(*arguments: Any, **named: Any) -> Any:
        if Staged in arguments:
            die()
        return take(*arguments, **named)

    return waiting


def die_waiting(moment: str) -> None:
    """Arm the moment's fault."""
    if moment == "commit":
        Round._commit = die  # type: ignore[method-assign, assignment]
    elif moment == "transfer":
        for name in ("take", "take_each"):
            setattr(Delivery, name, dying_for_staged(getattr(Delivery, name)))
    else:
        send, sent = Connection.send, [0]

        def sending(connection: Connection, *arguments: Any) -> None:
            sent[0] += 1
            if sent[0] == 4:
                die()
            send(connection, *arguments)

        Connection.send = sending  # type: ignore[method-assign, assignment]


def main() -> None:
    model, url, token, moment = sys.argv[1:]
    transport = "tcp" if moment.startswith("tcp") else "shm"
    publisher = Publisher(
        random_state_dict(model),
        [url],
        token=token,
        timeout_s=60,
        transport=transport,
        mode="staged",
        bucket_nbytes=BUCKET_NBYTES,
    )
    publisher.connect()
    die_waiting(moment)
    publisher.publish()


if __name__ == "__main__":
    main()
