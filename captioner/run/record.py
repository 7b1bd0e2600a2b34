"""What a run did, as it is added up from receipts and written to OUT/run.json."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from captioner.config import CaptionConfig
from captioner.data import Chunk, Receipt
from captioner.errors import CaptionerError, CheckFailedError, StoppedEarlyError, TooManyFailedError
from captioner.files import shown
from captioner.run.bottleneck import busy_shares
from captioner.run.job import Job
from captioner.store.table import Plan
from captioner.store.verify import TableCounts


@dataclass
class Tally:
    """What the receipts of a run add up to."""

    num_rows: int = 0
    skipped: int = 0
    read: float = 0.0
    decode: float = 0.0
    generate: float = 0.0
    commit: float = 0.0
    first_at: float | None = None
    last_at: float | None = None
    first_rows: int = 0
    startup: float = 0.0
    duplicates: int = 0
    engine: str = ""
    devices: set[str] = field(default_factory=set)
    slots: dict[str, float] | None = None
    working_since: float = 0.0

    def skip(self, plan: Plan, missing: list[Chunk]) -> int:
        """Note what of a plan was committed before this start; returns how many images that is."""
        already = plan.num_rows - sum(chunk.num_rows for chunk in missing)
        self.skipped += already
        return already

    def add(self, receipt: Receipt, started: float) -> None:
        now = time.perf_counter()
        parts = (receipt.read_seconds, receipt.decode_seconds, receipt.generate_seconds, receipt.commit_seconds)
        self.num_rows += receipt.num_rows
        self.duplicates += receipt.num_duplicates
        self.engine = receipt.engine or self.engine
        self.devices |= {receipt.device} - {""}
        self.read, self.decode = self.read + parts[0], self.decode + parts[1]
        self.generate, self.commit = self.generate + parts[2], self.commit + parts[3]
        if self.first_at is None:
            self.first_at, self.first_rows = now, receipt.num_rows
            self.startup = max(0.0, now - started - sum(parts))
            self.working_since = now - sum(parts)
        self.last_at = now

    @property
    def seconds(self) -> dict[str, float]:
        """Spent in each step, added up over all workers."""
        return {"read": self.read, "decode": self.decode, "generate": self.generate, "commit": self.commit}

    @property
    def busy(self) -> dict[str, float]:
        """Shares of the time that decoding, devices and writing were at work; {} before the end."""
        if self.slots is None or self.last_at is None:
            return {}
        shares = busy_shares(self.seconds, self.slots, self.last_at - self.working_since)
        return {name: round(share, 3) for name, share in shares.items()}

    @property
    def images_per_second(self) -> float | None:
        """Steady state: from the first receipt to the last; over the time after start-up where there is one only."""
        if self.first_at is None or self.last_at is None:
            return None
        if self.last_at > self.first_at:
            return (self.num_rows - self.first_rows) / (self.last_at - self.first_at)
        spent = self.read + self.decode + self.generate + self.commit
        return self.num_rows / spent if spent else None


@contextmanager
def recorded(job: Job) -> Iterator[Tally]:
    """The tally of a run; where the run is stopped or fails, its record says so."""
    tally = Tally()
    try:
        yield tally
    except BaseException as error:
        recorded_already = isinstance(error, (TooManyFailedError, CheckFailedError))  # that run is finished
        if not recorded_already or isinstance(error, StoppedEarlyError):
            with suppress(CaptionerError):
                write_record(job, make_record(job, f"stopped: {str(error) or type(error).__name__}", tally))
        raise


def make_record(job: Job, state: str, tally: Tally, counts: TableCounts | None = None) -> dict[str, Any]:
    """The run as JSON: what OUT/run.json and OUT/runs/RUN_ID.json hold."""
    model = job.work.model if job.work else None
    plans = job.table.plans()
    rate = tally.images_per_second
    return {
        "run_id": job.run_id,
        "state": state,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": shown(job.config.source.path),
        "output": shown(job.config.output.path),
        "counts": {
            **(asdict(counts) if counts else {"planned": sum(p.num_rows for p in plans if p.founds_parts)}),
            "captioned_in_this_run": tally.num_rows,
            "duplicates": tally.duplicates,
            "skipped": tally.skipped,
            "ignored": sum(plan.num_ignored for plan in plans),
        },
        "seconds": {
            "startup": round(tally.startup, 3),
            "run": round(time.perf_counter() - job.started, 3),
            **{name: round(value, 3) for name, value in tally.seconds.items()},
        },
        "busy": tally.busy,
        "slots": tally.slots,
        "images_per_second": None if rate is None else round(rate, 2),
        "engine": tally.engine,
        "model": None if model is None else {**asdict(model), "fingerprint": model.fingerprint},
        "fingerprint": job.table.info["fingerprint"],
        "models": job.table.info.get("models", {}),
        "settings": _without_keys(job.config),
        "notes": job.notes,
        "versions": versions(),
        "hardware": hardware(tally.devices),
    }


def _without_keys(config: CaptionConfig) -> dict[str, Any]:
    """The settings as a record keeps them: keys in URIs are for the run alone."""
    settings = config.model_dump()
    for group in ("source", "output"):
        settings[group]["path"] = shown(settings[group]["path"])
    return settings


def write_record(job: Job, record: dict[str, Any]) -> None:
    job.table.directory.write_json(f"runs/{job.run_id}.json", record)
    job.table.directory.write_json("run.json", record)


def versions() -> dict[str, str]:
    """Versions of what a caption depends on."""
    found = {"python": platform.python_version()}
    for package in ("captioner", "ray", "transformers", "torch", "pyarrow", "pillow"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def hardware(devices: set[str]) -> dict[str, str]:
    """What the driver runs on, and which kinds of devices captioned."""
    facts = {"machine": f"{platform.system()} {platform.machine()}", "cpus": str(os.cpu_count())}
    return facts | ({"devices": "; ".join(sorted(devices))} if devices else {})
