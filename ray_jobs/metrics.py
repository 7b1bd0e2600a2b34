"""What a run shows on Ray's Prometheus endpoints, counted where chunks are committed.

Each name gets Ray's prefix: `ray_captioner_pictures_total`. How busy the devices are is the growth of
`ray_captioner_seconds_total{step="generate"}` over the number of caption workers; queues between stages are in Ray
Data's own metrics (`ray_data_...`). `deploy/grafana.json` draws them.
"""

from __future__ import annotations

from captioner.data import Receipt

STEPS = ("read", "decode", "generate", "commit")
BOUNDARIES_S = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]


class RunMetrics:
    """Counters of one worker process. Make one in the process that counts."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._pictures = Counter(
            "captioner_pictures", "Committed pictures; reason is the error code of failed ones.", ("status", "reason")
        )
        self._seconds = Counter("captioner_seconds", "Seconds spent in each step, over all workers.", ("step",))
        self._chunk_seconds = Histogram("captioner_chunk_seconds", "Seconds of a chunk.", BOUNDARIES_S, ("step",))
        self._chunk_pictures = Gauge("captioner_chunk_pictures", "Pictures of the latest committed chunk.")

    def add(self, receipt: Receipt) -> None:
        """Count a committed chunk."""
        for reason, number in [("", receipt.num_ok), *receipt.failed_by_reason.items()]:
            if number:
                self._pictures.inc(number, {"status": "failed" if reason else "ok", "reason": reason})
        for step in STEPS:
            seconds = float(getattr(receipt, f"{step}_seconds"))
            self._chunk_seconds.observe(seconds, {"step": step})
            if seconds > 0:
                self._seconds.inc(seconds, {"step": step})
        self._chunk_pictures.set(receipt.num_rows)
