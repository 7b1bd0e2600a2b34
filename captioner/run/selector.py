"""Parse --only, and select the weak captions of a finished table that another model captions again.

    --only 'flags or logprob<10% or rejected'

Terms are joined by "or" or a comma; a row is selected where one of them applies:

    flags         its caption has any flag (`captioner.scoring.flags.CAPTION_FLAGS`)
    flag:NAME     its caption has this flag, by its stored name or as people see it: flag:truncated, flag:cut_off
    logprob<10%   its caption is among the least certain 10 % ("below" may stand for "<")
    logprob<-2.5  its mean log-probability is below -2.5
    judge<10%     its lift is among the lowest 10 % of those that `captioner judge` found
    rejected      a reviewer rejected the caption
    expert        a reviewer sent it to an expert
    failed        it has no caption

Never selected: rows that the model itself captioned, so that the same command twice does nothing the second time, and
rows whose text a reviewer approved, wrote or marked as decorative.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_FAILED
from captioner.errors import UsageError
from captioner.scoring.flags import CAPTION_FLAGS, RUN_FLAGS, flag_name
from captioner.scoring.judgements import lifts_of
from captioner.store.directory import Directory
from captioner.store.replan import Refresh, RowIndices, generation_of_parts, plan_rows_again
from captioner.store.table import CaptionsTable, Plan, Recaption, captions_name

_EXAMPLES = (
    "flags",
    "logprob<10%",
    "judge<10%",
    "rejected",
    "expert",
    "failed",
    *(f"flag:{name}" for name in CAPTION_FLAGS),
)
_LOGPROB = re.compile(r"logprob(?:<|below)(-?\d+(?:\.\d+)?)(%?)")
_JUDGE = re.compile(r"judge(?:<|below)(\d+(?:\.\d+)?)%")
# Lifts, between -5 and 5, are counted in bins: a share is exact to the width of one.
_LIFT_BINS = 1 << 20
# Log-probabilities are counted by the upper bits of their float32: the width of a bin is 1/2048 of its value.
_BIN_BITS = 12
_COLUMNS = ["image_id", "status", "flags", "logprob_mean", "fingerprint", "created_at", "sha256"]


class Review(Protocol):
    """A reviewer's latest decision about an image, as `captioner.store.journal.Review`."""

    @property
    def decision(self) -> str:
        """The name of the decision: "rejected", "expert", ..."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether the decision also applies to later captions of the image."""
        ...

    def applies_to(self, created_at: datetime, sha256: str | None) -> bool:
        """Return whether the decision applies to a caption of a file, created at `created_at`."""
        ...


# Reads the latest review of each image of a table, by image id.
ReadReviews = Callable[[Directory], Mapping[str, Review]]


def no_reviews(out: Directory) -> Mapping[str, Review]:
    """Return no reviews, for runs on tables that nobody reviews."""
    return {}


@dataclass(frozen=True, slots=True)
class Selector:
    """The parsed --only."""

    flags: frozenset[str] = frozenset()
    decisions: frozenset[str] = frozenset()
    failed: bool = False
    percent: float | None = None  # the least certain share of the captions
    logprob_below: float | None = None
    judge_percent: float | None = None  # the share of the judged captions with the lowest lift

    @property
    def text(self) -> str:
        """The normal form: the same for the same selection, however it was written."""
        terms = ["flags"] if self.flags == set(CAPTION_FLAGS) else [f"flag:{name}" for name in sorted(self.flags)]
        if self.percent is not None:
            terms.append(f"logprob<{self.percent:g}%")
        if self.logprob_below is not None:
            terms.append(f"logprob<{self.logprob_below:g}")
        if self.judge_percent is not None:
            terms.append(f"judge<{self.judge_percent:g}%")
        return " or ".join([*terms, *sorted(self.decisions), *["failed"] * self.failed])


