"""The metrics of a run on Ray's Prometheus endpoints: each worker counts its own work, the driver the receipts.

Each name gets Ray's prefix: `ray_captioner_pictures_total`. Queues between the stages of Ray Data are in its own
metrics (`ray_data_...`). `deploy/grafana.json` shows these metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from captioner.data import Receipt

STEPS = ("read", "decode", "generate", "commit")
BOUNDARIES_S = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


class RunMetrics:
    """Counters of one worker that commits, created in its process."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._images = Counter(
            "captioner_pictures", "Committed images; reason is the error code of failed ones.", ("status", "reason")
        )
        self._seconds = Counter("captioner_seconds", "Seconds spent in each step, over all workers.", ("step",))
        self._chunk_seconds = Histogram("captioner_chunk_seconds", "Seconds of a chunk.", BOUNDARIES_S, ("step",))
        self._chunk_pictures = Gauge("captioner_chunk_pictures", "Images of the latest committed chunk.")
        self._tokens = Counter("captioner_input_tokens", "Tokens of batches; kind: used or padding.", ("kind",))

    def add(self, receipt: Receipt) -> None:
        """Count a committed chunk."""
        for reason, number in [("", receipt.num_ok), *receipt.failed_by_reason.items()]:
            if number:
                self._images.inc(number, {"status": "failed" if reason else "ok", "reason": reason})
        for step in STEPS:
            seconds = float(getattr(receipt, f"{step}_seconds"))
            self._chunk_seconds.observe(seconds, {"step": step})
            if seconds > 0:
                self._seconds.inc(seconds, {"step": step})
        self._chunk_pictures.set(receipt.num_rows)
        if receipt.input_tokens:
            self._tokens.inc(receipt.input_tokens - receipt.padding_tokens, {"kind": "used"})
        if receipt.padding_tokens:
            self._tokens.inc(receipt.padding_tokens, {"kind": "padding"})


class DeviceMetrics:
    """Gauges of one worker that captions, for use by several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from ray.util.metrics import Gauge

        self._busy = Gauge("captioner_device_busy_share", "Share of the time a caption worker captioned, 0 to 1.")
        self._batch = Gauge("captioner_batch_size", "Maximum number of images of a forward pass.")
        self._clock = clock
        self._since = clock()
        self._lock = threading.Lock()

    def add(self, seconds: float, batch_size: int) -> float:
        """Count a chunk that was captioned in `seconds` and ends now; return the busy seconds since the previous chunk.

        The two may have been captioned at the same time. The busy share is of the time since the previous chunk.
        """
        with self._lock:
            now = self._clock()
            passed, self._since = now - self._since, now
            busy = min(seconds, passed)
            self._busy.set(busy / passed if passed > 0 else 1.0)
            self._batch.set(batch_size)
            return busy


class DriverMetrics:
    """Gauges of the driver: remaining images, and the WER so far."""

    def __init__(self, num_rows: int) -> None:
        from ray.util.metrics import Gauge

        self._queue = Gauge("captioner_queue_pictures", "Planned images that are not committed yet.")
        self._wer = Gauge("captioner_running_wer", "WER of the captions of this run that have been scored so far.")
        self._left, self._edits, self._words = num_rows, 0, 0
        self._queue.set(num_rows)

    def add(self, receipt: Receipt) -> None:
        """Count a committed chunk."""
        self._left -= receipt.num_rows
        self._queue.set(self._left)
        self._edits += sum(edits for edits, _ in receipt.scored)
        self._words += sum(words for _, words in receipt.scored)
        if self._words:
            self._wer.set(self._edits / self._words)
