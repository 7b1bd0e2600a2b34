"""The record of a run: totals of its receipts, written to OUT/run.json."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from captioner.config import CaptionConfig, ModelConfig
from captioner.data import NO_USAGE, Chunk, Receipt, Usage
from captioner.errors import CaptionerError, CheckFailedError, StoppedEarlyError, TooManyFailedError
from captioner.files import shown
from captioner.run.bottleneck import busy_shares
from captioner.run.job import Job
from captioner.run.question_checks import question_notes
from captioner.store.counts import TableCounts
from captioner.store.plan import num_ignored
from captioner.store.table import RUN_FILE, Plan


@dataclass
class Tally:
    """Totals of the receipts of a run. Times in seconds, added up over all workers."""

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
    usage: Usage = NO_USAGE
    blank_columns: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)

    def skip(self, plan: Plan, missing: list[Chunk]) -> int:
        """Count the images of a plan that were committed before this run, and return their number."""
        num_committed = plan.num_rows - sum(chunk.num_rows for chunk in missing)
        self.skipped += num_committed
        return num_committed

    def add(self, receipt: Receipt, started: float) -> None:
        """Add a receipt. `started`: when the run started, by `time.perf_counter`."""
        now = time.perf_counter()
        parts = (receipt.read_seconds, receipt.decode_seconds, receipt.generate_seconds, receipt.commit_seconds)
        self.num_rows += receipt.num_rows
        self.duplicates += receipt.num_duplicates
        self.usage = Usage.total([self.usage, Usage(*(getattr(receipt, name) for name in Usage._fields))])
        self.blank_columns.update(receipt.blank_columns)
        self.unanswered.update(receipt.unanswered)
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
        """The time spent in each step, added up over all workers."""
        return {"read": self.read, "decode": self.decode, "generate": self.generate, "commit": self.commit}

    @property
    def busy(self) -> dict[str, float]:
        """Shares of the time in which decoding, devices and writing were busy; {} before the end."""
        if self.slots is None or self.last_at is None:
            return {}
        shares = busy_shares(self.seconds, self.slots, self.last_at - self.working_since)
        return {name: round(share, 3) for name, share in shares.items()}

    @property
    def images_per_second(self) -> float | None:
        """The rate between the first and the last receipt; of a single receipt, over the time after start-up."""
        if self.first_at is None or self.last_at is None:
            return None
        if self.last_at > self.first_at:
            return (self.num_rows - self.first_rows) / (self.last_at - self.first_at)
        spent = self.read + self.decode + self.generate + self.commit
        return self.num_rows / spent if spent else None


@contextmanager
def recorded(job: Job) -> Iterator[Tally]:
    """Yield the tally of a run; where the run is stopped or fails, write that to its record."""
    tally = Tally()
    try:
        yield tally
    except BaseException as error:
        is_finished = isinstance(error, (TooManyFailedError, CheckFailedError))  # its record is written
        if not is_finished or isinstance(error, StoppedEarlyError):
            with suppress(CaptionerError):
                write_record(job, make_record(job, state_after(error), tally))
        raise


def state_after(error: BaseException) -> str:
    """Return the state of a run that ended with an error: "stopped by Ctrl-C", "stopped: " and the message, ..."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    message = str(error) or type(error).__name__
    return message.partition("; ")[0] if message.startswith("stopped") else f"stopped: {message}"


def make_record(job: Job, state: str, tally: Tally, counts: TableCounts | None = None) -> dict[str, Any]:
    """Return the run as JSON: the content of OUT/run.json and OUT/runs/RUN_ID.json."""
    model = job.work.model
    plans = job.table.plans()
    rate = tally.images_per_second
    return {
        "run_id": job.work.run_id,
        "state": state,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": shown(job.config.source.path),
        "output": shown(job.config.output.path),
        "counts": {
            **(asdict(counts) if counts else {"planned": sum(p.num_rows for p in plans if p.adds_parts)}),
            "captioned_in_this_run": tally.num_rows,
            "duplicates": tally.duplicates,
            "skipped": tally.skipped,
            "ignored": num_ignored(plans),
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
        "usage": _usage_record(tally.usage, job.config.model) if model.endpoint else None,
        "padding_share": round(tally.usage.padding_tokens / tally.usage.input_tokens, 4)
        if tally.usage.input_tokens
        else None,
        "model": {**asdict(model), "fingerprint": model.fingerprint},
        "fingerprint": job.table.info["fingerprint"],
        "models": job.table.info.get("models", {}),
        "settings": _without_keys(job.config),
        "notes": [*job.notes, *question_notes(tally.blank_columns, tally.unanswered)],
        "versions": versions(),
        "hardware": hardware(tally.devices),
    }


def _usage_record(usage: Usage, model: ModelConfig) -> dict[str, float | None]:
    """Return the tokens that model servers counted, and their cost."""
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "cost": model.cost_of(prompt, completion)}


def _without_keys(config: CaptionConfig) -> dict[str, Any]:
    """Return the settings without the keys that URIs may hold."""
    settings = config.model_dump()
    for group in ("source", "output"):
        settings[group]["path"] = shown(settings[group]["path"])
    return settings


def write_record(job: Job, record: dict[str, Any]) -> None:
    """Write the record to OUT/run.json and OUT/runs/RUN_ID.json."""
    job.table.directory.write_json(f"runs/{job.work.run_id}.json", record, checksum=True)
    job.table.directory.write_json(RUN_FILE, record, checksum=True)


def versions() -> dict[str, str]:
    """Return the versions of the packages on which a caption depends."""
    installed = {"python": platform.python_version()}
    for package in ("captioner", "ray", "transformers", "torch", "pyarrow", "pillow"):
        if number := _version_of(package):
            installed[package] = number
    return installed


@cache  # reading a package's metadata takes milliseconds, and a run writes several records
def _version_of(package: str) -> str:
    """Return the version of an installed package, "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def hardware(devices: set[str]) -> dict[str, str]:
    """Return what the driver runs on, and which kinds of devices captioned."""
    facts = {"machine": f"{platform.system()} {platform.machine()}", "cpus": str(os.cpu_count())}
    return facts | ({"devices": "; ".join(sorted(devices))} if devices else {})
