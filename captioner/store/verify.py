"""Verify that a table has exactly one current row for each planned image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha256

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import ERROR_CODES, STATUS_FAILED, STATUS_OK
from captioner.store.ids import IdIndex
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable, Plan, captions_name, history_name, plan_part_name, published_name

MAX_PROBLEMS = 20


@dataclass
class TableCounts:
    """The current rows of a table by status. `remaining`: planned images without a committed row."""

    planned: int = 0
    ok: int = 0
    failed: int = 0
    failed_by_reason: dict[str, int] = field(default_factory=dict)
    by_fingerprint: dict[str, int] = field(default_factory=dict)

    @property
    def remaining(self) -> int:
        return self.planned - self.ok - self.failed


@dataclass
class Verification:
    """The result of `verify`. `problems`: sentences for a person, at most MAX_PROBLEMS."""

    counts: TableCounts
    lost: int = 0
    doubled: int = 0
    open_generations: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        return not self.problems and not self.open_generations and not self.lost and not self.doubled

    def add_problem(self, problem: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


def count_rows(table: CaptionsTable) -> TableCounts:
    """Count the committed rows by status and by fingerprint. Reads three columns of the table."""
    counts = TableCounts(planned=sum(plan.num_rows for plan in table.plans() if plan.adds_parts))
    reasons: Counter[str] = Counter()
    fingerprints: Counter[str] = Counter()
    for rows in read_parts(table, ["status", "error_code", "fingerprint"]):
        failed = rows.filter(pc.equal(rows["status"], STATUS_FAILED))
        counts.ok += rows.num_rows - failed.num_rows
        counts.failed += failed.num_rows
        for item in failed["error_code"].value_counts().to_pylist():
            reasons[item["values"]] += item["counts"]
        for item in rows["fingerprint"].value_counts().to_pylist():
            fingerprints[item["values"]] += item["counts"]
    counts.failed_by_reason, counts.by_fingerprint = dict(reasons.most_common()), dict(fingerprints.most_common())
    return counts


def verify(table: CaptionsTable) -> Verification:
    """Compare every row with the plan. Needs memory for one part and one bucket of ids."""
    result = Verification(counts=count_rows(table))
    with IdIndex() as planned:
        for plan in table.plans():
            if not table.is_published(plan.generation):
                result.open_generations.append(plan.generation)
            elif plan.adds_parts:
                _verify_parts(table, plan, result)
            else:
                _verify_history(table, plan, result)
            _verify_chunks(table, plan, result)
            for part in sorted(plan.parts) if plan.adds_parts else ():
                planned.add(_plan_ids(table, plan, part))
        duplicates = len(planned.duplicates())
    if duplicates:
        result.doubled += duplicates
        result.add_problem(f"{duplicates} image ids are planned more than once")
    _verify_files(table, result)
    return result


def _plan_ids(table: CaptionsTable, plan: Plan, part: int) -> list[str]:
    planned = table.directory.read_table(plan_part_name(plan.generation, part), ["image_id"])
    return list(planned["image_id"].to_pylist())


def _verify_parts(table: CaptionsTable, plan: Plan, result: Verification) -> None:
    published = table.published_parts()
    for part in sorted(plan.parts):
        name = captions_name(part)
        if part not in published:
            result.lost += plan.parts[part]
            result.add_problem(f"{name} is missing: {plan.parts[part]} images have no row")
            continue
        rows = table.directory.read_table(name, ["image_id", "status", "error_code"])
        _compare(name, Counter(_plan_ids(table, plan, part)), Counter(rows["image_id"].to_pylist()), result)
        wrong = rows.filter(pc.invert(_has_known_status(rows)))["image_id"]
        if len(wrong):
            result.add_problem(f"{name}: {len(wrong)} rows have an unknown status or reason, e.g. {wrong[0].as_py()!r}")


def _verify_history(table: CaptionsTable, plan: Plan, result: Verification) -> None:
    """Verify that the rows which a generation superseded are all in history/, in its order."""
    for part in sorted(plan.parts):
        name = history_name(plan.generation, part)
        if not table.directory.exists(name):
            result.add_problem(f"{name} is missing: the rows that generation {plan.generation} superseded")
            continue
        older = table.directory.read_table(name, ["image_id"])
        if older["image_id"].to_pylist() != _plan_ids(table, plan, part):
            result.add_problem(f"{name} does not hold the rows that generation {plan.generation} superseded")


def _has_known_status(rows: pa.Table) -> pa.ChunkedArray:
    """Return for each row whether it is ok without an error code, or failed with one of ERROR_CODES."""
    is_ok = pc.and_(pc.equal(rows["status"], STATUS_OK), pc.is_null(rows["error_code"]))
    has_error_code = pc.is_in(rows["error_code"], pa.array(ERROR_CODES))
    return pc.or_(is_ok, pc.and_(pc.equal(rows["status"], STATUS_FAILED), has_error_code))


def _verify_chunks(table: CaptionsTable, plan: Plan, result: Verification) -> None:
    """Verify that the committed chunks of an unpublished generation hold the planned images."""
    if table.is_published(plan.generation):
        return
    committed = table.committed_chunks(plan.generation)
    for part in sorted(plan.parts):
        ids = _plan_ids(table, plan, part)
        for chunk in plan.part_chunks(part):
            if chunk.chunk_id in committed:
                name = table.chunk_name(chunk.chunk_id)
                first = chunk.index * plan.rows_per_chunk
                committed_ids = table.directory.read_table(name, ["image_id"])["image_id"].to_pylist()
                _compare(name, Counter(ids[first : first + chunk.num_rows]), Counter(committed_ids), result)


def _compare(name: str, planned: Counter[str], actual: Counter[str], result: Verification) -> None:
    missing, extra = planned - actual, actual - planned
    result.lost += missing.total()
    result.doubled += extra.total()
    if missing:
        result.add_problem(f"{name}: {missing.total()} planned images have no row, e.g. {next(iter(missing))!r}")
    if extra:
        result.add_problem(f"{name}: {extra.total()} rows too many, e.g. {next(iter(extra))!r}")


def _verify_files(table: CaptionsTable, result: Verification) -> None:
    """Verify that captions/ holds the files that were published, byte for byte, and no others."""
    digests: dict[int, str] = {}
    planned: set[int] = set()
    for plan in table.plans():
        planned |= set(plan.parts) if plan.adds_parts else set()
        if table.is_published(plan.generation):
            record = table.directory.read_json(published_name(plan.generation))
            digests |= {int(part): entry["sha256"] for part, entry in record["files"].items()}
        elif not plan.adds_parts:  # its publish may have been killed while it replaced these
            digests = {part: digest for part, digest in digests.items() if part not in plan.parts}
    published = table.published_parts()
    for part in sorted(published - planned):
        result.add_problem(f"{captions_name(part)} belongs to no plan")
    for part in sorted(published & set(digests)):
        digest = sha256(table.directory.read_bytes(captions_name(part))).hexdigest()
        if digest != digests[part]:
            result.add_problem(f"{captions_name(part)} is not the file that was published (sha256 {digest[:12]})")
