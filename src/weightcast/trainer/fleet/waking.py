"""Waking: what ``publish(wake=True)`` asks of engines that sleep, before a round and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from weightcast.commit.worker_outcome import WEIGHTS
from weightcast.deadline import Deadline
from weightcast.errors import EngineError, Unsupported, WeightcastError
from weightcast.trainer.fleet.link import EngineLink


class Waking:
    """Wakes engines up for one call of ``publish``. ``asleep`` is what sleeps in each of them, as last heard, by name."""

    def __init__(self) -> None:
        self.asleep: dict[str, tuple[str, ...]] = {}

    def weights(self, engines: Sequence[EngineLink], deadline: Deadline) -> dict[str, WeightcastError]:
        """Wake the weights of these engines up; errors by name. Raises Unsupported where one of them cannot sleep."""
        errors = _each(engines, lambda engine: self._wake(engine, (WEIGHTS,), deadline))
        unable = next((error for error in errors.values() if isinstance(error, Unsupported)), None)
        if unable is not None:
            raise unable
        return errors

    def rest(self, engines: Sequence[EngineLink], deadline: Deadline) -> dict[str, WeightcastError]:
        """Wake all that sleeps in these engines up; errors by name."""
        return _each(engines, lambda engine: self._wake(engine, (), deadline))

    def _wake(self, engine: EngineLink, tags: tuple[str, ...], deadline: Deadline) -> None:
        asleep = self.asleep[engine.name] = tuple(engine.client.wake(tags, deadline))
        left = [tag for tag in asleep if not tags or tag in tags]
        if left:
            raise EngineError(f"it was told to wake up, and {' and '.join(left)} sleep on", engine=engine.name)


def shut_down(engines: Sequence[EngineLink], deadline: Deadline) -> dict[str, WeightcastError]:
    """Have these engines leave their trainer, with all that they hold of its memory; errors by name."""
    return _each(engines, lambda engine: engine.client.shutdown(deadline))


def _each(engines: Sequence[EngineLink], ask: Callable[[EngineLink], None]) -> dict[str, WeightcastError]:
    """Ask all engines at once; a single one on the caller's own thread, which may be the one that its model runs on."""
    errors: dict[str, WeightcastError] = {}

    def asked(engine: EngineLink) -> None:
        try:
            ask(engine)
        except WeightcastError as error:
            errors[engine.name] = error.at(engine=engine.name, phase="wake")

    if len(engines) == 1:
        asked(engines[0])
    elif engines:
        with ThreadPoolExecutor(len(engines), thread_name_prefix="weightcast-wake") as pool:
            list(pool.map(asked, engines))
    return errors
