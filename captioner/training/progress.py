"""How far a training run has come: one live display on a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from captioner.console.progress import HEARTBEAT_S, Progress, duration

START_HEARTBEAT_S = 2.0  # in a log, until the first step

Look = Callable[[], dict[str, Any] | None]


class TrainProgress(Progress):
    """Shows what the run waits for until its first step, then what the workers told last."""

    def __init__(self, *, stream: TextIO | None = None) -> None:
        super().__init__(0, stream=stream, interval=START_HEARTBEAT_S)
        self._look: Look = lambda: None
        self._per_step = 0
        self._doing = ""
        self._told: dict[str, Any] = {}

    def doing(self, text: str) -> None:
        """Say what the run waits for: "reading pairs"; "" once it waits for nothing but its workers."""
        self._doing = text

    def expect(self, total: int, samples_per_step: int) -> None:
        """Say how many steps there will be, and of how many samples each."""
        self._total, self._per_step = total, samples_per_step

    def watch(self, look: Look) -> None:
        """Take the workers' latest state from `look`.

        It holds `step`, `loss`, `wer`, `samples_per_second`, and `doing`: what they wait for, or "".
        """
        self._look = look

    def line(self) -> str:
        """The state as one line of plain text."""
        told = self._told = self._look() or self._told
        self._done = told.get("step", 0)
        waits = "; ".join(filter(None, [self._doing, told.get("doing")]))
        rate = told.get("samples_per_second")
        self._interval = HEARTBEAT_S if rate else START_HEARTBEAT_S
        if not rate:  # a live display shows the time beside it
            since = "" if self._live else f", {duration(self._clock() - self._started)} so far"
            return f"{self._count()}  {waits or 'starting'}{since}"
        loss = "" if told["loss"] is None else f"  loss {told['loss']:.4f}"
        wer = "" if told["wer"] is None else f"  WER {told['wer']:.3f}"
        left = f"  ETA {duration(self._left(rate))}" if self._done < self._total else ""
        return f"{self._count()}{loss}{wer}  {rate:,.1f} samples/s{left}" + (f"  {waits}" if waits else "")

    def fields(self) -> dict[str, Any]:
        """What the workers told last, as figures."""
        return self._told | {"total": self._total, "elapsed_seconds": round(self._clock() - self._started, 1)}

    def _left(self, rate: float) -> float:
        return (self._total - self._done) * self._per_step / rate

    def _count(self) -> str:
        return f"step {self._done:,}/{self._total:,}" if self._total else "training"

    def last_line(self) -> str:
        line = self.line()
        if not self._done:  # the run ended before its first step, and says why itself
            return ""
        return f"{line}  in {duration(self._clock() - self._started)}"
