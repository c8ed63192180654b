"""What a Publisher is doing, on standard error: a bar in a terminal, lines in a pipe. Never silent for long."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from types import TracebackType

    from weightcast.trainer.progress import Step

SAID = {
    "load": "loading",
    "read": "reading the checkpoint",
    "wait": "waiting for the server",
    "connect": "connecting",
    "join": "joining",
    "record": "recording where tensors go",
    "joined": "joined",
    "set-up": "setting up transports",
    "gather": "gathering engines and values",
    "check": "looking for values that are NaN or infinite",
    "begin": "beginning",
    "transfer": "transferring",
    "verify": "verifying",
    "commit": "committing",
    "undo": "taking the round back",
}
"""What each phase is called here, in the order in which phases come; how far the bar is follows from that."""
AGAIN_S = 4.0
"""How long a step may take before a pipe is told that it goes on."""


class ShownProgress:
    """A context in which steps are shown. ``tell`` is what a Publisher's ``on_progress`` calls, from any thread."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._started = time.monotonic()
        self._text, self._lock, self._over = "", threading.Lock(), threading.Event()
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=self._console
        )
        self._task: TaskID | None = None
        self._reminder = threading.Thread(target=self._remind, name="weightcast-progress", daemon=True)

    def __enter__(self) -> ShownProgress:
        if self._console.is_terminal:
            self._task = self._bar.add_task("", total=len(SAID))
            self._bar.start()
        else:
            self._reminder.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._task is not None:
            self._bar.stop()
        else:
            self._reminder.join()

    def tell(self, step: Step) -> None:
        """Show one step of a Publisher's."""
        where = f" {step.engine}" if step.engine else ""
        count = f", {step.done} of {step.total} workers" if step.total else ""
        self.say(step.phase, f"{where}{count}", part=step.done / step.total if step.total else 0.0)

    def say(self, phase: str, more: str = "", *, part: float = 0.0) -> None:
        """Show a phase by its name, and what is to be said beside that; ``part`` of it is done."""
        text = SAID.get(phase, phase) + more
        if self._task is not None:
            done = list(SAID).index(phase) + part if phase in SAID else None
            self._bar.update(self._task, description=text, completed=done)
            return
        with self._lock:
            self._text = text
            self._line(text)

    def _line(self, text: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(f"{seconds:6.1f} s  {text}", markup=False, highlight=False, soft_wrap=True)

    def _remind(self) -> None:
        seen = ""
        while not self._over.wait(AGAIN_S):
            with self._lock:
                if seen == self._text and seen:
                    self._line(f"{seen} ...")
                seen = self._text