def parse_selector(text: str) -> Selector:
    """Parse --only. Raises UsageError naming the wrong term and the most similar one."""
    flags: set[str] = set()
    decisions: set[str] = set()
    shares: list[float] = []
    limits: list[float] = []
    judged: list[float] = []
    terms = ["".join(term.lower().split()) for term in re.split(r",|\bor\b", text)]
    for term in terms:
        logprob = _LOGPROB.fullmatch(term)
        if term == "flags":
            flags |= set(CAPTION_FLAGS)
        elif term.startswith("flag:") and (flag := _FLAGS_BY_NAME.get(_squeezed(term.removeprefix("flag:")))):
            flags.add(flag)
        elif term in ("rejected", "expert"):
            decisions.add(term)
        elif logprob:
            (shares if logprob[2] else limits).append(float(logprob[1]))
        elif judge := _JUDGE.fullmatch(term):
            judged.append(float(judge[1]))
        elif term != "failed":
            raise UsageError(_unknown_term(text, term))
    if len(shares) + len(limits) > 1 or any(not 0 < share <= 100 for share in shares):
        raise UsageError(f"--only {text}: give one logprob<Q, Q a share above 0% up to 100%, or a log-probability")
    if len(judged) > 1 or any(not 0 < share <= 100 for share in judged):
        raise UsageError(f"--only {text}: give one judge<Q, Q a share above 0% up to 100%")
    percent, limit, judge_percent = (values[0] if values else None for values in (shares, limits, judged))
    return Selector(frozenset(flags), frozenset(decisions), "failed" in terms, percent, limit, judge_percent)


def _unknown_term(text: str, term: str) -> str:
    name = term.removeprefix("flag:")
    if name in RUN_FLAGS:
        return f"--only {text}: {name!r} is a flag of the whole run, not of one caption; give logprob<10%, for instance"
    near = difflib.get_close_matches(term, _EXAMPLES, n=1, cutoff=0.5)
    return f"--only {text}: {term!r} is not a term; " + (
        f"did you mean {near[0]!r}?" if near else f"terms are {', '.join(_EXAMPLES[:6])}, flag:NAME, joined by 'or'"
    )


def _squeezed(name: str) -> str:
    return "".join(name.lower().replace("_", " ").split())


# Flags by their stored names and by those that people see, both without spaces.
_FLAGS_BY_NAME = {_squeezed(name): flag for flag in CAPTION_FLAGS for name in (flag, flag_name(flag))}


@dataclass(slots=True)
class Selection:
    """The rows to caption again. `settled`: how many more match, but a reviewer settled their text."""

    indices: RowIndices = field(default_factory=dict)
    logprob_below: float | None = None
    lift_below: float | None = None
    settled: int = 0


def make_recaption_plan(
    table: CaptionsTable,
    selector: Selector,
    fingerprint: str,
    model: dict[str, object],
    rows_per_chunk: int,
    reviews: Mapping[str, Review],
    refresh: Refresh | None = None,
) -> tuple[Plan | None, Selection]:
    """Freeze the weak rows of other models as a generation of this model; `None` where there are none.

    Every plan of the table must be published.
    """
    selection = select(table, selector, fingerprint, reviews)
    recaption = Recaption(selector.text, fingerprint, dict(model), selection.logprob_below, selection.lift_below)
    return plan_rows_again(table, "recaption", selection.indices, rows_per_chunk, recaption, refresh), selection


def select(table: CaptionsTable, selector: Selector, fingerprint: str, reviews: Mapping[str, Review]) -> Selection:
    """Return the rows that match, for a model of that fingerprint. Reads the table once, or twice for a share."""
    earlier = _earlier_limits(table, selector, fingerprint)
    selection = Selection(
        logprob_below=earlier.logprob_below if earlier else _logprob_below(table, selector, fingerprint),
        lift_below=earlier.lift_below if earlier else _lift_below(table, selector, fingerprint),
    )
    selected = {image_id: review for image_id, review in reviews.items() if review.decision in selector.decisions}
    settled_reviews = {image_id: review for image_id, review in reviews.items() if review.is_settled}
    for part, rows in _parts(table):
        weak = _is_weak(rows, selector, selection.logprob_below) | _reviewed(rows, selected)
        if selection.lift_below is not None:
            weak |= lifts_of(table, part, rows) < selection.lift_below
        weak &= pc.not_equal(rows["fingerprint"], fingerprint).to_numpy()
        settled = weak & _reviewed(rows, settled_reviews)
        selection.settled += int(settled.sum())
        selection.indices[part] = np.flatnonzero(weak & ~settled)
    return selection


