"""Show a run's progress: a live display on a terminal, or one plain line every 10 s in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO, runtime_checkable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from captioner.console.phases import HEARTBEAT, INTERVAL_S
from captioner.console.text import shorten
from captioner.data import Receipt

RATE_WINDOW_S = 60.0
WIDE = 100  # columns that the bar and the whole line need
NARROW = 60  # columns that the short line fits
HEARTBEAT_S = 10.0
SILENCE_S = 30.0  # without a commit for so long, the line says how long ago the last one was


@runtime_checkable
class TakesFields(Protocol):
    """A stream that takes figures with each line, such as a log of JSON objects."""

    def write_fields(self, line: str, fields: Mapping[str, Any]) -> None: ...


class Progress:
    """Shows a run's progress from its receipts; a context manager, used by one thread.

    `total`: planned images. `already`: those committed before this start. `verb`: what is done with them. `stream`:
    standard error by default; a terminal gets a live display, anything else a line every `interval` seconds
    (INTERVAL_S, if that is shorter, until the first commit) and at the end. Until the first commit the line names
    the open phase. The lines come from a separate thread, so that a stall is visible. A stream that takes fields
    gets `fields()` with each line. `clock`: monotonic seconds.
    """

    def __init__(
        self,
        total: int,
        already: int = 0,
        *,
        verb: str = "captioned",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval: float = HEARTBEAT_S,
    ) -> None:
        self._total, self._already, self._verb = total, already, verb
        self._done, self._failed = already, 0
        self._note = ""
        self._edits = self._words = self._scored = 0
        self._given, self._clock, self._interval = stream, clock, interval
        self._started = self._last = clock()
        self._commits: deque[tuple[float, int]] = deque()  # (time, images done) of the last minute
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, name="progress", daemon=True)

    def __enter__(self) -> Self:
        HEARTBEAT.num_displays += 1
        console = Console(file=self._given, stderr=True)
        if self._stream.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        HEARTBEAT.num_displays -= 1
        HEARTBEAT.line_printed()
        if self._live is not None:
            self._live.stop()
            return
        self._ended.set()
        self._thread.join()
        if line := self.last_line():
            self._write(line)

    @property
    def _stream(self) -> TextIO:
        """What was given, or standard error as it is now: while Ray starts it is another object."""
        return self._given or sys.stderr

    def last_line(self) -> str:
        """Return the last line of a log; "" for none."""
        return f"{self._count()} in {duration(self._clock() - self._started)}  failed {self._failed:,}"

    def update(self, receipt: Receipt, note: str = "") -> None:
        """Count a committed chunk. `note`: additional text for the line."""
        with self._lock:
            self._note = f"  {note}" if note else ""
            self._scored += len(receipt.scored)
            self._edits += sum(edits for edits, _ in receipt.scored)
            self._words += sum(words for _, words in receipt.scored)
        self.add(receipt.num_rows, receipt.num_rows - receipt.num_ok)

    def add(self, num_images: int, num_failed: int) -> None:
        """Count images that are done. `num_failed`: how many of them failed."""
        with self._lock:
            self._last = self._clock()
            self._done += num_images
            self._failed += num_failed
            self._commits.append((self._last, self._done))

    def line(self) -> str:
        """Return the progress as one line of plain text."""
        with self._lock:
            now = self._clock()
            if not self._commits:
                waiting = HEARTBEAT.line() or f"starting, {duration(now - self._started)} so far"
                return f"{self._count()}  {waiting}"
            rate = self._rate(now)
            left = duration((self._total - self._done) / rate) if rate else "--:--"
            silence = f"  last commit {duration(now - self._last)} ago" if now - self._last >= SILENCE_S else ""
            return f"{self._count()}  {_rounded(rate)} img/s  failed {self._failed:,}{self._note}  ETA {left}{silence}"

    def short_line(self) -> str:
        """Return the progress as one line of at most 60 characters, for narrow terminals."""
        with self._lock:
            now = self._clock()
            rate = self._rate(now) if self._commits else 0.0
            count, elapsed = f"{self._done:,}/{self._total:,}", duration(now - self._started)
            if not rate:
                return shorten(f"{count}  {HEARTBEAT.line() or f'starting, {elapsed}'}", NARROW)
            left = duration((self._total - self._done) / rate)
            failed = f"  failed {self._failed:,}" if self._failed else ""
            return shorten(f"{count}  {_rounded(rate)}/s  ETA {left}{failed}", NARROW)

    def fields(self) -> dict[str, Any]:
        """Return the progress as figures for a log with fields; `None` for what is not known yet."""
        with self._lock:
            now = self._clock()
            rate = self._rate(now) if self._commits else 0.0
            return {
                "done": self._done,
                "total": self._total,
                "failed": self._failed,
                "images_per_second": round(rate, 3) if rate else None,
                "eta_seconds": round((self._total - self._done) / rate) if rate else None,
                "elapsed_seconds": round(now - self._started, 1),
                "running_wer": round(self._edits / self._words, 4) if self._words else None,
                "running_wer_rows": self._scored,
            }

    def _count(self) -> str:
        share = 100 * self._done // self._total if self._total else 100
        return f"{self._verb} {self._done:,}/{self._total:,} ({share}%)"

    def _rate(self, now: float) -> float:
        """Return the images per second over the last minute.

        The start-up time counts only until there are two commits to compare.
        """
        while len(self._commits) > 2 and now - self._commits[0][0] > RATE_WINDOW_S:
            self._commits.popleft()
        start, done_at_start = self._commits[0] if len(self._commits) > 1 else (self._started, self._already)
        return (self._done - done_at_start) / (now - start) if now > start else 0.0

    def _write_lines(self) -> None:
        while not self._ended.wait(self._interval if self._commits else min(self._interval, INTERVAL_S)):
            self._write(self.line())

    def _write(self, line: str) -> None:
        if isinstance(self._stream, TakesFields):
            self._stream.write_fields(line, self.fields())
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        HEARTBEAT.line_printed()

    def _render(self) -> RenderableType:
        if self._live is not None and self._live.console.width < WIDE:
            return Text(self.short_line(), no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=max(self._total, 1), completed=self._done if self._total else 1, width=20)
        elapsed = duration(self._clock() - self._started)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(bar, Text(f"{self.line()}  elapsed {elapsed}", no_wrap=True, overflow="ellipsis"))
        return grid


def duration(seconds: float) -> str:
    """Format seconds as mm:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
