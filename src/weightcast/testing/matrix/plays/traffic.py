"""Faults of what travels: bytes, messages, orders to commit and their answers, whole networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from weightcast.deadline import Deadline
from weightcast.errors import WeightcastError
from weightcast.testing.engine_process import SLICE_NBYTES, TOKEN
from weightcast.testing.faults import MessageTrouble, MessyChannel
from weightcast.testing.matrix.field import Failure, Field
from weightcast.testing.matrix.outcome import Outcome, expect
from weightcast.testing.network import Cable
from weightcast.trainer.clients import HttpEngineClient
from weightcast.trainer.clients.base import AnswerLost, CommitOrder, CommitReply

MakeField = Callable[..., Field]


def tensor_larger_than_a_bucket(make: MakeField) -> Outcome:
    with make() as field:
        largest = max(tensor.nbytes for tensor in field.tensors.values())
        expect(largest > 4 * SLICE_NBYTES, "no tensor is larger than a bucket")
        field.start()
        field.heal()
        return Outcome("published, in pieces")


def corrupted_bytes(make: MakeField) -> Outcome:
    with make() as field:
        field.start()
        field.a.arm("transfer:end", "corrupt")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "DigestMismatch", f"{failure.error}")
        field.steady_after(failure)
        return failure.outcome


def messages(make: MakeField, *, trouble: MessageTrouble) -> Outcome:
    with make() as field:
        field.start()
        field.a.call("messy", trouble)
        outcomes = []
        with MessyChannel(trouble):
            for _ in range(3):
                try:
                    field.succeed(field.deadline_s)
                    outcomes.append("published")
                except WeightcastError as error:
                    expect(trouble == "reorder", f"{trouble} messages broke a round: {error}")
                    field.steady(field.b)
                    field.consistent(field.a)
                    outcomes.append("aborted")
        field.a.call("messy", None)
        field.heal()
        return Outcome(", ".join(sorted(set(outcomes))))


class _Lossy(HttpEngineClient):
    """Loses orders to commit, or the answers to them."""

    orders, answers = 0, 0

    def commit(self, order: CommitOrder, deadline: Deadline) -> CommitReply:
        if self.orders:
            self.orders -= 1
            raise AnswerLost("injected: the order was lost", engine=self.name)
        reply = super().commit(order, deadline)
        if self.answers:
            self.answers -= 1
            raise AnswerLost("injected: the answer was lost", engine=self.name)
        return reply


def commit_lost(make: MakeField, *, orders: int = 0, answers: int = 0) -> Outcome:
    with make() as field:
        lossy = _Lossy(field.a.url, token=TOKEN)
        field.start([lossy, field.b.url])
        lossy.orders, lossy.answers = orders, answers
        if max(orders, answers) < 3:
            field.succeed(field.deadline_s)
            return Outcome("repeated and published")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "AnswerLost", f"{failure.error}")
        lossy.orders = lossy.answers = 0
        field.steady(field.a, field.b)
        field.told_truly(failure, field.a, field.b)
        field.heal()
        return failure.outcome


def late_answer(make: MakeField) -> Outcome:
    with make() as field:
        field.start()
        field.a.arm("answer", "sleep", 0.0)
        field.a.arm("commit:end", "sleep", field.deadline_s + 0.4)
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "DeadlineExceeded", f"{failure.error}")
        time.sleep(1.0)
        field.steady(field.a, field.b)
        field.heal()
        return failure.outcome


def http_server_dies(make: MakeField) -> Outcome:
    with make() as field:
        field.start()
        field.a.call("hang_up")
        failure = field.fail()
        expect(failure.causes.get(field.a.url) == "PeerLost", f"{failure.error}")
        field.steady(field.a, field.b)
        field.told_truly(failure, field.a, field.b)
        field.a.kill()
        field.replace()
        field.heal()
        return failure.outcome


def network_cut(make: MakeField, *, point: str) -> Outcome:
    with Cable() as cable, make(host=cable.there, address=cable.here, netns=cable.netns) as field:
        field.start()
        field.a.arm(point, "sleep", 1.0)
        before = field.a.call("reached", point)

        def cut() -> None:
            field.a.wait_for(point, before)
            cable.pull()

        failure = _fail_while(field, cut)
        expect(field.a.url in failure.causes, f"{failure.error} does not name the engine")
        field.steady(field.b)
        field.consistent(field.a)
        cable.plug_in()
        time.sleep(1.5)
        field.consistent(field.a)
        if not point.startswith("commit"):
            field.steady(field.a)
        field.heal()
        return failure.outcome


def _fail_while(field: Field, do: Callable[[], None]) -> Failure:

    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(field.fail)
        do()
        return failing.result()
