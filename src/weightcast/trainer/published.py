"""Published: what all trainer ranks hold to publish, as rank 0 sees it. It is looked at anew, gathered before a round, and checked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from weightcast.deadline import Deadline
from weightcast.errors import StateError, Unsupported, WeightcastError, WeightsMoved
from weightcast.manifest.dtypes import name_of
from weightcast.manifest.names import number_of, shown
from weightcast.sources import Source
from weightcast.sources.holder import Holder
from weightcast.trainer.fleet.fleet import Fleet
from weightcast.trainer.fleet.places import refuse_idle
from weightcast.trainer.fleet.presence import Presence
from weightcast.trainer.ranks import Ranks
from weightcast.trainer.round.timeline import Timeline
from weightcast.trainer.settings import Settings

logger = logging.getLogger(__name__)


class Published:
    """The sources of all ranks, and the fleet that learns what became of them. Not thread-safe: one call at a time."""

    def __init__(self, holder: Holder, ranks: Ranks, fleet: Fleet, presence: Presence, settings: Settings) -> None:
        self._holder, self._ranks, self._settings = holder, ranks, settings
        self._fleet, self._presence = fleet, presence

    @property
    def _source(self) -> Source:
        return self._holder.source

    @property
    def last_check(self) -> Callable[[], None]:
        """What is left to check of the source while a round runs; ``gather`` has checked everything where there are several ranks."""
        return self._source.check if self._ranks.alone and not self._source.layout.is_streamed else _nothing

    def renew(self, deadline: Deadline) -> None:
        """Look at the source anew, on all ranks."""
        manifest, source = self._ranks.manifest, self._source
        is_other_form = True
        try:
            if not self._ranks.renew(deadline):
                return
            is_other_form = self._ranks.manifest != manifest
        except WeightcastError:
            # Other ranks may have taken up theirs.
            if self._ranks.alone and self._source is source:
                raise
            self._take_up(is_other_form)
            raise
        self._take_up(is_other_form)

    def _take_up(self, is_other_form: bool) -> None:
        for engine in self._fleet.engines:
            self._presence.forget(engine)  # an attempt that runs knows the former manifest
        self._fleet.take_up(is_other_form=is_other_form)

    def follow(self, look: Callable[[], None], deadline: Deadline) -> bool:
        """``look`` at the source; where its tensors have moved, take them up where they are. Whether that was so: engines then have to be
        set up again, and keep their place in the fleet."""
        try:
            look()
        except WeightsMoved:
            self.renew(deadline)
            return True
        return False

    def gather(self, deadline: Deadline) -> None:
        """Have all ranks hold the values to publish; a stream is read by the round."""
        if self._source.layout.is_streamed:
            return
        if self._ranks.alone:
            self._source.deadline = deadline
            self._source.fill()
        else:
            self._ranks.refresh(deadline)

    def non_finite(self, deadline: Deadline, timeline: Timeline) -> dict[str, int]:
        """How many published values are NaN or infinite, by tensor; a StateError where such values are refused."""
        with timeline.phase("check"):
            check = partial(deadline.check, "the check for values that are NaN or infinite")
            counted = self._fleet.content(deadline).non_finite(self._source.memory, check)
        if counted and self._settings.check_finite is True:
            told = [f"{name} ({count})" for name, count in counted.items()]
            raise StateError(
                f"{len(counted)} of {number_of(len(self._ranks.manifest), 'tensor')} {'has' if len(counted) == 1 else 'have'} values that are NaN or infinite: {shown(told)}",
                phase="check",
                hint='Find out where they come from; check_finite="count" publishes them and counts them in the report',
            )
        return counted

    def check_settings(self) -> None:
        """Raise InvalidInput for what can be told only once all ranks have said what they hold."""
        refuse_idle(self._settings.unused, self._ranks.manifest)
        if self._settings.check_finite and self._source.layout.is_streamed:
            raise Unsupported("check_finite for a stream", hint="Check the tensors before the stream yields them")

    def warn_of_rounding(self) -> None:
        """Say where ``dtype`` rounds values that an engine could hold exactly."""
        if self._source.dtype is None:
            return
        manifest, dtype = self._ranks.manifest, name_of(self._source.dtype)
        for engine in self._fleet.engines:
            if wider := engine.wider(manifest, dtype):
                name, kept = min(wider.items())
                logger.warning(
                    "%s keeps %d of %d tensors wider than dtype=%s (%r in %s): what goes live there is rounded to %s. "
                    "Leave dtype out to publish each value as it is given",
                    *(engine.name, len(wider), len(manifest), dtype, name, kept, dtype),
                )
                return


def _nothing() -> None:
    """What is left to check of a source that has checked everything."""
