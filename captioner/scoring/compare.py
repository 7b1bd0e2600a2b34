"""Compare the captions of two runs over the same images: which differ, and which run has the better scores.

`compare_tables` compares two tables; `compare_recaptioned` the latest recaptioning of a table with the captions that it
replaced, which are kept in history/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_OK
from captioner.scoring.bootstrap import difference_interval, interval, mean_interval
from captioner.scoring.coco_metrics import Tokens, bleu_counts, bleu_of, cider_d, rouge_l
from captioner.scoring.eligible_rows import CheckSpec, trained_images
from captioner.scoring.normalise import caption_tokens
from captioner.scoring.sample import LowestRanks, rank
from captioner.scoring.wer import match_captions
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable, Plan, captions_name, history_name

COMPARED_ROWS = 10_000
SHOWN_CHANGES = 24
_ROW_COLUMNS = ["image_id", "status", "caption", "sha256", "reference_captions", "fingerprint", "chunk_id", "chunk_row"]
_COUNTS = ("num_rows", "changed", "now_ok", "now_failed", "trained_left_out")


@dataclass(frozen=True)
class CaptionPair:
    """An image with the caption of this run and that of the other run."""

    image_id: str
    caption: str
    other: str
    references: list[str]
    chunk_id: str
    chunk_row: int


def compare_tables(table: CaptionsTable, other: CaptionsTable, spec: CheckSpec) -> dict[str, Any]:
    """Return the figures of at most 10,000 images that both tables caption, the first in the seed's order.

    Images that the model of either table was trained on are not scored. Differences are this run's minus the other's,
    with paired bootstrap intervals over the same images.
    """
    image_ids = _captioned_by_both(table, other, spec.seed)
    rows, other_rows = _rows_of(table, image_ids), _rows_of(other, image_ids)
    pairs = [_pair(other_rows[image_id], rows[image_id], spec) for image_id in image_ids]
    changed = [pair for pair in pairs if pair.caption != pair.other]
    with_references = [pair for pair in pairs if pair.references]
    trained = trained_images(table) | trained_images(other)
    scored = [
        pair
        for pair in with_references
        if trained.isdisjoint((rows[pair.image_id]["sha256"], other_rows[pair.image_id]["sha256"]))
    ]
    return {
        "against": other.directory.location,
        "model": other.info.get("model"),
        "num_rows": len(pairs),
        "changed": len(changed),
        "trained_left_out": len(with_references) - len(scored),
        "scored": len(scored),
        "differences": differences(scored, spec.seed),
        "shown": shown_pairs(changed),
    }


def _captioned_by_both(table: CaptionsTable, other: CaptionsTable, seed: int) -> list[str]:
    """Return the ids of at most 10,000 images, the first in the seed's order.

    Keeps 8 bytes for each caption of the smaller table.
    """
    smaller, larger = sorted((table, other), key=_num_planned)
    in_smaller = np.sort(np.concatenate([np.zeros(0, np.uint64), *(ranks for _, ranks in _ranked(smaller, seed))]))
    sample: LowestRanks[str] = LowestRanks(COMPARED_ROWS)
    for image_ids, ranks in _ranked(larger, seed):
        first, end = (np.searchsorted(in_smaller, ranks, side) for side in ("left", "right"))
        for index in np.flatnonzero(first < end):
            sample.offer(int(ranks[index]), image_ids[index], image_ids[index])
    return list(sample)


def _num_planned(table: CaptionsTable) -> int:
    return sum(plan.num_rows for plan in table.plans() if plan.adds_parts)


def _ranked(table: CaptionsTable, seed: int) -> Iterator[tuple[list[str], npt.NDArray[np.uint64]]]:
    """Yield the ids of the captioned images of each part, and their ranks."""
    for rows in read_parts(table, ["image_id", "status"]):
        image_ids = rows.filter(pc.equal(rows["status"], STATUS_OK))["image_id"].to_pylist()
        yield image_ids, np.fromiter((rank(image_id, seed) for image_id in image_ids), np.uint64, len(image_ids))


def _rows_of(table: CaptionsTable, image_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return rows by image id."""
    wanted = pa.array(image_ids, pa.string())
    rows = (part.filter(pc.is_in(part["image_id"], wanted)) for part in read_parts(table, _ROW_COLUMNS))
    return {row["image_id"]: row for part_rows in rows for row in part_rows.to_pylist()}


def differences(pairs: Sequence[CaptionPair], seed: int) -> dict[str, dict[str, Any]]:
    """Return WER, CIDEr-D, BLEU-4 and ROUGE-L of this run and of the other; empty without references."""
    if not pairs:
        return {}
    references = [pair.references for pair in pairs]
    texts = [pair.caption for pair in pairs], [pair.other for pair in pairs]
    reference_tokens = [[caption_tokens(text) for text in captions] for captions in references]
    tokens, other_tokens = ([caption_tokens(text) for text in captions] for captions in texts)
    figures = _wer_difference(texts, references, seed)
    ciders, other_ciders = (cider_d(captions, reference_tokens) for captions in (tokens, other_tokens))
    figures["CIDEr-D"] = _mean_difference(ciders, other_ciders, seed)
    figures["BLEU-4"] = _bleu_difference(tokens, other_tokens, reference_tokens, seed)
    rouges = [list(map(rouge_l, captions, reference_tokens)) for captions in (tokens, other_tokens)]
    figures["ROUGE-L"] = _mean_difference(rouges[0], rouges[1], seed)
    return figures


