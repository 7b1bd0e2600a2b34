"""What a report says: the run's record, the check's figures, and the verdict. OUT/report/report.json holds it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from captioner.config import CaptionConfig, command_line
from captioner.report.verdict import verdict_of
from captioner.run.bottleneck import bottleneck_line
from captioner.scoring.check_table import CHECK_FILE
from captioner.scoring.flags import ALL_FLAGS
from captioner.store.table import CaptionsTable
from captioner.store.verify import count_rows

TIME_BINS = 60
# Steps, and whose time each takes: reading and decoding are done by the same workers.
STAGES = {"read": "decode", "decode": "decode", "generate": "device", "commit": "write"}


def collect(table: CaptionsTable) -> dict[str, Any]:
    """Everything the page shows but the pictures. The table must have been checked."""
    check = table.directory.read_json(CHECK_FILE)
    record = table.directory.read_json("run.json") if table.directory.exists("run.json") else {}
    counts = asdict(count_rows(table))
    starts = _starts(table)
    latest: dict[str, Any] = next(
        (start for start in reversed(starts) if start["counts"].get("captioned_in_this_run")), {}
    )
    return {
        "verdict": asdict(verdict_of(counts, check)),
        "counts": counts,
        "check": check,
        "flag_meanings": ALL_FLAGS,
        "throughput": _throughput(check["survey"]["committed"], check["survey"]["committed_seconds"]),
        "stages": _stages(latest),
        "bottleneck": bottleneck_line(latest.get("busy", {}), latest.get("seconds", {}), latest.get("slots")),
        "commands": _commands(record),
        "run": record,
        "starts": starts,
        "model": table.info.get("model"),
        "fingerprint": table.info.get("fingerprint"),
        "table_id": table.table_id,
    }


def _throughput(committed: Sequence[Sequence[int]], resolution: int) -> dict[str, Any]:
    """Pictures a second over time, from when the rows were made: at most 60 bins of equal width, and no more than a
    third of the commits, so that a bin without one is a stall. `resolution`: seconds that an entry stands for."""
    if len(committed) < 6:
        return {"bin_seconds": 0, "rates": []}
    first, last = committed[0][0], committed[-1][0]
    bins = min(TIME_BINS, len(committed) // 3)
    width = (last - first + resolution) / bins
    rates = [0.0] * bins
    for second, rows in committed:
        rates[int((second - first) / width)] += rows / width
    return {"start": first, "bin_seconds": round(width, 1), "rates": [round(rate, 3) for rate in rates]}


def _stages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a start, each stage: seconds over all workers, pictures a second of one worker, and the share of the time that
    its workers were busy (`None` where the start did not get to its end)."""
    seconds, busy = record.get("seconds", {}), record.get("busy", {})
    rows = record.get("counts", {}).get("captioned_in_this_run", 0)
    return [
        {
            "stage": name,
            "seconds": seconds[name],
            "images_per_second": round(rows / seconds[name], 2),
            "busy": busy.get(worker),
        }
        for name, worker in STAGES.items()
        if seconds.get(name) and rows
    ]


def _commands(record: dict[str, Any]) -> dict[str, str]:
    """The run's own command, and the one that does failed pictures again; empty where the record lacks settings."""
    with suppress(ValidationError, KeyError):
        config = CaptionConfig.model_validate(record["settings"])
        again = {"retry_failed": True, "overwrite": False, "extend": False, "only": None}
        retry = config.model_copy(update={"output": config.output.model_copy(update=again)})
        return {name: _shell(one) for name, one in (("run", config), ("retry", retry))}
    return {}


def _shell(config: CaptionConfig) -> str:
    return shlex.join(["captioner", "caption", *command_line(config)])


def _starts(table: CaptionsTable) -> list[dict[str, Any]]:
    """The latest ten starts, oldest first."""
    names = table.directory.list_names("runs")[-10:]
    records = [table.directory.read_json(f"runs/{name}") for name in names]
    keys = ("run_id", "state", "written_at", "images_per_second")
    groups = ("seconds", "busy", "counts")
    return [{key: one.get(key) for key in keys} | {group: one.get(group, {}) for group in groups} for one in records]
