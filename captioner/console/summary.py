"""Print a summary of a finished run: the contents of `OUT/run.json` as a short table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from captioner.config import CaptionConfig, command_line
from captioner.console.progress import duration
from captioner.console.text import counted, printable, shell_command
from captioner.data import retry_may_help
from captioner.run.bottleneck import bottleneck_line


def print_summary(record: dict[str, Any], stream: TextIO | None = None) -> None:
    """Print a finished run's record (see `captioner.run.record.make_record`), by default to standard error.

    Missing keys are left out. Control characters in data are removed.
    """
    console = Console(file=stream or sys.stderr, highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, value in _rows(record):
        table.add_row(Text(printable(name)), Text(printable(value)))
    console.print()
    console.print(table)
    for line in _lines(record):
        console.print(Text(printable(line)), soft_wrap=True)


def _rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    counts: dict[str, Any] = record.get("counts", {})
    rows: list[tuple[str, str]] = [(name, f"{counts[name]:,}") for name in ("planned", "ok") if name in counts]
    rows += [(f"  without {name}", f"{number:,}") for name, number in counts.get("failed_answers", {}).items()]
    rows += [("failed", f"{counts['failed']:,}")] if "failed" in counts else []
    reasons = sorted(counts.get("failed_by_reason", {}).items(), key=lambda item: -item[1])
    rows += [(f"  {reason}", f"{number:,}") for reason, number in reasons]
    labels = {
        "duplicates": "duplicates, caption reused",
        "skipped": "committed before this start",
        "ignored": "skipped, not images",
    }
    rows += [(label, f"{counts[name]:,}") for name, label in labels.items() if counts.get(name)]
    rows += usage_rows(record.get("usage") or {})
    if record.get("padding_share") is not None:
        rows.append(("padding in batches", f"{record['padding_share']:.1%}"))
    return rows + _time_rows(record.get("seconds", {}), record.get("images_per_second"))


def _time_rows(seconds: Mapping[str, float], images_per_second: float | None) -> list[tuple[str, str]]:
    """Return the time of a run and its parts; the rate stands below the part that it is of."""
    names = {"run": "time", "startup": "  start-up"}
    rows = [(names[name], duration(seconds[name])) for name in names if name in seconds]
    if len(rows) == len(names):
        rows.append(("  after start-up", duration(max(0.0, seconds["run"] - seconds["startup"]))))
    return rows + ([("    images/s", f"{images_per_second:,.1f}")] if images_per_second else [])


def usage_rows(usage: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Return the tokens that model servers counted, and their cost where prices are given."""
    labels = {"prompt_tokens": "prompt tokens", "completion_tokens": "answer tokens"}
    rows = [(label, f"{usage[name]:,.0f}") for name, label in labels.items() if usage.get(name)]
    cost = usage.get("cost")
    return rows if cost is None else [*rows, ("cost", f"{cost:,.2f}")]


def _lines(record: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    lines = []
    is_served = record.get("engine") == "endpoint"
    busy = bottleneck_line(record.get("busy", {}), record.get("seconds", {}), record.get("slots"), is_served)
    if busy is not None:
        lines.append(busy)
    check = record.get("check")
    if check and check["wer"] is not None:
        baseline = check.get("shuffled_wer")
        shuffled = "" if baseline is None else f" (captions shuffled {baseline:.3f})"
        lines.append(
            f"WER {check['wer']:.3f} against the references of {counted(check['num_rows'], 'image')}{shuffled}"
        )
    counts = record.get("counts", {})
    if retry_may_help(counts):
        lines.append(f"retry the failed: {_retry_command(record)}")
    elif counts.get("failed"):
        lines.append("which images failed and why: the report, under Failures")
    if record.get("report"):
        lines.append(f"the report: {record['report']}")
    if record.get("output"):
        lines.append(f"the table: {record['output'].rstrip('/')}/captions")
        if record.get("state") == "finished" and record["counts"]["ok"]:
            alt_text, review = (shell_command(name, record["output"]) for name in ("alt-text", "review"))
            lines.append(f"to publish alt texts: {alt_text}, then {review}")
    return lines + [f"note: {note}" for note in record.get("notes", [])]


def _retry_command(record: dict[str, Any]) -> str:
    """Return the run's command with --retry-failed, without settings that must not be repeated."""
    if "settings" not in record:
        return "the same command with --retry-failed"
    config = CaptionConfig.model_validate(record["settings"])
    changes = {"retry_failed": True, "overwrite": False, "extend": False, "only": None}
    config = config.model_copy(update={"output": config.output.model_copy(update=changes)})
    return shell_command("caption", *command_line(config))
