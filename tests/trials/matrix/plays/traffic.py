"""Faults of what travels: bytes, messages, orders to commit and their answers, whole networks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.support.engine_process import SLICE_NBYTES, TOKEN
from tests.support.faults import MessageTrouble, MessyChannel
from tests.support.network import Cable
from tests.trials.matrix.failure import Failure
from tests.trials.matrix.field import UNKNOWN, Field
from tests.trials.matrix.outcome import Finding, expect
from weightcast.deadline import Deadline
from weightcast.errors import DeadlineExceeded, DigestMismatch, PeerLost, WeightcastError
from weightcast.trainer.clients import HttpEngineClient
from weightcast.trainer.clients.base import AnswerLost, CommitOrder, CommitReply

MakeField = Callable[..., Field]


def tensor_larger_than_a_bucket(make: MakeField) -> Finding:
    with make() as field:
        largest = max(tensor.nbytes for tensor in field.tensors.values())
        expect(largest > 4 * SLICE_NBYTES, "no tensor is larger than a bucket")
        field.start()
        field.heal()
        return Finding("published, in pieces")


def corrupted_bytes(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        field.a.arm("transfer:end", "corrupt")
        failure = field.fail(field.unhurried_s)
        failure.names(field.a.url, DigestMismatch)
        field.steady_after(failure)
        return failure.outcome


def messages(make: MakeField, *, trouble: MessageTrouble) -> Finding:
    with make() as field:
        field.start()
        field.a.call("messy", trouble)
        outcomes = []
        with MessyChannel(trouble):
            for _ in range(3):
                try:
                    field.succeed(field.unhurried_s)
                    outcomes.append("published")
                except WeightcastError as error:
                    expect(trouble == "reorder", f"{trouble} messages broke a round: {error}")
                    field.steady(field.b)
                    field.consistent(field.a)
                    outcomes.append("aborted")
        field.a.call("messy", None)
        field.heal()
        return Finding(", ".join(sorted(set(outcomes))))


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


def commit_lost(make: MakeField, *, orders: int = 0, answers: int = 0) -> Finding:
    with make() as field:
        lossy = _Lossy(field.a.url, token=TOKEN)
        field.start([lossy, field.b.url])
        lossy.orders, lossy.answers = orders, answers
        if max(orders, answers) < 3:
            field.succeed(field.unhurried_s)
            return Finding("repeated and published")
        failure = field.fail()
        failure.names(field.a.url, AnswerLost)
        lossy.orders = lossy.answers = 0
        field.steady(field.a, field.b)
        field.told_truly(failure, field.a, field.b)
        field.heal()
        return failure.outcome


def late_answer(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        field.a.arm("commit:end", "sleep", field.deadline_s + 0.3)
        failure = field.fail()
        failure.names(field.a.url, DeadlineExceeded)
        field.steady_after(failure)
        return failure.outcome


def http_server_dies(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        field.a.call("hang_up")
        failure = field.fail(field.unhurried_s)
        failure.names(field.a.url, PeerLost)
        field.steady(field.a, field.b)
        field.told_truly(failure, field.a, field.b)
        field.a.kill()
        field.replace()
        field.heal()
        return failure.outcome


def http_server_dies_in_the_commit(make: MakeField) -> Finding:
    with make() as field:
        field.start()
        field.a.arm("commit:start", "sleep", 0.5)
        failure = _fail_while(field, "commit:start", lambda: field.a.call("hang_up"), field.unhurried_s)
        failure.names(field.a.url, PeerLost)
        expect(failure.says_of(field.a.url) == UNKNOWN, f"it cannot be asked: {failure.error}")
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.consistent(field.a)
        field.a.kill()
        field.replace()
        field.heal()
        return failure.outcome


def network_cut(make: MakeField, *, point: str) -> Finding:
    with Cable() as cable, make(host=cable.there, address=cable.here, netns=cable.netns) as field:
        field.start()
        field.a.arm(point, "sleep", 1.0)
        failure = _fail_while(field, point, cable.pull, field.deadline_s)
        failure.names(field.a.url, DeadlineExceeded, PeerLost)
        field.steady(field.b)
        field.told_truly(failure, field.b)
        field.told_carefully(failure)
        field.consistent(field.a)
        cable.plug_in()
        field.consistent(field.a)
        if not point.startswith("commit"):
            field.steady(field.a)
        field.heal()
        return failure.outcome


def _fail_while(field: Field, point: str, do: Callable[[], None], timeout_s: float) -> Failure:
    """The failure of a publish during which something is done once the victim has reached a point."""
    before = field.a.call("reached", point)
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(field.fail, timeout_s)
        field.a.wait_for(point, before)
        do()
        return failing.result()
