"""What a recaptioning changed: the rows it superseded, in history/, beside those that took their place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from captioner.data import STATUS_OK
from captioner.scoring.compare import COMPARED_ROWS, SHOWN_CHANGES, Pair, differences, shown
from captioner.scoring.eligible_rows import Question, trained_pictures
from captioner.scoring.sample import Draw, rank
from captioner.store.table import CaptionsTable, Plan, captions_name, history_name, plan_part_name

_COLUMNS = ["image_id", "status", "caption", "sha256", "reference_captions", "fingerprint", "chunk_id", "chunk_row"]
_COUNTED = ("num_rows", "changed", "now_ok", "now_failed", "trained_left_out")


def find_changes(table: CaptionsTable, question: Question) -> dict[str, Any] | None:
    """Figures of the latest recaptioning (`--only`); `None` where there is none that is published.

    Every row is counted. Scored are at most 10,000 of those with references and a caption on both sides, the first of
    the seed's order, without the pictures that the new model was trained on; differences are new minus old.
    """
    plans = [plan for plan in table.plans() if plan.recaption and table.is_published(plan.generation)]
    if not plans:
        return None
    plan, recaption = plans[-1], plans[-1].recaption
    assert recaption is not None
    changes = _Changes(question, trained_pictures(table))
    for older, newer in _rows(table, plan):
        changes.add(older, newer)
    pairs = list(changes.scored)
    return {
        "generation": plan.generation,
        "only": recaption.only,
        "logprob_below": recaption.logprob_below,
        "model": recaption.model,
        "before": [{**_facts(table, name), "rows": rows} for name, rows in changes.before.most_common()],
        **{name: changes.counts[name] for name in _COUNTED},
        "scored": len(pairs),
        "differences": differences(pairs, question.seed),
        "shown": shown(list(changes.changed)),
    }


class _Changes:
    """Takes pairs of rows one after the other."""

    def __init__(self, question: Question, trained: frozenset[str]) -> None:
        self._question, self._trained = question, trained
        self.counts: Counter[str] = Counter()
        self.before: Counter[str] = Counter()  # rows by their older fingerprint
        self.scored: Draw[Pair] = Draw(COMPARED_ROWS)
        self.changed: Draw[Pair] = Draw(SHOWN_CHANGES)

    def add(self, older: dict[str, Any], newer: dict[str, Any]) -> None:
        counts, was_ok, is_ok = self.counts, older["status"] == STATUS_OK, newer["status"] == STATUS_OK
        self.before[older["fingerprint"]] += 1
        counts["num_rows"] += 1
        counts["now_ok"] += is_ok and not was_ok
        counts["now_failed"] += was_ok and not is_ok
        if not (was_ok and is_ok):
            return
        pair, place = _pair(older, newer, self._question), rank(newer["image_id"], self._question.seed)
        if pair.caption != pair.other:
            counts["changed"] += 1
            self.changed.offer(place, pair.image_id, pair)
        if pair.references and newer["sha256"] in self._trained:
            counts["trained_left_out"] += 1
        elif pair.references:
            self.scored.offer(place, pair.image_id, pair)


def _rows(table: CaptionsTable, plan: Plan) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(superseded row, current row) of each picture of a generation."""
    for part in sorted(plan.parts):
        places = table.directory.read_table(plan_part_name(plan.generation, part), ["part_row"])["part_row"]
        older = table.directory.read_table(history_name(plan.generation, part), _COLUMNS)
        newer = table.directory.read_table(captions_name(part), _COLUMNS).take(places.combine_chunks())
        for old, new in zip(older.to_batches(1024), _batches(newer, older), strict=True):
            yield from zip(old.to_pylist(), new.to_pylist(), strict=True)


def _batches(rows: pa.Table, like: pa.Table) -> Iterator[pa.Table]:
    first = 0
    for batch in like.to_batches(1024):
        yield rows.slice(first, len(batch))
        first += len(batch)


def _pair(older: dict[str, Any], newer: dict[str, Any], question: Question) -> Pair:
    given, name = question.references, newer["image_id"]
    known = given.find(name) if given else newer["reference_captions"]
    return Pair(name, newer["caption"], older["caption"], known or [], newer["chunk_id"], newer["chunk_row"])


def _facts(table: CaptionsTable, fingerprint: str) -> dict[str, Any]:
    facts = table.info.get("models", {}).get(fingerprint, {})
    return {"fingerprint": fingerprint, "name": facts.get("name", fingerprint[:12])}