def rows_matching(table: CaptionsTable, only: str, reviews: Mapping[str, Review]) -> RowIndices:
    """Return the rows that match an --only, whichever model captioned them. Raises UsageError as `parse_selector`."""
    selector = parse_selector(only)
    asked_for = {image_id: review for image_id, review in reviews.items() if review.decision in selector.decisions}
    return select(table, selector, "", asked_for).indices


def _parts(table: CaptionsTable) -> Iterator[tuple[int, pa.Table]]:
    for part in generation_of_parts(table):
        yield part, table.directory.read_table(captions_name(part), _COLUMNS)


def _is_weak(rows: pa.Table, selector: Selector, logprob_below: float | None) -> npt.NDArray[np.bool_]:
    weak = np.zeros(len(rows), bool)
    if selector.failed:
        weak |= pc.equal(rows["status"], STATUS_FAILED).to_numpy()
    if selector.flags:
        weak |= np.array([not selector.flags.isdisjoint(flags or ()) for flags in rows["flags"].to_pylist()], bool)
    if logprob_below is not None:
        weak |= pc.fill_null(pc.less(rows["logprob_mean"], logprob_below), False).to_numpy()
    return weak


def _reviewed(rows: pa.Table, reviews: Mapping[str, Review]) -> npt.NDArray[np.bool_]:
    """Return for each row whether its review, if it has one, applies to its caption; bool [N]."""
    is_reviewed = np.zeros(len(rows), bool)
    if not reviews:
        return is_reviewed
    created, sha256 = rows["created_at"], rows["sha256"]
    for index, image_id in enumerate(rows["image_id"].to_pylist()):
        if image_id in reviews:
            is_reviewed[index] = reviews[image_id].applies_to(created[index].as_py(), sha256[index].as_py())
    return is_reviewed


def _earlier_limits(table: CaptionsTable, selector: Selector, fingerprint: str) -> Recaption | None:
    """Return the earlier generation with the same selector and model, if any.

    Its limits stay: they must not move with the rows captioned since.
    """
    for plan in reversed(table.plans()):
        earlier = plan.recaption
        if earlier and (earlier.only, earlier.fingerprint) == (selector.text, fingerprint):
            return earlier
    return None


def _lift_below(table: CaptionsTable, selector: Selector, fingerprint: str) -> float | None:
    """Return the limit to which a share of the judged captions of other models comes.

    Raises UsageError where none is judged.
    """
    if selector.judge_percent is None:
        return None
    counts, num_judged = np.zeros(_LIFT_BINS, np.int64), 0
    for part, rows in _parts(table):
        lifts = lifts_of(table, part, rows)
        is_judged = ~np.isnan(lifts)
        num_judged += int(np.count_nonzero(is_judged))
        lifts = lifts[is_judged & pc.not_equal(rows["fingerprint"], fingerprint).to_numpy()]
        bins = np.clip((lifts + 5) / 10 * _LIFT_BINS, 0, _LIFT_BINS - 1).astype(np.int64)
        counts += np.bincount(bins, minlength=_LIFT_BINS)
    if not num_judged:
        raise UsageError(f"--only {selector.text}: no caption is judged; run captioner judge on this OUT first")
    if not counts.any():
        raise UsageError(
            f"--only {selector.text}: all judged captions are of this model and its settings; give another model"
        )
    last = int(np.searchsorted(np.cumsum(counts), selector.judge_percent / 100 * counts.sum()))
    return (last + 1) / _LIFT_BINS * 10 - 5


def _logprob_below(table: CaptionsTable, selector: Selector, fingerprint: str) -> float | None:
    """Return the limit to which a share comes, among captions of other models."""
    if selector.percent is None:
        return selector.logprob_below
    counts = np.zeros(1 << (32 - _BIN_BITS), np.int64)
    for _, rows in _parts(table):
        logprobs = rows.filter(pc.not_equal(rows["fingerprint"], fingerprint))["logprob_mean"].drop_null().to_numpy()
        counts += np.bincount(np.abs(logprobs).view(np.uint32) >> _BIN_BITS, minlength=len(counts))
    if not counts.any():
        return None
    from_least_certain = np.cumsum(counts[::-1])
    bin_index = int(np.searchsorted(from_least_certain, selector.percent / 100 * counts.sum()))
    edge = np.uint32((len(counts) - 1 - bin_index) << _BIN_BITS).view(np.float32)
    return float(np.nextafter(-edge, np.float32(1)))
