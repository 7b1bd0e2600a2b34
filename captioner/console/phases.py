"""Say what the program waits for: one line whenever it has printed nothing for a few seconds.

    with phase("loading weights", notify):
        ...                                   "loading weights, 3 s so far", "loading weights, 5 s so far", ...

While a progress display is open, it shows the phase, and no other lines are printed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_S = 2.5  # seconds of silence before a line
MIN_PHASE_S = 0.5  # a shorter phase prints nothing, however long it was silent before it


class Phase:
    """A part of a start that may take long. `text`: what it is; it may change while the phase lasts."""

    def __init__(self, text: str, clock: Callable[[], float]) -> None:
        self.text = text
        self.started = clock()
        self._clock = clock

    def __str__(self) -> str:
        return f"{self.text}, {self._clock() - self.started:.0f} s so far"


class Heartbeat:
    """The open phases of a process, and the time of its last line.

    `clock`: returns seconds. `new_event`: returns an event, whose `wait` waits for the end of a phase.
    `num_displays`: of the progress displays that are open.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, new_event: Callable[[], threading.Event] = threading.Event
    ) -> None:
        self.num_displays = 0
        self._clock, self._new_event = clock, new_event
        self._phases: list[Phase] = []
        self._last_line = clock()

    @contextmanager
    def phase(self, text: str, notify: Callable[[str], None] | None = None) -> Iterator[Phase]:
        """Show `text` and its seconds until the end of the context.

        `notify`: called with each line, in a thread; None where a phase or a display around this one prints.
        """
        phase, ended = Phase(text, self._clock), self._new_event()
        thread = threading.Thread(target=self._report, args=(phase, notify, ended), name="phase", daemon=True)
        self._phases.append(phase)
        if notify is not None:
            thread.start()
        try:
            yield phase
        finally:
            ended.set()
            if notify is not None:
                thread.join()
            self._phases.remove(phase)

    def line(self) -> str:
        """Return the phase that was opened last, and its seconds; "" where none is open."""
        return "".join(map(str, self._phases[-1:]))

    def line_printed(self) -> None:
        """Start to wait anew: a line has been printed."""
        self._last_line = self._clock()

    def _report(self, phase: Phase, notify: Callable[[str], None], ended: threading.Event) -> None:
        while not ended.wait(max(0.0, self._seconds_left(phase))):
            if self._seconds_left(phase) <= 0:  # otherwise another line has been printed meanwhile
                self.line_printed()
                if not self.num_displays:
                    notify(self.line())

    def _seconds_left(self, phase: Phase) -> float:
        return max(self._last_line + INTERVAL_S, phase.started + MIN_PHASE_S) - self._clock()


HEARTBEAT = Heartbeat()
phase = HEARTBEAT.phase
