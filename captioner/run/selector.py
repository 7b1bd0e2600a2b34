"""--only: the weak captions of a finished table, to be made again with another model.

    --only 'flags or logprob<10% or rejected'

Terms are joined by "or" or a comma; a row is chosen where one of them holds:

    flags         its caption has any flag (`captioner.scoring.flags.CAPTION_FLAGS`)
    flag:NAME     its caption has this flag
    logprob<10%   its caption is among the least certain 10 % ("below" may stand for "<")
    logprob<-2.5  its mean log-probability is below -2.5
    rejected      a reviewer rejected the caption
    expert        a reviewer sent it to an expert
    failed        it has no caption

Never chosen: rows that the model itself made, so that the same command twice does nothing the second time, and rows
whose text a person approved or wrote, or called decorative.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_FAILED
from captioner.errors import UsageError
from captioner.publishing.alt_text.journal import latest_reviews, read_reviews
from captioner.publishing.alt_text.schemas import SETTLED, Review
from captioner.publishing.alt_text.texts import still_applies
from captioner.scoring.flags import CAPTION_FLAGS, RUN_FLAGS
from captioner.store.replan import Places, founded_by, plan_again
from captioner.store.table import CaptionsTable, Plan, Recaption, captions_name

_EXAMPLES = ("flags", "logprob<10%", "rejected", "expert", "failed", *(f"flag:{name}" for name in CAPTION_FLAGS))
_LOGPROB = re.compile(r"logprob(?:<|below)(-?\d+(?:\.\d+)?)(%?)")
# Log-probabilities are counted by the upper bits of their float32: bins as wide as 1/2048 of what they hold.
_BIN_BITS = 12
_COLUMNS = ["image_id", "status", "flags", "logprob_mean", "fingerprint", "created_at"]


@dataclass(frozen=True, slots=True)
class Selector:
    """What --only asks for. `text`: the same for the same choice, however it was written."""

    flags: frozenset[str] = frozenset()
    decisions: frozenset[str] = frozenset()
    failed: bool = False
    percent: float | None = None  # of the captions, the least certain
    logprob_below: float | None = None

    @property
    def text(self) -> str:
        terms = ["flags"] if self.flags == set(CAPTION_FLAGS) else [f"flag:{name}" for name in sorted(self.flags)]
        if self.percent is not None:
            terms.append(f"logprob<{self.percent:g}%")
        if self.logprob_below is not None:
            terms.append(f"logprob<{self.logprob_below:g}")
        return " or ".join([*terms, *sorted(self.decisions), *["failed"] * self.failed])


def parse_selector(text: str) -> Selector:
    """Raises UsageError naming the term at fault and the nearest one."""
    flags: set[str] = set()
    decisions: set[str] = set()
    shares: list[float] = []
    limits: list[float] = []
    terms = ["".join(term.lower().split()) for term in re.split(r",|\bor\b", text)]
    for term in terms:
        logprob = _LOGPROB.fullmatch(term)
        if term == "flags":
            flags |= set(CAPTION_FLAGS)
        elif term.removeprefix("flag:") in CAPTION_FLAGS and term.startswith("flag:"):
            flags.add(term.removeprefix("flag:"))
        elif term in ("rejected", "expert"):
            decisions.add(term)
        elif logprob:
            (shares if logprob[2] else limits).append(float(logprob[1]))
        elif term != "failed":
            raise UsageError(_unknown(text, term))
    if len(shares) + len(limits) > 1 or any(not 0 < share <= 100 for share in shares):
        raise UsageError(f"--only {text}: give one logprob<Q, Q a share above 0% up to 100%, or a log-probability")
    percent, limit = shares[0] if shares else None, limits[0] if limits else None
    return Selector(frozenset(flags), frozenset(decisions), "failed" in terms, percent, limit)


def _unknown(text: str, term: str) -> str:
    name = term.removeprefix("flag:")
    if name in RUN_FLAGS:
        return f"--only {text}: {name!r} is a flag of the whole run, not of one caption; give logprob<10%, for instance"
    near = difflib.get_close_matches(term, _EXAMPLES, n=1, cutoff=0.5)
    return f"--only {text}: {term!r} is no term; " + (
        f"did you mean {near[0]!r}?" if near else f"terms are {', '.join(_EXAMPLES[:5])}, flag:NAME, joined by 'or'"
    )


@dataclass(slots=True)
class Chosen:
    """The rows to caption again. `settled`: rows that would be among them, had a person not settled their text."""

    places: Places = field(default_factory=dict)
    logprob_below: float | None = None
    settled: int = 0


def make_recaption_plan(
    table: CaptionsTable, selector: Selector, fingerprint: str, model: dict[str, object], rows_per_chunk: int
) -> tuple[Plan | None, Chosen]:
    """Freeze the weak rows that other models made as a generation of this model; `None` where there are none.

    Every plan of the table must be published.
    """
    chosen = choose(table, selector, fingerprint)
    recaption = Recaption(selector.text, fingerprint, dict(model), chosen.logprob_below)
    return plan_again(table, "recaption", chosen.places, rows_per_chunk, recaption), chosen


def choose(table: CaptionsTable, selector: Selector, fingerprint: str) -> Chosen:
    """The rows that a selector means, for a model of that fingerprint. Reads the table once, or twice for a share."""
    chosen = Chosen(logprob_below=_logprob_below(table, selector, fingerprint))
    reviews = latest_reviews(read_reviews(table.directory)[0])
    for part, rows in _parts(table):
        weak = _is_weak(rows, selector, chosen.logprob_below, reviews)
        weak &= pc.not_equal(rows["fingerprint"], fingerprint).to_numpy()
        settled = weak & _decided(rows, reviews, frozenset(SETTLED))
        chosen.settled += int(settled.sum())
        chosen.places[part] = np.flatnonzero(weak & ~settled)
    return chosen


def _parts(table: CaptionsTable) -> Iterator[tuple[int, pa.Table]]:
    for part in founded_by(table):
        yield part, table.directory.read_table(captions_name(part), _COLUMNS)


def _is_weak(
    rows: pa.Table, selector: Selector, logprob_below: float | None, reviews: dict[str, Review]
) -> npt.NDArray[np.bool_]:
    weak = _decided(rows, reviews, selector.decisions)
    if selector.failed:
        weak |= pc.equal(rows["status"], STATUS_FAILED).to_numpy()
    if selector.flags:
        weak |= np.array([not selector.flags.isdisjoint(flags or ()) for flags in rows["flags"].to_pylist()], bool)
    if logprob_below is not None:
        weak |= pc.fill_null(pc.less(rows["logprob_mean"], logprob_below), False).to_numpy()
    return weak


def _decided(rows: pa.Table, reviews: dict[str, Review], decisions: frozenset[str]) -> npt.NDArray[np.bool_]:
    """Rows of which one of the decisions holds: what was decided about an earlier caption does not, unless lasting."""
    found = np.zeros(len(rows), bool)
    if not reviews or not decisions:
        return found
    created = rows["created_at"]
    for place, image_id in enumerate(rows["image_id"].to_pylist()):
        review = reviews.get(image_id)
        if review and review.decision in decisions:
            found[place] = still_applies(review, created[place].as_py())
    return found


def _logprob_below(table: CaptionsTable, selector: Selector, fingerprint: str) -> float | None:
    """The limit that a share comes to, among captions of other models. What the same choice came to before holds: it
    must not move with the rows that were made since."""
    if selector.percent is None:
        return selector.logprob_below
    for plan in reversed(table.plans()):
        made = plan.recaption
        if made and (made.only, made.fingerprint) == (selector.text, fingerprint):
            return made.logprob_below
    counts = np.zeros(1 << (32 - _BIN_BITS), np.int64)
    for _, rows in _parts(table):
        known = rows.filter(pc.not_equal(rows["fingerprint"], fingerprint))["logprob_mean"].drop_null().to_numpy()
        counts += np.bincount(np.abs(known).view(np.uint32) >> _BIN_BITS, minlength=len(counts))
    if not counts.any():
        return None
    from_least_certain = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_least_certain, selector.percent / 100 * counts.sum()))
    edge = np.uint32((len(counts) - 1 - place) << _BIN_BITS).view(np.float32)
    return float(np.nextafter(-edge, np.float32(1)))
