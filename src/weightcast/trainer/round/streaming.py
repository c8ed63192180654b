"""Streaming: the rounds of a source that is a stream. The stream is read for workers with a staged copy while engines serve, and read once
more, inside the commit, for workers that write it where it goes live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weightcast.errors import StateError, Unsupported, WeightcastError
from weightcast.messages import Abort
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.link import EngineLink
from weightcast.trainer.fleet.round_book import Cancelled, RoundBook
from weightcast.trainer.round.delivery import Delivery, Pair
from weightcast.trainer.round.reading import Reading

IN_PLACE_TWICE = (
    "an iterator that was given to publish() can be read once, and engines without a staged copy need it twice"
)
STAGED_HINT = (
    "Give the Publisher the function that makes the iterator\n"
    "Or let the engine have a staged copy: mode='staged', or more free memory on its device"
)


class Streaming:
    """The readings of one round."""

    def __init__(self, fleet: Fleet, outcomes: RoundBook, delivery: Delivery) -> None:
        self._fleet, self._outcomes, self._delivery = fleet, outcomes, delivery

    def check(self, pairs: Sequence[Pair]) -> None:
        """Raise Unsupported where the stream would have to be read twice and can be read once."""
        if self._fleet.source.is_spent and any(worker.in_place for _, worker in pairs):
            raise Unsupported(IN_PLACE_TWICE, hint=STAGED_HINT)

    def reading(self, pairs: Sequence[Pair]) -> Reading:
        """A reading for these workers, whose turns count from now on."""
        reading = Reading(self._fleet, self._outcomes, pairs, self._delivery.deadline)
        self._delivery.turns = reading.turns
        return reading

    def read(self, reading: Reading, take: Callable[[int], None]) -> None:
        """Read the stream to its end; ``take`` is called for each window. An engine that failed meanwhile has its own outcome."""
        try:
            reading.run(self._delivery.show_window, take)
        except Cancelled:
            pass  # an engine failed, whose outcome says why
        except BaseException:
            self._outcomes.fail()
            reading.turns.wake()
            raise

    def reading_in_commit(self, engines: Sequence[EngineLink]) -> Reading | None:
        """For those of the engines that write the stream where it goes live; None where there is none."""
        present = [engine for engine in engines if engine.in_place and not self._outcomes.is_over(engine)]
        pairs = [(engine, worker) for engine in present for worker in engine.workers if worker.in_place]
        return self.reading(pairs) if self._fleet.source.layout.is_streamed and pairs else None

    def read_in_commit(self, reading: Reading, engines: Sequence[EngineLink]) -> None:
        """Read the stream while these engines stand still and write it. Where it fails they are dirty, and say so."""
        try:
            reading.run(self._delivery.show_window, lambda window: None)
        except Cancelled:
            pass  # an engine failed, whose outcome says why
        except BaseException as error:
            for engine in engines:
                self._note(engine, error)
                self._end_commit(engine)
            reading.turns.wake()
            if not isinstance(error, Exception):
                raise

    def _note(self, engine: EngineLink, error: BaseException) -> None:
        told = error.message if isinstance(error, WeightcastError) else repr(error)
        text = f"the stream failed when it was read for the commit: {told}"
        failure = StateError(text, engine=engine.name, phase="commit", round=self._delivery.round)
        self._outcomes.note(engine, failure)

    def _end_commit(self, engine: EngineLink) -> None:
        """Have an engine's commit wait for no more bytes."""
        abort = Abort(epoch=self._delivery.epoch, round=self._delivery.round, reason="the stream failed")
        for worker in engine.workers:
            self._delivery.tell(worker, abort)
            if worker.end is not None and worker.in_place and not worker.pulls:
                worker.end.abort()
