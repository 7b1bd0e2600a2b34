"""Compare the captions of the latest recaptioning with those it replaced, which are kept in history/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from captioner.data import STATUS_OK
from captioner.scoring.compare import COMPARED_ROWS, SHOWN_CHANGES, CaptionPair, differences, shown_pairs
from captioner.scoring.eligible_rows import CheckSpec, trained_images
from captioner.scoring.sample import LowestRanks, rank
from captioner.store.table import CaptionsTable, Plan, captions_name, history_name

_COLUMNS = ["image_id", "status", "caption", "sha256", "reference_captions", "fingerprint", "chunk_id", "chunk_row"]
_COUNTED = ("num_rows", "changed", "now_ok", "now_failed", "trained_left_out")


def find_changes(table: CaptionsTable, spec: CheckSpec) -> dict[str, Any] | None:
    """Return the figures of the latest recaptioning (`--only`); `None` when none has been published.

    All rows are counted. At most 10,000 are scored: the first in the seed's order that have references, both captions,
    and were not training images of the new model. Differences are new minus old.
    """
    plans = [plan for plan in table.plans() if plan.recaption and table.is_published(plan.generation)]
    if not plans:
        return None
    plan, recaption = plans[-1], plans[-1].recaption
    assert recaption is not None
    changes = _Changes(spec, trained_images(table))
    for older, newer in _rows(table, plan):
        changes.add(older, newer)
    pairs = list(changes.scored)
    return {
        "generation": plan.generation,
        "only": recaption.only,
        "logprob_below": recaption.logprob_below,
        "model": recaption.model,
        "before": [{**_model_name_of(table, name), "rows": rows} for name, rows in changes.before.most_common()],
        **{name: changes.counts[name] for name in _COUNTED},
        "scored": len(pairs),
        "differences": differences(pairs, spec.seed),
        "shown": shown_pairs(list(changes.changed)),
    }


class _Changes:
    """Collects counts and samples of the replaced rows."""

    def __init__(self, spec: CheckSpec, trained: frozenset[str]) -> None:
        self._spec, self._trained = spec, trained
        self.counts: Counter[str] = Counter()
        self.before: Counter[str] = Counter()  # rows by their older fingerprint
        self.scored: LowestRanks[CaptionPair] = LowestRanks(COMPARED_ROWS)
        self.changed: LowestRanks[CaptionPair] = LowestRanks(SHOWN_CHANGES)

    def add(self, older: dict[str, Any], newer: dict[str, Any]) -> None:
        """Add a replaced row and its replacement."""
        counts, was_ok, is_ok = self.counts, older["status"] == STATUS_OK, newer["status"] == STATUS_OK
        self.before[older["fingerprint"]] += 1
        counts["num_rows"] += 1
        counts["now_ok"] += is_ok and not was_ok
        counts["now_failed"] += was_ok and not is_ok
        if not (was_ok and is_ok):
            return
        pair, order = _pair(older, newer, self._spec), rank(newer["image_id"], self._spec.seed)
        if pair.caption != pair.other:
            counts["changed"] += 1
            self.changed.offer(order, pair.image_id, pair)
        if pair.references and newer["sha256"] in self._trained:
            counts["trained_left_out"] += 1
        elif pair.references:
            self.scored.offer(order, pair.image_id, pair)


def _rows(table: CaptionsTable, plan: Plan) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (replaced row, current row) for each image of a generation."""
    for part in sorted(plan.parts):
        part_rows = table.read_plan_part(plan, part, ["part_row"])["part_row"]
        name = history_name(plan.generation, part)
        older = table.directory.read_table(name, _COLUMNS)
        if len(older) != plan.parts[part]:
            raise table.directory.damage(name, "is damaged: it holds the rows of another part")
        newer = table.directory.read_table(captions_name(part), _COLUMNS).take(part_rows.combine_chunks())
        for old, new in zip(older.to_batches(1024), _batches(newer, older), strict=True):
            yield from zip(old.to_pylist(), new.to_pylist(), strict=True)


def _batches(rows: pa.Table, like: pa.Table) -> Iterator[pa.Table]:
    """Yield slices of `rows` as long as the batches of `like`."""
    first = 0
    for batch in like.to_batches(1024):
        yield rows.slice(first, len(batch))
        first += len(batch)


def _pair(older: dict[str, Any], newer: dict[str, Any], spec: CheckSpec) -> CaptionPair:
    references, name = spec.references, newer["image_id"]
    captions = references.find(name) if references else newer["reference_captions"]
    return CaptionPair(name, newer["caption"], older["caption"], captions or [], newer["chunk_id"], newer["chunk_row"])


def _model_name_of(table: CaptionsTable, fingerprint: str) -> dict[str, Any]:
    model = table.info.get("models", {}).get(fingerprint, {})
    return {"fingerprint": fingerprint, "name": model.get("name", fingerprint[:12])}
