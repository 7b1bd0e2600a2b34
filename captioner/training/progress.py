"""Progress of a training run: one live line on a terminal, lines in a log."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from captioner.console.progress import HEARTBEAT_S, Progress, duration
from captioner.console.stopping import notify

START_HEARTBEAT_S = 2.0  # seconds between lines in a log, until the first step
WARNINGS_S = 1.0  # seconds between looks for warnings

ReadProgress = Callable[[], dict[str, Any] | None]


class TrainProgress(Progress):
    """Shows what the run waits for until its first step, then the latest figures of the workers.

    The workers' warnings are printed within a second.
    """

    def __init__(self, *, stream: TextIO | None = None) -> None:
        super().__init__(0, stream=stream, interval=START_HEARTBEAT_S)
        self._read: ReadProgress = lambda: None
        self._samples_per_step = 0
        self._status = ""
        self._latest: dict[str, Any] = {}
        self._num_warnings = 0  # already printed
        self._closing = threading.Event()
        self._warner = threading.Thread(target=self._print_new_warnings, name="warnings", daemon=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._warner.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._warner.join()
        super().__exit__(kind, error, trace)

    def _print_new_warnings(self) -> None:
        is_closing = False
        while not is_closing:
            is_closing = self._closing.wait(WARNINGS_S)
            warnings = (self._read() or {}).get("warnings", [])
            for warning in warnings[self._num_warnings :]:
                notify(warning)
            self._num_warnings = len(warnings)

    def show_status(self, text: str) -> None:
        """Set what the run waits for, such as "listing pairs"; "" while it waits only for its workers."""
        self._status = text

    def set_total(self, total: int, samples_per_step: int) -> None:
        """Set the number of steps of the run, and of samples in each step."""
        self._total, self._samples_per_step = total, samples_per_step

    def watch(self, read: ReadProgress) -> None:
        """Set the function that returns the latest figures of the workers.

        Its keys: `step`, `loss`, `wer`, the shares of equal, empty and cut captions, `samples_per_second`, `warnings`,
        and `status`, what the workers wait for or "".
        """
        self._read = read

    def short_line(self) -> str:
        """Return the line without the shares of captions."""
        return self._line(with_shares=False)

    def line(self) -> str:
        """Return the state as one line of plain text."""
        return self._line(with_shares=True)

    def _line(self, with_shares: bool) -> str:
        latest = self._latest = self._read() or self._latest
        self._done = latest.get("step", 0)
        status = "; ".join(filter(None, [self._status, latest.get("status")]))
        rate = latest.get("samples_per_second")
        self._interval = HEARTBEAT_S if rate else START_HEARTBEAT_S
        if not rate:  # a live display shows the elapsed time itself
            elapsed = "" if self._live else f", {duration(self._clock() - self._started)} so far"
            return f"{self._count()}  {status or 'starting'}{elapsed}"
        loss = "" if latest["loss"] is None else f"  loss {latest['loss']:.4f}"
        wer = "" if latest["wer"] is None else f"  WER {latest['wer']:.3f}"
        eta = f"  ETA {duration(self._seconds_left(rate))}" if self._done < self._total else ""
        shares = _shares(latest) if with_shares else ""
        return f"{self._count()}{loss}{wer}{shares}  {rate:,.1f} samples/s{eta}" + (f"  {status}" if status else "")

    def fields(self) -> dict[str, Any]:
        """Return the latest figures for a structured log."""
        return self._latest | {"total": self._total, "elapsed_seconds": round(self._clock() - self._started, 1)}

    def _seconds_left(self, rate: float) -> float:
        return (self._total - self._done) * self._samples_per_step / rate

    def _count(self) -> str:
        return f"step {self._done:,}/{self._total:,}" if self._total else "training"

    def last_line(self) -> str:
        line = self.line()
        if not self._done:  # the run ended before its first step; the error says why
            return ""
        return f"{line}  in {duration(self._clock() - self._started)}"


def _shares(latest: dict[str, Any]) -> str:
    """Return the share of images with the most frequent caption, and those with an empty or a cut one where above 0."""
    names = {"equal_share": "same caption", "empty_share": "empty", "cut_share": "cut"}
    shares = {name: latest.get(key) for key, name in names.items()}
    if shares["same caption"] is None:
        return ""
    named = [f"{name} {share:.0%}" for name, share in shares.items() if share or name == "same caption"]
    return "  " + ", ".join(named)
