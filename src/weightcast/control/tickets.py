"""Tickets: which workers a coordinator admits: each rank of one engine once, within two minutes."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from weightcast.errors import AuthError
from weightcast.messages import Hello
from weightcast.untrusted.secret import same_secret

TICKET_LIFE_S = 120.0
TICKET_HINT = "Connect again: a ticket is good for one engine, once for each rank, and for two minutes"


@dataclass(slots=True)
class Ticket:
    """Admits the ranks of one engine that are not among ``used``. ``large_nbytes`` and ``is_trusted`` are as members have them."""

    secret: str = field(repr=False)
    engine: str
    world_size: int
    expires: float
    large_nbytes: int
    is_trusted: bool
    used: set[int] = field(default_factory=set)


class Tickets:
    """The tickets that are out. Not thread-safe."""

    def __init__(self) -> None:
        self._out: list[Ticket] = []

    def issue(self, engine: str, world_size: int, life_s: float, *, large_nbytes: int, is_trusted: bool) -> str:
        """The secret of a new ticket; earlier tickets of the engine are void."""
        secret = secrets.token_urlsafe(32)
        self._out = [ticket for ticket in self._out if ticket.engine != engine]
        self._out.append(Ticket(secret, engine, world_size, time.monotonic() + life_s, large_nbytes, is_trusted))
        return secret

    def redeem(self, hello: Hello) -> Ticket:
        """The ticket that admits who says this hello; its rank is not admitted a second time. AuthError where there is none."""
        now = time.monotonic()
        self._out = [ticket for ticket in self._out if ticket.expires > now]
        found = None
        for ticket in self._out:  # every ticket is compared, so the time does not tell which one was near
            if same_secret(hello.ticket, ticket.secret):
                found = ticket
        if found is None or found.engine != hello.engine:
            raise AuthError("the ticket is unknown, used or out of date", hint=TICKET_HINT)
        if found.world_size != hello.world_size or not 0 <= hello.rank < found.world_size or hello.rank in found.used:
            raise AuthError(f"the ticket does not admit rank {hello.rank} of {hello.world_size}", hint=TICKET_HINT)
        found.used.add(hello.rank)
        if len(found.used) == found.world_size:
            self._out.remove(found)
        return found
