"""How far a training run has come: one live display on a terminal, one plain line every 10 s in a log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

from captioner.console.progress import HEARTBEAT_S, Progress, duration

Look = Callable[[], dict[str, Any] | None]


class TrainProgress(Progress):
    """Shows what the workers told last. `look` gives it: `step`, `total`, `loss`, `wer`, `samples_per_second`."""

    def __init__(self, total: int, look: Look, samples_per_step: int, *, stream: TextIO | None = None) -> None:
        super().__init__(total, stream=stream, interval=HEARTBEAT_S)
        self._look, self._per_step = look, samples_per_step
        self._told: dict[str, Any] | None = None

    def line(self) -> str:
        """The state as one line of plain text."""
        told = self._told = self._look() or self._told
        if told is None:  # a live display shows the time beside it
            since = "" if self._live else f", {duration(self._clock() - self._started)} so far"
            return f"{self._count()}  starting{since}"
        self._done = told["step"]
        loss = "" if told["loss"] is None else f"  loss {told['loss']:.4f}"
        wer = "" if told["wer"] is None else f"  WER {told['wer']:.3f}"
        rate = told["samples_per_second"]
        speed = f"  {rate:,.1f} samples/s" if rate else ""
        left = f"  ETA {duration(self._left(rate))}" if rate and self._done < self._total else ""
        return f"{self._count()}{loss}{wer}{speed}{left}"

    def fields(self) -> dict[str, Any]:
        """What the workers told last, as figures."""
        return dict(self._told or {}) | {"elapsed_seconds": round(self._clock() - self._started, 1)}

    def _left(self, rate: float) -> float:
        return (self._total - self._done) * self._per_step / rate

    def _count(self) -> str:
        return f"step {self._done:,}/{self._total:,}"

    def last_line(self) -> str:
        return f"{self.line()}  in {duration(self._clock() - self._started)}"
