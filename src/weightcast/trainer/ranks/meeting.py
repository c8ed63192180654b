"""Meeting: what trainer ranks tell each other over their process group when a Publisher is made, with a deadline.

Twice a few bytes go from every rank to every other: first who is where and what went wrong there, then how to reach rank 0. An
error of one rank is raised on all of them.
"""

from __future__ import annotations

from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from weightcast.control.link import JoinInfo
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, ErrorForm, InvalidInput, PeerLost, ProtocolError
from weightcast.transports.facts import host_identity
from weightcast.untrusted.known import known

FRAME_NBYTES = 8192
_HEAD_NBYTES = 4
_TEXT_CHARACTERS = 1000


class _Greeting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rank says."""

    host: str = ""
    info: JoinInfo | None = None
    error: ErrorForm | None = None


class Meeting:
    """The trainer's process group, used only to meet. ``rank`` and ``size`` count inside it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise InvalidInput("this process is not in the process group", field="process_group")
        self._group = group
        # NCCL moves nothing but GPU memory.
        self._device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def meet(self, deadline: Deadline, error: Exception | None = None) -> bool:
        """Collective: whether all ranks are on one host. Raises the error of whoever has one, its own first."""
        greetings = self._exchange(_Greeting(host=host_identity(), error=_shortened(error)), deadline, error)
        return len({greeting.host for greeting in greetings}) == 1

    def introduce(self, deadline: Deadline, info: JoinInfo | None, error: Exception | None = None) -> JoinInfo:
        """Collective: what rank 0 gave as ``info``. Raises as ``meet`` does."""
        greetings = self._exchange(_Greeting(info=info, error=_shortened(error)), deadline, error)
        if greetings[0].info is None:
            raise ProtocolError("trainer rank 0 did not say how to reach it")
        return greetings[0].info

    def _exchange(self, mine: _Greeting, deadline: Deadline, error: Exception | None) -> list[_Greeting]:
        frames = self._gather(msgspec.msgpack.encode(mine), deadline)
        if error is not None:
            raise error
        try:
            greetings = [msgspec.msgpack.decode(frame, type=known(_Greeting)) for frame in frames]
        except (msgspec.DecodeError, UnicodeDecodeError) as problem:
            raise ProtocolError(
                f"a trainer rank said something else: {problem}", hint="Use the same weightcast on all ranks"
            ) from None
        for rank, greeting in enumerate(greetings):
            if greeting.error is not None:
                told = greeting.error.error()
                told.message = f"trainer rank {rank}: {told.message}"
                raise told
        return greetings

    def _gather(self, mine: bytes, deadline: Deadline) -> list[bytes]:
        """What every rank gave, in order of rank. The process group may be of no use after an error."""
        if len(mine) > FRAME_NBYTES - _HEAD_NBYTES:
            raise InvalidInput(f"{len(mine)} bytes are too many for a greeting")
        frame = bytearray(FRAME_NBYTES)
        frame[:_HEAD_NBYTES] = len(mine).to_bytes(_HEAD_NBYTES, "big")
        frame[_HEAD_NBYTES : _HEAD_NBYTES + len(mine)] = mine
        sent = torch.frombuffer(frame, dtype=torch.uint8).to(self._device)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            work = dist.all_gather(received, sent, group=self._group, async_op=True)
            assert work is not None
            # Gloo cuts the limit to whole milliseconds; without one more it would end before the deadline does.
            work.wait(deadline.limit() + timedelta(milliseconds=2))
            return [_content(bytes(tensor.cpu().numpy())) for tensor in received]
        except RuntimeError as error:
            hint = "Make a Publisher on every rank of the process group, or give process_group=None where one rank publishes alone"
            if deadline.passed:
                raise DeadlineExceeded(
                    f"not every trainer rank came within {deadline.timeout_s:g} s", phase="join", hint=hint
                ) from error
            text = next(iter(str(error).splitlines()), "")
            raise PeerLost(
                f"trainer ranks could not meet over their process group: {text}", phase="join", hint=hint
            ) from error


def _content(frame: bytes) -> bytes:
    nbytes = int.from_bytes(frame[:_HEAD_NBYTES], "big")
    return frame[_HEAD_NBYTES : _HEAD_NBYTES + nbytes]


def _shortened(error: Exception | None) -> ErrorForm | None:
    """The error in a form that fits in a greeting."""
    if error is None:
        return None
    form = ErrorForm.of(error)
    hint = None if form.hint is None else form.hint[:_TEXT_CHARACTERS]
    return ErrorForm(kind=form.kind, message=form.message[:_TEXT_CHARACTERS], hint=hint)