def _wer_difference(texts: tuple[list[str], list[str]], references: list[list[str]], seed: int) -> dict[str, Any]:
    """Return the WER figures; empty when no reference has a word."""
    edits, other_edits = ([match.best_edits for match in match_captions(captions, references)] for captions in texts)
    rows = Counter((a.edits, a.words, b.edits, b.words) for a, b in zip(edits, other_edits, strict=True))
    sums = [sum(row[column] * count for row, count in rows.items()) for column in range(4)]
    if not sums[1] or not sums[3]:
        return {}
    return {
        "WER": _figures(sums[0] / sums[1], sums[2] / sums[3], difference_interval(rows, seed), lower_is_better=True)
    }


def _mean_difference(scores: Sequence[float], others: Sequence[float], seed: int) -> dict[str, Any]:
    gaps = [round(a - b, 6) for a, b in zip(scores, others, strict=True)]
    return _figures(sum(scores) / len(scores), sum(others) / len(others), mean_interval(gaps, seed))


def _bleu_difference(
    captions: Sequence[Tokens], others: Sequence[Tokens], references: Sequence[Sequence[Tokens]], seed: int
) -> dict[str, Any]:
    counts = [
        (*bleu_counts(caption, texts), *bleu_counts(other, texts))
        for caption, other, texts in zip(captions, others, references, strict=True)
    ]
    bleu, other_bleu = (float(bleu_of(sums)[3]) for sums in np.array(counts, np.float64).sum(axis=0).reshape(2, 10))
    gap = interval(Counter(counts), lambda sums: bleu_of(sums[:, :10])[:, 3] - bleu_of(sums[:, 10:])[:, 3], seed)
    return _figures(bleu, other_bleu, gap)


def _figures(
    score: float, other: float, interval: tuple[float, float] | None, lower_is_better: bool = False
) -> dict[str, Any]:
    """Return the figures of one score.

    `verdict`: "better" or "worse" than the other when the interval excludes 0, else "not shown to differ".
    """
    verdict = "not shown to differ"
    if interval is not None and (interval[0] > 0 or interval[1] < 0):
        verdict = "better" if (interval[1] < 0) == lower_is_better else "worse"
    gap = score - other
    return {"this": score, "other": other, "difference": gap, "interval": interval, "verdict": verdict}


def shown_pairs(changed: Sequence[CaptionPair]) -> list[dict[str, Any]]:
    """Return the first pairs as check.json holds them."""
    return [
        {
            "image_id": pair.image_id,
            "caption": pair.caption,
            "other": pair.other,
            "references": pair.references[:3],
            "chunk_id": pair.chunk_id,
            "chunk_row": pair.chunk_row,
        }
        for pair in changed[:SHOWN_CHANGES]
    ]


def compare_recaptioned(table: CaptionsTable, spec: CheckSpec) -> dict[str, Any] | None:
    """Return the figures of the latest recaptioning (`--only`); `None` when none has been published.

    All rows are counted. At most 10,000 are scored: the first in the seed's order that have references, both captions,
    and were not training images of the new model. Differences are new minus old.
    """
    plans = [plan for plan in table.plans() if plan.recaption and table.is_published(plan.generation)]
    if not plans:
        return None
    plan, recaption = plans[-1], plans[-1].recaption
    assert recaption is not None
    recaptioned = _Recaptioned(spec, trained_images(table))
    for older, newer in _replaced_rows(table, plan):
        recaptioned.add(older, newer)
    pairs = list(recaptioned.scored)
    return {
        "generation": plan.generation,
        "only": recaption.only,
        "logprob_below": recaption.logprob_below,
        "model": recaption.model,
        "before": [{**_model_name_of(table, name), "rows": rows} for name, rows in recaptioned.before.most_common()],
        **{name: recaptioned.counts[name] for name in _COUNTS},
        "scored": len(pairs),
        "differences": differences(pairs, spec.seed),
        "shown": shown_pairs(list(recaptioned.changed)),
    }


class _Recaptioned:
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


def _replaced_rows(table: CaptionsTable, plan: Plan) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (replaced row, current row) for each image of a generation."""
    for part in sorted(plan.parts):
        part_rows = table.read_plan_part(plan, part, ["part_row"])["part_row"]
        name = history_name(plan.generation, part)
        older = table.directory.read_table(name, _ROW_COLUMNS)
        if len(older) != plan.parts[part]:
            raise table.directory.damage(name, "is damaged: it holds the rows of another part")
        newer = table.directory.read_table(captions_name(part), _ROW_COLUMNS).take(part_rows.combine_chunks())
        for old, new in zip(older.to_batches(1024), _slices_like(newer, older), strict=True):
            yield from zip(old.to_pylist(), new.to_pylist(), strict=True)


def _slices_like(rows: pa.Table, like: pa.Table) -> Iterator[pa.Table]:
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
