"""The commands that need no Ray: caption a few images, and verify, check or report a table, in one process."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from captioner.config import CheckConfig, JudgeTableConfig
from captioner.console.phases import phase
from captioner.console.stopping import notify, open_in_browser
from captioner.console.text import counted, printable, shell_command
from captioner.errors import ERROR, OK, CaptionerError, DamagedFileError
from captioner.report import FIGURES
from captioner.report.terminal import print_check
from captioner.run import judging, object_judge, quality
from captioner.run.changed import COMPARE_UP_TO, find_changed
from captioner.run.quality import enforce
from captioner.sources import reopen_source
from captioner.store.counts import TableCounts
from captioner.store.lock import is_held
from captioner.store.plan import notes_of
from captioner.store.table import RUN_FILE, CaptionsTable, open_table
from captioner.store.verify import Verification, count_rows
from captioner.store.verify import verify as verify_table


def verify(out: str) -> int:
    """Compare a table with its plan row by row and print the result; returns exit code 1 unless it is proven."""
    with phase(f"verifying {out}", notify):
        result = verify_table(open_table(out))
    counts = result.counts
    for problem in result.problems:
        print(f"captioner: {printable(problem)}", file=sys.stderr)
    damaged = counts.failed_by_reason.get("damaged", 0)
    if damaged:
        print(
            f"captioner: {counted(damaged, 'row')} of error code damaged, each for a damaged part of the source: "
            "images that were in it have no row",
            file=sys.stderr,
        )
    if result.open_generations:
        unfinished = counted(counts.remaining, "image") if counts.remaining else "publishing"
        print(
            f"captioner: the run is not finished, {unfinished} left; run the same command to continue", file=sys.stderr
        )
    if result.unchecked:
        print(f"captioner: {counted(result.unchecked, 'file')} of an earlier version without a checksum")
    print(f"{printable(out)}: {_verdict(result)}")
    if result.proven:
        print("compared: rows with the plan, files with their checksums")
        print("not compared: captions with images (captioner check does, on a sample)")
        print("              the source of today with the plan (captioner status does)")
    return OK if result.proven else ERROR


def _verdict(result: Verification) -> str:
    counts, num_rows = result.counts, result.counts.ok + result.counts.failed
    faults = f"{result.lost or 'none'} missing, {result.doubled or 'none'} duplicated"
    if result.proven:
        return f"proven: {counted(counts.planned, 'planned image')}, each with one row; none missing or duplicated"
    if result.problems or result.lost or result.doubled:
        return f"NOT proven: {num_rows:,} of {counted(counts.planned, 'row')}; {faults}"
    return f"incomplete: {num_rows:,} of {counted(counts.planned, 'row')}; none missing or duplicated so far"


def status(out: str) -> int:
    """Print the progress of a table: planned, ok, failed by reason, remaining, and the rate of the latest start."""
    table = open_table(out)
    damaged: list[DamagedFileError] = []
    with phase("counting rows", notify):
        counts: TableCounts = count_rows(table, damaged.append, whole_files=False)
    without = [(f"  without {name}", number) for name, number in counts.failed_answers.items()]
    lines = [("planned", counts.planned), ("ok", counts.ok), *without, ("failed", counts.failed)]
    lines += [(f"  {reason}", number) for reason, number in counts.failed_by_reason.items()]
    for name, number in [*lines, ("remaining", counts.remaining)]:
        print(f"{name:<22}{number:>14,}")
    for problem in damaged:
        print(f"captioner: {printable(str(problem))}", file=sys.stderr)
    if counts.failed:
        print(f"names and causes of failed images: {printable(shell_command('report', out, '--open'))}, under Failures")
    models = table.info.get("models", {})
    for fingerprint, number in counts.by_fingerprint.items() if len(models) > 1 else ():
        name = models.get(fingerprint, {}).get("name", fingerprint[:12])
        print(f"{counted(number, 'row')} by model {printable(name)} (fingerprint {fingerprint[:12]})")
    for note in _notes_of(table, counts.planned):
        print(printable(note))
    with suppress(KeyError, TypeError, ValueError):  # the record is damaged or missing: the next run writes it
        _print_latest_start(out, table.directory.read_record(RUN_FILE))
    return OK


def _print_latest_start(out: str, record: dict[str, Any]) -> None:
    rate, when = record["images_per_second"], datetime.fromisoformat(record["written_at"])
    speed = "" if rate is None else f"; images/s after start-up: {rate:,.1f}"
    state = record["state"]
    if state == "running" and not is_held(out):
        state = "killed before its end; run the same command to continue; started"
    print(f"latest start {printable(record['run_id'])}: {printable(state)} at {when:%Y-%m-%d %H:%M} UTC{speed}")


def _notes_of(table: CaptionsTable, num_planned: int) -> list[str]:
    """Return what a person should know of the source, as it was listed and as it is now."""
    notes = notes_of(table.plans())
    if num_planned > COMPARE_UP_TO:
        return notes
    try:
        with phase("comparing the source with its captions", notify):
            changed = find_changed(table, reopen_source(table.info["source"])).note
    except (CaptionerError, OSError) as error:
        return [*notes, f"the source was not compared with its captions: {error}"]
    return [*notes, changed] if changed else notes


def _progress_of(table: CaptionsTable) -> str:
    """Return how much of an unfinished run is done; "" of a finished one."""
    if not table.open_plans():
        return ""
    counts = count_rows(table, on_damage=lambda error: None, whole_files=False)
    done = counts.ok + counts.failed
    share = 100 * done // counts.planned if counts.planned else 0
    return (
        f"not finished: {done:,} of {counted(counts.planned, 'image')} captioned ({share}%); only these are "
        "checked; run the same `captioner caption` command to continue"
    )


def check(out: str, settings: CheckConfig, against: str | None = None) -> int:
    """Check a table, write its report and print a summary. Raises CheckFailedError when a gate is not met."""
    table = open_table(out)
    if unfinished := _progress_of(table):
        print(unfinished)
    with phase("checking the captions", notify):
        result = quality.check(table, settings, against)
    with phase("writing the report", notify):
        page = quality.report(table)
    print_check(table.directory.read_json(FIGURES))
    print(f"the report: {printable(page)}")
    enforce(result, settings)
    return OK


def judge(out: str, config: JudgeTableConfig, engine: judging.JudgeEngine) -> int:
    """Judge the captions of a table by their images, write its report and print the figures."""
    return _report_judged(out, judging.summary_lines(judging.judge(out, config, engine)))


def judge_objects(out: str, config: JudgeTableConfig, engine: object_judge.ObjectJudgeEngine) -> int:
    """Ask what captions name that is not in their images, write the report and print the figures."""
    return _report_judged(out, object_judge.summary_lines(object_judge.judge_objects(out, config, engine)))


def _report_judged(out: str, lines: list[str]) -> int:
    with phase("writing the report", notify):
        page = quality.report(open_table(out))
    for line in lines:
        print(printable(line))
    print(f"the report: {printable(page)}")
    return OK


def report(out: str, open_page: bool) -> int:
    """Write the report of a table and print its location."""
    with phase("writing the report", notify):
        page = quality.report(open_table(out))
    print(printable(page))
    if open_page:
        open_in_browser(page if "://" in page else Path(page).absolute().as_uri())
    return OK
