"""tcp: buckets over authenticated TCP connections between two processes on any hosts, for weights in whatever memory on either side.

Load-bearing properties:

- Both sides prove that they know the pair's secret before a byte of weights travels (rendezvous module), and nothing that
  arrives afterwards can do more than end the pair with a named error.
- Several connections, the *lanes*, take buckets in turn, each driven by a thread of its own on either side: one packs (or
  unpacks) while another is on the wire.
- Values that are contiguous and need no cast are sent straight from the source's memory and received straight into their place;
  others are packed into a lane's buffer, as is all that lies on a GPU, by that GPU: the buffer is page-locked then. Which way a side
  goes is its own business: the bytes on the wire are the same.
- A bucket travels behind its number in the life of the pair and its size, so that two sides that lost step notice it. Where the
  worker holds what the bucket was in the round before, and says so, the bucket may travel as what changed since (see delta).
- Unless the trainer asked for TLS, nothing on the wire is encrypted or protected against somebody who sits on the path.

Wire, on lane ``i % lanes`` for the i-th bucket of a round: 17 bytes (bucket's number since connect, bytes that follow, both
big-endian unsigned 64; one byte: 0 for values, 1 for changes, 2 for changes behind the digest, big-endian unsigned 64, of what was
at their places before), then the bucket, or its changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from weightcast.errors import InvalidInput, PlanMismatch, ProtocolError
from weightcast.layout.memory import Memory
from weightcast.plan import Copy, copies_digest
from weightcast.transports.base import Facts, TrainerEnd, Transport, WorkerEnd
from weightcast.transports.buckets import check_bucket_nbytes
from weightcast.transports.relays import RelayedWorkerEnd, can_relay, chain
from weightcast.transports.tcp_ends import TcpOffer, TcpTrainerEnd, TcpWorkerEnd
from weightcast.untrusted.known import known


class TcpTransport(Transport):
    """Any memory over TCP; pushes."""

    name = "tcp"
    pulls = False
    preference = 40
    carries_changes = True
    default_bucket_nbytes = 8 * 2**20

    def refusal(self, trainer: Facts, worker: Facts) -> str | None:
        for side, facts in (("trainer", trainer), ("worker", worker)):
            if facts.device not in ("cpu", "cuda"):
                return f"the {side}'s weights are on {facts.device}, {self.name} moves memory of CPUs and CUDA GPUs"
        return None

    def identity(self) -> bytes:
        """What a pair's sides prove themselves with beside the secret; nothing here."""
        return b""

    def adopt(self, memory: Memory) -> Memory:
        return memory

    def release(self, memory: Memory) -> None:
        return None

    def trainer_end(
        self, copies: Sequence[Copy], memory: Memory, *, bucket_nbytes: int = default_bucket_nbytes, address: str = ""
    ) -> TrainerEnd:
        check_bucket_nbytes(bucket_nbytes)
        return TcpTrainerEnd(copies, memory, bucket_nbytes, address or "127.0.0.1", self.identity())

    def worker_end(self, offer: bytes, copies: Sequence[Copy]) -> WorkerEnd:
        try:
            decoded = msgspec.msgpack.decode(offer, type=known(TcpOffer))
            check_bucket_nbytes(decoded.bucket_nbytes)
        except (msgspec.DecodeError, UnicodeDecodeError, InvalidInput) as error:
            raise ProtocolError(f"malformed {self.name} offer: {error}") from None
        if bool(decoded.identity) != bool(self.identity()):
            raise ProtocolError(f"malformed {self.name} offer: with a certificate or without one")
        if decoded.plan != copies_digest(copies):
            raise PlanMismatch("trainer and worker compiled different copies for this pair")
        return TcpWorkerEnd(copies, decoded) if decoded.edge is None else RelayedWorkerEnd(copies, decoded)

    def relays(self, copies: Sequence[Copy]) -> bool:
        """Where what travels is what lands, so that a worker can send it on from where it landed."""
        return can_relay(copies)

    def relayed_ends(
        self,
        count: int,
        copies: Sequence[Copy],
        memory: Memory,
        *,
        bucket_nbytes: int = default_bucket_nbytes,
        address: str = "",
        patience_s: float = 5.0,
    ) -> list[TrainerEnd]:
        check_bucket_nbytes(bucket_nbytes)
        return list(chain(count, copies, memory, bucket_nbytes, address or "127.0.0.1", self.identity(), patience_s))


__all__ = ["TcpOffer", "TcpTransport"]
