"""Compare two runs over the same images: which captions differ, and which run has the better scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_OK
from captioner.scoring.bootstrap import difference_interval, interval, mean_interval
from captioner.scoring.coco_metrics import Tokens, bleu_counts, bleu_of, cider_d, rouge_l
from captioner.scoring.eligible_rows import CheckSpec
from captioner.scoring.normalise import caption_tokens
from captioner.scoring.sample import LowestRanks, rank
from captioner.scoring.wer import match_captions
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable

COMPARED_ROWS = 10_000
SHOWN_CHANGES = 24


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

    Differences are this run's minus the other's, with paired bootstrap intervals over the same images.
    """
    sampled = _sample_rows(table, spec)
    other_captions = _captions_of(other, list(sampled))
    pairs = [
        CaptionPair(
            name, row["caption"], other_captions[name], row["reference_captions"], row["chunk_id"], row["chunk_row"]
        )
        for name, row in sampled.items()
        if name in other_captions
    ]
    changed = [pair for pair in pairs if pair.caption != pair.other]
    scored = [pair for pair in pairs if pair.references]
    return {
        "against": other.directory.location,
        "model": other.info.get("model"),
        "num_rows": len(pairs),
        "changed": len(changed),
        "scored": len(scored),
        "differences": differences(scored, spec.seed),
        "shown": shown_pairs(changed),
    }


def _sample_rows(table: CaptionsTable, spec: CheckSpec) -> dict[str, dict[str, Any]]:
    """Return a sample of the captioned rows with their references, by image id."""
    sample: LowestRanks[dict[str, Any]] = LowestRanks(COMPARED_ROWS)
    references = spec.references
    columns = ["image_id", "status", "caption", "reference_captions", "chunk_id", "chunk_row"]
    for rows in read_parts(table, columns):
        for row in rows.filter(pc.equal(rows["status"], STATUS_OK)).to_pylist():
            name = row["image_id"]
            captions = references.find(name) if references else row["reference_captions"]
            sample.offer(rank(name, spec.seed), name, row | {"reference_captions": captions or []})
    return {row["image_id"]: row for row in sample}


def _captions_of(table: CaptionsTable, names: Sequence[str]) -> dict[str, str]:
    name_array = pa.array(names, pa.string())
    captions: dict[str, str] = {}
    for rows in read_parts(table, ["image_id", "status", "caption"]):
        kept = rows.filter(pc.and_(pc.equal(rows["status"], STATUS_OK), pc.is_in(rows["image_id"], name_array)))
        captions.update(zip(kept["image_id"].to_pylist(), kept["caption"].to_pylist(), strict=True))
    return captions


def differences(pairs: Sequence[CaptionPair], seed: int) -> dict[str, dict[str, Any]]:
    """Return WER, CIDEr-D, BLEU-4 and ROUGE-L of this run and of the other; empty without references."""
    if not pairs:
        return {}
    references = [pair.references for pair in pairs]
    texts = [pair.caption for pair in pairs], [pair.other for pair in pairs]
    reference_tokens = [[caption_tokens(text) for text in captions] for captions in references]
    mine, theirs = ([caption_tokens(text) for text in captions] for captions in texts)
    figures = _wer_difference(texts, references, seed)
    figures["CIDEr-D"] = _mean_difference(cider_d(mine, reference_tokens), cider_d(theirs, reference_tokens), seed)
    figures["BLEU-4"] = _bleu_difference(mine, theirs, reference_tokens, seed)
    rouges = [list(map(rouge_l, captions, reference_tokens)) for captions in (mine, theirs)]
    figures["ROUGE-L"] = _mean_difference(rouges[0], rouges[1], seed)
    return figures


def _wer_difference(texts: tuple[list[str], list[str]], references: list[list[str]], seed: int) -> dict[str, Any]:
    """Return the WER figures; empty when no reference has a word."""
    mine, theirs = ([match.best_edits for match in match_captions(captions, references)] for captions in texts)
    rows = Counter((a.edits, a.words, b.edits, b.words) for a, b in zip(mine, theirs, strict=True))
    sums = [sum(row[column] * count for row, count in rows.items()) for column in range(4)]
    if not sums[1] or not sums[3]:
        return {}
    return {
        "WER": _figures(sums[0] / sums[1], sums[2] / sums[3], difference_interval(rows, seed), lower_is_better=True)
    }


def _mean_difference(mine: Sequence[float], theirs: Sequence[float], seed: int) -> dict[str, Any]:
    gaps = [round(a - b, 6) for a, b in zip(mine, theirs, strict=True)]
    return _figures(sum(mine) / len(mine), sum(theirs) / len(theirs), mean_interval(gaps, seed))


def _bleu_difference(
    mine: Sequence[Tokens], theirs: Sequence[Tokens], references: Sequence[Sequence[Tokens]], seed: int
) -> dict[str, Any]:
    counts = [
        (*bleu_counts(caption, captions), *bleu_counts(other, captions))
        for caption, other, captions in zip(mine, theirs, references, strict=True)
    ]
    bleu, other_bleu = (float(bleu_of(sums)[3]) for sums in np.array(counts, np.float64).sum(axis=0).reshape(2, 10))
    gap = interval(Counter(counts), lambda sums: bleu_of(sums[:, :10])[:, 3] - bleu_of(sums[:, 10:])[:, 3], seed)
    return _figures(bleu, other_bleu, gap)


def _figures(
    mine: float, theirs: float, interval: tuple[float, float] | None, lower_is_better: bool = False
) -> dict[str, Any]:
    """Return the figures of one score.

    `verdict`: "better" or "worse" than the other when the interval excludes 0, else "not shown to differ".
    """
    verdict = "not shown to differ"
    if interval is not None and (interval[0] > 0 or interval[1] < 0):
        verdict = "better" if (interval[1] < 0) == lower_is_better else "worse"
    gap = mine - theirs
    return {"this": mine, "other": theirs, "difference": gap, "interval": interval, "verdict": verdict}


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
