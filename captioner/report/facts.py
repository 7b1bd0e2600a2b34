"""Collect the facts of a report from the run's record and the check: the contents of OUT/report/report.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from captioner.config import CaptionConfig, command_line
from captioner.console.text import shell_command
from captioner.data import STATUS_OK, retry_may_help
from captioner.report.verdict import verdict_of
from captioner.run.bottleneck import bottleneck_line
from captioner.scoring.check_table import CHECK_FILE
from captioner.scoring.flags import ALL_FLAGS
from captioner.scoring.judgements import JUDGE_FILE, OBJECTS_FILE
from captioner.store.read import read_parts
from captioner.store.table import RUN_FILE, CaptionsTable
from captioner.store.verify import count_rows

TIME_BINS = 60
# Stage -> the workers that do it; the same workers read and decode.
STAGES = {"read": "decode", "decode": "decode", "generate": "device", "commit": "write"}


def collect(table: CaptionsTable) -> dict[str, Any]:
    """Return everything the page shows except the images. The table must have been checked."""
    check = table.directory.read_json(CHECK_FILE)
    record = table.directory.read_record(RUN_FILE)
    counts = asdict(count_rows(table, whole_files=False))
    starts = _starts(table)
    latest: dict[str, Any] = next(
        (start for start in reversed(starts) if start["counts"].get("captioned_in_this_run")), {}
    )
    return {
        "verdict": asdict(verdict_of(counts, check)),
        "counts": counts,
        "check": check,
        "judge": _judgement(table),
        "objects": table.directory.read_record(OBJECTS_FILE) or None,
        "flag_meanings": ALL_FLAGS,
        "throughput": _throughput(check["survey"]["committed"], check["survey"]["committed_seconds"]),
        "stages": _stages(latest),
        "bottleneck": bottleneck_line(latest.get("busy", {}), latest.get("seconds", {}), latest.get("slots")),
        "usage": _usage_line(starts),
        "commands": _commands(record, counts),
        "run": record,
        "starts": starts,
        "model": table.info.get("model"),
        "fingerprint": table.info.get("fingerprint"),
        "table_id": table.table_id,
    }


def _judgement(table: CaptionsTable) -> dict[str, Any] | None:
    """Return the figures of `captioner judge`; None where it did not run.

    `is_current`: whether the table has no captions that were made since. A retry may have captioned nothing.
    """
    figures = table.directory.read_record(JUDGE_FILE)
    if not figures:
        return None
    new = {plan.generation for plan in table.plans()} - {*figures["generations"]}
    return figures | {"is_current": not new or not _has_captions_of(table, new)}


def _has_captions_of(table: CaptionsTable, generations: Collection[int]) -> bool:
    values = pa.array(sorted(generations), pa.int32())
    for rows in read_parts(table, ["generation", "status"]):
        if pc.any(pc.and_(pc.is_in(rows["generation"], values), pc.equal(rows["status"], STATUS_OK))).as_py():
            return True
    return False


def _throughput(committed: Sequence[Sequence[int]], resolution: int) -> dict[str, Any]:
    """Return the images per second over time.

    There are at most 60 bins of equal width and at least three commits for each bin on average, so that an empty bin
    shows a stall. `committed`: (second since the epoch, rows). `resolution`: seconds that each entry covers.
    """
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
    """Return the figures of each stage of one start.

    `seconds`: summed over all workers. `images_per_second`: of one worker. `busy`: the share of the time that the
    workers were busy, `None` when the start did not finish.
    """
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


def _usage_line(starts: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the tokens that model servers counted in these starts, and their cost; None where there are none."""
    usages = [usage for start in starts if (usage := start.get("usage"))]
    prompt, answer = (sum(usage.get(name) or 0 for usage in usages) for name in ("prompt_tokens", "completion_tokens"))
    if not prompt and not answer:
        return None
    costs = [cost for usage in usages if (cost := usage.get("cost")) is not None]
    cost = f"; cost {sum(costs):,.2f}" if costs else ""
    return f"Model servers counted {prompt:,.0f} prompt tokens and {answer:,.0f} answer tokens{cost}."


def _commands(record: dict[str, Any], counts: Mapping[str, Any]) -> dict[str, str]:
    """Return the run's command, and where some failure may pass the one that retries failed images.

    Empty when the record has no settings.
    """
    with suppress(ValidationError, KeyError):
        config = CaptionConfig.model_validate(record["settings"])
        if not retry_may_help(counts):
            return {"run": _shell(config)}
        changes = {"retry_failed": True, "overwrite": False, "extend": False, "only": None}
        retry = config.model_copy(update={"output": config.output.model_copy(update=changes)})
        return {"run": _shell(config), "retry": _shell(retry)}
    return {}


def _shell(config: CaptionConfig) -> str:
    return shell_command("caption", *command_line(config))


def _starts(table: CaptionsTable) -> list[dict[str, Any]]:
    """Return the records of the latest ten starts, oldest first."""
    names = table.directory.list_names("runs")[-10:]
    records = [table.directory.read_record(f"runs/{name}") for name in names]
    keys = ("run_id", "state", "written_at", "images_per_second")
    groups = ("seconds", "busy", "counts", "usage")
    return [
        {key: record.get(key) for key in keys} | {group: record.get(group, {}) for group in groups}
        for name, record in zip(names, records, strict=True)
        if record.get("run_id") == name.removesuffix(".json")  # else it is damaged, or the record of something else
    ]
