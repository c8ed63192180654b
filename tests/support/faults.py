"""Fault injection: points in the life of a worker, and what can go wrong there.

    shadow            the staged copy is being allocated (in the join)
    join              the trainer asks the engine to join
    setup             an epoch is being set up
    transfer:start    a round's bytes are about to be received
    transfer:middle   some of them are there
    transfer:end      all of them are
    feed:start        the next worker of a chain is about to be fed
    feed:middle       two buckets have gone to it, and the third one has landed here
    feed:end          all of them have gone to it
    loader            the engine's loader has written its first tensor
    commit:start      the order to commit arrived
    commit:worker     one worker of the engine has claimed the round and touched nothing yet; reached by one after the other
    commit:end        the round is live, nobody was told yet
    rollback:start    the order to take a round back arrived
    rollback:end      the version before it is live again, nobody was told yet
    answer            the answer to the order is about to be sent

Faults act on the whole process, so install them in processes that tests started for it (testing.engine_process).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch

from weightcast.control.pump import Pump
from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput
from weightcast.layout.memory import Memory
from weightcast.plan.replay import Replay
from weightcast.receiver.place import Place
from weightcast.receiver.receiver import Receiver
from weightcast.receiver.session import Session
from weightcast.receiver.shadow import Shadow
from weightcast.receiver.worker_round import RoundId
from weightcast.transports.changed import Changing, Read
from weightcast.transports.edges import Feeder
from weightcast.transports.spans import Loading, Unloading

POINTS = (
    "shadow",
    "join",
    "setup",
    "transfer:start",
    "transfer:middle",
    "transfer:end",
    "feed:start",
    "feed:middle",
    "feed:end",
    "loader",
    "commit:start",
    "commit:worker",
    "commit:end",
    "rollback:start",
    "rollback:end",
    "answer",
)
Action = Literal["kill", "stop", "raise", "sleep", "corrupt", "no memory"]


class InjectedFault(RuntimeError):
    """Raised by the action "raise"; its text says where."""


class Faults:
    """Which faults are armed in this process, and which points were reached how often."""

    def __init__(self) -> None:
        self._armed: dict[str, tuple[Action, float, int]] = {}
        self.reached: Counter[str] = Counter()
        self._inside = threading.local()

    def arm(self, point: str, action: Action, seconds: float = 0.0, skip: int = 0) -> None:
        """Have ``action`` happen when ``point`` is reached next, once, but not the first ``skip`` times.

        ``seconds`` is how long a sleep lasts, or how long it takes until "raise" does so.
        """
        if point not in POINTS:
            raise InvalidInput(f"no point {point!r}; known: {', '.join(POINTS)}", field="point")
        self._armed[point] = (action, seconds, skip)

    def disarm(self) -> None:
        self._armed.clear()

    def hit(self, point: str, flat: torch.Tensor | None = None) -> Action | None:
        """A point is reached: count it, do what was armed for it, say what that was. ``flat``: the bytes that may be corrupted."""
        self.reached[point] += 1
        action, seconds = self._due(point)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)  # another thread may take the signal; this one must not go on before all have stopped
        elif action == "sleep":
            time.sleep(seconds)
        elif action == "raise":
            time.sleep(seconds)
            raise InjectedFault(f"injected at {point}")
        elif action == "no memory":
            raise MemoryError("injected: out of memory")
        elif action == "corrupt":
            assert flat is not None
            flat[int(torch.randint(flat.numel(), ()))] ^= 1 << int(torch.randint(8, ()))
        return action

    def _due(self, point: str) -> tuple[Action | None, float]:
        action, seconds, skip = self._armed.pop(point, (None, 0.0, 0))
        if action is not None and skip:
            self._armed[point] = (action, seconds, skip - 1)
            return None, 0.0
        return action, seconds

    # -- hooks

    def install(self, *, gpu: bool = False) -> None:
        """Put the points into this process's receiver. Not undone: meant for processes of their own."""
        self._hook_receive()
        if gpu:
            self._hook_gpu_copies()
        self._hook_feed()
        self._hook_setup()
        self._hook_commit()
        copy_of = Shadow._copy_of

        def allocated(shadow: Shadow, live: Memory, place: Place) -> Memory:
            self.hit("shadow")
            return copy_of(shadow, live, place)

        Shadow._copy_of = allocated  # type: ignore[method-assign, assignment]

    def _hook_receive(self) -> None:
        receive, run, unload, inside = Session.receive, Replay.run, Unloading.run, self._inside

        def received(
            session: Session, id: RoundId, memory: Memory, deadline: Deadline
        ) -> tuple[int, float, int | None]:
            self.hit("transfer:start")
            inside.copies = 0
            try:
                result = receive(session, id, memory, deadline)
            finally:
                inside.copies = None
            first = memory.storages[0]
            if self.hit("transfer:end", first[: first.numel() // 2]) == "corrupt":
                # A digest that was taken while the bytes were copied does not know what the fault did to them on their way.
                return result[0], result[1], None
            return result

        def one_more() -> None:
            copies = getattr(inside, "copies", None)
            if copies is not None:
                inside.copies = copies + 1
                if copies == 2:
                    self.hit("transfer:middle")

        def copied(replay: Replay) -> int:
            one_more()
            return run(replay)

        def unloaded(unloading: Unloading, deadline: Deadline) -> None:
            one_more()
            unload(unloading, deadline)

        Session.receive = received  # type: ignore[method-assign, assignment]
        Replay.run = copied  # type: ignore[method-assign, assignment]
        Unloading.run = unloaded  # type: ignore[method-assign, assignment]
        apply = Changing.apply

        def changed(changing: Changing, several: Sequence[Read], work: Callable[[Callable[[], object]], None]) -> Any:
            one_more()
            return apply(changing, several, work)

        Changing.apply = changed  # type: ignore[method-assign, assignment]

    def _hook_feed(self) -> None:
        feed, hit = Feeder.feed, self.hit

        class Third:
            """The third bucket that is sent on; corrupted, it differs on the wire and not where it landed."""

            def __init__(self, honest: Loading) -> None:
                self._honest, self.spans = honest, honest.spans

            def run(self, deadline: Deadline) -> None:
                self._honest.run(deadline)
                sent = bytearray(b"".join(self._honest.spans))
                if hit("feed:middle", torch.frombuffer(sent, dtype=torch.uint8)) == "corrupt":
                    self.spans = [memoryview(sent)]

        def fed(feeder: Feeder, loadings: Sequence[Loading], *args: Any) -> None:
            hit("feed:start")
            feed(feeder, [*loadings[:2], *map(Third, loadings[2:3]), *loadings[3:]], *args)  # type: ignore[list-item]
            hit("feed:end")

        Feeder.feed = fed  # type: ignore[method-assign, assignment]

    def _hook_gpu_copies(self) -> None:
        """On a GPU the first kernel may do all copies: the middle is where it was queued and nobody waited for it yet."""
        from weightcast.content.proven_on_gpu import ProvenReplay
        from weightcast.cuda.replay import CudaReplay

        for kind in (CudaReplay, ProvenReplay):

            def queued(replay: Any, run: Callable[[Any], int] = kind.run) -> int:
                nbytes = run(replay)
                if getattr(self._inside, "copies", None) == 0:
                    self._inside.copies = 1
                    self.hit("transfer:middle")
                return nbytes

            kind.run = queued  # type: ignore[method-assign, assignment]

    def _hook_setup(self) -> None:
        set_up = Session._set_up

        def hooked(session: Session, setup: Any) -> None:
            self.hit("setup")
            set_up(session, setup)

        Session._set_up = hooked  # type: ignore[method-assign, assignment]

    def _hook_commit(self) -> None:
        """In what a worker does after its claim: what is raised there becomes its word to the trainer, as any error would."""

        def hooked(apply: Callable[..., Any]) -> Callable[..., Any]:
            def applied(*args: Any) -> Any:
                self.hit("commit:worker")
                return apply(*args)

            return applied

        for name in ("_apply_staged", "_apply_in_place"):
            setattr(Receiver, name, hooked(getattr(Receiver, name)))


MessageTrouble = Literal["duplicate", "late", "reorder"]


class MessyChannel:
    """Troubles what this process says over the control channel, until the context ends.

    "duplicate": every message is sent twice. "late": each comes ``seconds`` after its time, in order. "reorder": each second
    one waits until the next was sent, or for ``seconds``.
    """

    def __init__(self, trouble: MessageTrouble, seconds: float = 0.1) -> None:
        self._trouble, self._seconds = trouble, seconds
        self._send: Callable[..., None] = Pump.send
        self._lock = threading.Lock()
        self._held: list[Callable[[], None]] = []
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> MessyChannel:
        Pump.send = lambda pump, *parts: self._mess(pump, *parts)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Pump.send = self._send  # type: ignore[method-assign]
        for timer in self._timers:
            timer.join()
        self._release()

    def _mess(self, pump: Pump, *parts: bytes) -> None:
        if self._trouble == "duplicate":
            self._send(pump, *parts)
            self._send(pump, *parts)
        elif self._trouble == "late":
            self._later(lambda: self._send(pump, *parts))
        else:
            with self._lock:
                first = not self._held
                if first:
                    self._held.append(lambda: self._send(pump, *parts))
            if first:
                self._later(self._release)
            else:
                self._send(pump, *parts)
                self._release()

    def _release(self) -> None:
        with self._lock:
            held, self._held = self._held, []
        for send in held:
            send()

    def _later(self, do: Callable[[], None]) -> None:
        timer = threading.Timer(self._seconds, do)
        timer.daemon = True
        with suppress(ValueError):
            self._timers = [t for t in self._timers if t.is_alive()]
        self._timers.append(timer)
        timer.start()
