"""Check a table, report on it, and compare its scores with --max-wer, --min-lift and --min-right.

`captioner check`, `captioner report` and the end of a run share these functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from operator import itemgetter
from typing import Any

from captioner.config import CheckConfig, JudgeConfig, RunCheckConfig
from captioner.console.stopping import notify
from captioner.console.text import counted
from captioner.data import Receipt
from captioner.errors import CheckFailedError, SourceError, StoppedEarlyError, UsageError
from captioner.files import absolute
from captioner.report import make_report
from captioner.scoring.check_table import CHECK_FILE, Check, check_table
from captioner.scoring.compare import compare_recaptioned, compare_tables
from captioner.scoring.eligible_rows import CheckSpec, no_match_message
from captioner.scoring.language import language_code
from captioner.scoring.references import References, read_references
from captioner.scoring.running_wer import RunningWer, Sample, draw_sample
from captioner.scoring.terms import read_terms
from captioner.scoring.verdicts import figures, percent
from captioner.store.replan import image_ids
from captioner.store.table import REFERENCES_FILE, CaptionsTable, open_table

# The most rows that are checked, unless --sample all is given: a minute or two, whatever the size of the table.
MAX_ROWS_CHECKED = 2_000_000
MIN_TO_WARN = 64  # captions of the first chunks, before a fault of most of them is reported
MIN_SAME = 10  # images with the same caption: a few may be alike
# Flags that, on most captions, mean that the run as a whole is wrong: the fault in words, and what to do.
COMMON_FAULTS = {
    "empty": ("are empty", "check that the model's directory is complete"),
    "no_logprob": ("have no finite log-probability", "try --dtype float32"),
    "special_tokens": ("contain special tokens", "check that the tokenizer is the model's own"),
    "repeated": ("repeat a word or phrase", "try another model or --num-beams"),
    "refusal": ("refuse to describe the image", "try another --prompt or model"),
    "repeats_prompt": ("repeat the prompt", "try another --prompt or model"),
    "truncated": (
        "are cut off at the token limit",
        "raise --max-new-tokens; --only flag:cut_off captions these again",
    ),
}
MAX_SPOT_CHECKED = 5_000  # rows scored while captioning: they travel to every worker


def check_spec(table: CaptionsTable, settings: CheckConfig, max_rows: int | None = None) -> CheckSpec:
    """Return the settings with their files read. Raises SourceError or UsageError naming the file."""
    references = references_of(table, settings)
    terms = read_terms(settings.terms) if settings.terms else ()
    language = language_code(settings.language) if settings.language else None
    return CheckSpec(references, settings.sample, settings.seed, terms, language, max_rows)


def references_of(table: CaptionsTable, settings: CheckConfig | JudgeConfig) -> References | None:
    """Return what --references names, or named before for this table; None for the source's own.

    Raises SourceError or UsageError naming the file that is given.
    """
    ids = partial(image_ids, table)
    if settings.references:
        return read_references(settings.references, settings.references_columns, ids)
    if settings.references_columns:
        raise UsageError("--references-columns: they are of the table that --references names; give that too")
    if settings.references is not None:  # --references '': the source's own again
        return None
    before = table.directory.read_record(REFERENCES_FILE) if table.directory.exists(REFERENCES_FILE) else {}
    if not before:
        return None
    try:
        references = read_references(str(before["path"]), before["columns"], ids)
    except (SourceError, UsageError, KeyError, TypeError) as error:
        notify(f"checked without the references that were given before: {error}")
        return None
    references.title = f"the references given before, {before['path']}"
    return references


def remember_references(table: CaptionsTable, settings: CheckConfig | JudgeConfig) -> None:
    """Note what --references names, once it has matched images of the table, for later checks and runs."""
    if settings.references:
        given = {"path": absolute(settings.references), "columns": settings.references_columns}
        table.directory.write_json(REFERENCES_FILE, given)
    elif settings.references is not None:
        table.directory.delete(REFERENCES_FILE)


def check(
    table: CaptionsTable, settings: CheckConfig, against: str | None = None, max_rows: int | None = None
) -> Check:
    """Check a table and write the result to OUT/checks.

    `max_rows`: see `CheckSpec`; by default MAX_ROWS_CHECKED, and all rows where all captions are scored.
    """
    if max_rows is None and settings.sample != "all":
        max_rows = MAX_ROWS_CHECKED
    other = open_table(against) if against else None
    spec = check_spec(table, settings, max_rows)
    result = check_table(table, spec)
    remember_references(table, settings)
    if other is not None:
        result.comparison = compare_tables(table, other, spec)
    result.changes = compare_recaptioned(table, spec)
    result.spot_check = figures(table)
    contents = result.to_json() | {
        "gates": {name: getattr(settings, name) for name in ("max_wer", "min_lift", "max_flagged", "min_right")},
        "failed_gates": failed_gates(result, settings),
        "made_of": _state_of(table),
    }
    table.directory.write_json(CHECK_FILE, contents, checksum=True)
    return result


def report(table: CaptionsTable) -> str:
    """Write OUT/report from the last check, and return the page's location.

    Checks the table first where it has changed since. The figures of spot-checks are always those of now.
    """
    contents = table.directory.read_record(CHECK_FILE)
    if contents.get("made_of") != _state_of(table):
        check(table, CheckConfig())
    elif (spot_check := figures(table)) != contents.get("spot_check"):
        table.directory.write_json(CHECK_FILE, contents | {"spot_check": spot_check}, checksum=True)
    return make_report(table)


class RunningCheck:
    """Checks captions while a run makes them: workers score a sample of their rows, the driver sums the scores.

    `notify`: called with one line where most captions of the first chunks have the same fault.
    """

    def __init__(self, settings: RunCheckConfig, notify: Callable[[str], None] = lambda line: None) -> None:
        self._settings, self._notify = settings, notify
        self._running = RunningWer(settings.seed)
        self._faults = _CommonFaults()
        self._has_warned = False

    def draw(self, table: CaptionsTable) -> Sample:
        """Return the rows to score, for `Work.sample`. Raises UsageError where references match no image."""
        settings = self._settings
        references = references_of(table, settings)
        size = MAX_SPOT_CHECKED if settings.sample == "all" else min(settings.sample, MAX_SPOT_CHECKED)
        sample = draw_sample(table, size, settings.seed, references)
        if references and size and not sample:
            raise UsageError(no_match_message(references, table))
        remember_references(table, settings)
        return sample

    def add(self, receipt: Receipt) -> str:
        """Count a committed chunk; return the score so far in words, or "" where nothing was scored.

        Raises StoppedEarlyError where --stop-early is given and the captions so far cannot pass --max-wer.
        """
        running, settings = self._running, self._settings
        self._faults.add(receipt)
        if not self._has_warned and self._faults.num_captions >= MIN_TO_WARN and (fault := self._faults.commonest()):
            self._has_warned = True
            self._notify(f"{fault} so far")
        running.add((edits, words) for edits, words in receipt.scored)
        if settings.stop_early and settings.max_wer is not None and running.is_hopeless(settings.max_wer):
            low, high = running.interval() or (0.0, 0.0)
            captions = counted(running.num_rows, "caption")
            raise StoppedEarlyError(
                f"stopped early: WER {running.wer:.3f} of {captions} (95 % interval {low:.3f} to {high:.3f}) "
                f"cannot come down to --max-wer {settings.max_wer:g}; progress is saved"
            )
        return "" if running.wer is None else f"WER {running.wer:.3f} of {running.num_rows}"

    def notes(self) -> list[str]:
        """Return what is wrong with most captions of the run, for its record."""
        fault = self._faults.commonest()
        return [fault] if fault else []


class _CommonFaults:
    """Counts the faults of captions by their flags, to find one that most captions share."""

    def __init__(self) -> None:
        self.num_captions = 0
        self._num_different = 0
        self._flags: Counter[str] = Counter()
        self._captions: Counter[str] = Counter()  # the most frequent of each chunk
        self._commonest = ("", 0)  # of them: looked for in all after each chunk, it took the square of their number

    def add(self, receipt: Receipt) -> None:
        self.num_captions += receipt.num_ok
        self._num_different += receipt.num_ok - receipt.num_duplicates
        self._flags.update(receipt.flags)
        caption, count = receipt.commonest
        self._captions[caption] += count
        self._commonest = max(self._commonest, (caption, self._captions[caption]), key=itemgetter(1))

    def commonest(self) -> str:
        """Return a sentence about the fault of at least half of the captions, "" where there is none."""
        for flag, (fault, advice) in COMMON_FAULTS.items():
            if 2 * self._flags[flag] >= self.num_captions > 0:
                return f"{self._flags[flag]:,} of {counted(self.num_captions, 'caption')} {fault} ({advice})"
        caption, count = self._commonest
        if count >= MIN_SAME and 2 * count >= self._num_different:
            images = counted(self._num_different, "image")
            return f"{count:,} of {images} with the same caption, {caption!r} (check the model)"
        return ""


def _state_of(table: CaptionsTable) -> dict[str, Any]:
    """Return what identifies the rows of a check: it changes with every row that is committed or superseded."""
    plans = table.plans()
    return {
        "table_id": table.table_id,
        "generations": [plan.generation for plan in plans],
        "committed": _digest(sorted(chunk for plan in plans for chunk in table.committed_chunks(plan.generation))),
        "published": sorted(table.published_parts()),
    }


def _digest(names: list[str]) -> str:
    return sha256("\n".join(names).encode()).hexdigest()


def failed_gates(result: Check, settings: CheckConfig) -> list[str]:
    """Return a sentence for each of --max-wer, --min-lift, --max-flagged and --min-right that the result misses.

    A limit fails where there is no data for its score: nothing shows that the captions are good enough.
    """
    scores, num_faulty, num_captions = result.scores, result.num_faulty, result.stats.num_ok
    failed = []
    if settings.max_flagged is not None:
        if not num_captions:
            failed.append(f"--max-flagged {settings.max_flagged:g} cannot be checked: no image has a caption")
        elif num_faulty > settings.max_flagged * num_captions:
            failed.append(
                f"{num_faulty:,} of {counted(num_captions, 'caption')} flagged, more than --max-flagged "
                f"{settings.max_flagged:g}"
            )
    if settings.max_wer is not None:
        if scores.wer is None:
            failed.append(f"--max-wer {settings.max_wer:g} cannot be checked: no caption has a reference")
        elif scores.wer > settings.max_wer:
            failed.append(
                f"WER {scores.wer:.3f} of {counted(scores.num_rows, 'caption')} is above --max-wer {settings.max_wer:g}"
            )
    if settings.min_lift is not None:
        if scores.lift is None:
            failed.append(f"--min-lift {settings.min_lift:g} cannot be checked: fewer than two captions were scored")
        elif scores.lift < settings.min_lift:
            better = "too little better" if scores.lift > 0 else "no better"
            failed.append(
                f"lift {scores.lift:.3f} is below --min-lift {settings.min_lift:g}: WER {scores.wer:.3f} is {better} "
                f"than {scores.shuffled_wer:.3f}, that of the same captions on other images"
            )
    return failed + _failed_min_right(result, settings)


def _failed_min_right(result: Check, settings: CheckConfig) -> list[str]:
    share, limit = result.spot_check, settings.min_right
    if limit is None:
        return []
    if share is None or share["low"] is None:
        return [f"--min-right {limit:g} cannot be checked: nobody has judged captions (captioner spot-check)"]
    if share["low"] >= limit:
        return []
    captions = counted(share["judged"], "caption")
    return [f"{percent(share)} of {captions} are right: the lower end of the interval is below --min-right {limit:g}"]


def enforce(result: Check, settings: CheckConfig) -> None:
    """Raise CheckFailedError where the result misses --max-wer, --min-lift, --max-flagged or --min-right."""
    failed = failed_gates(result, settings)
    if failed:
        raise CheckFailedError("the captions are not good enough: " + "; ".join(failed))
