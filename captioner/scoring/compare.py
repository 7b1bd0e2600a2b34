"""Two runs over the same pictures: which captions changed, and whether the change is for the better."""

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
from captioner.scoring.eligible_rows import Question
from captioner.scoring.normalise import caption_tokens
from captioner.scoring.sample import Draw, rank
from captioner.scoring.wer import match_captions
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable

COMPARED_ROWS = 10_000
SHOWN_CHANGES = 24


@dataclass(frozen=True)
class Pair:
    """A picture with the caption of this run and that of the other."""

    image_id: str
    caption: str
    other: str
    references: list[str]
    chunk_id: str
    chunk_row: int


def compare_tables(table: CaptionsTable, other: CaptionsTable, question: Question) -> dict[str, Any]:
    """Figures of at most 10,000 pictures that both tables caption, the first of the seed's order.

    Differences are this run's minus the other's, with paired bootstrap intervals: the same pictures are drawn for both.
    """
    mine = _drawn(table, question)
    theirs = _captions_of(other, list(mine))
    pairs = [
        Pair(name, row["caption"], theirs[name], row["reference_captions"], row["chunk_id"], row["chunk_row"])
        for name, row in mine.items()
        if name in theirs
    ]
    changed = [pair for pair in pairs if pair.caption != pair.other]
    scored = [pair for pair in pairs if pair.references]
    return {
        "against": other.directory.location,
        "model": other.info.get("model"),
        "num_rows": len(pairs),
        "changed": len(changed),
        "scored": len(scored),
        "differences": differences(scored, question.seed),
        "shown": shown(changed),
    }


def _drawn(table: CaptionsTable, question: Question) -> dict[str, dict[str, Any]]:
    draw: Draw[dict[str, Any]] = Draw(COMPARED_ROWS)
    given = question.references
    columns = ["image_id", "status", "caption", "reference_captions", "chunk_id", "chunk_row"]
    for rows in read_parts(table, columns):
        for row in rows.filter(pc.equal(rows["status"], STATUS_OK)).to_pylist():
            name = row["image_id"]
            known = given.find(name) if given else row["reference_captions"]
            draw.offer(rank(name, question.seed), name, row | {"reference_captions": known or []})
    return {row["image_id"]: row for row in draw}


def _captions_of(table: CaptionsTable, names: Sequence[str]) -> dict[str, str]:
    wanted = pa.array(names, pa.string())
    found: dict[str, str] = {}
    for rows in read_parts(table, ["image_id", "status", "caption"]):
        kept = rows.filter(pc.and_(pc.equal(rows["status"], STATUS_OK), pc.is_in(rows["image_id"], wanted)))
        found.update(zip(kept["image_id"].to_pylist(), kept["caption"].to_pylist(), strict=True))
    return found


def differences(pairs: Sequence[Pair], seed: int) -> dict[str, dict[str, Any]]:
    """WER, CIDEr-D, BLEU-4 and ROUGE-L of this run and of the other; empty without references."""
    if not pairs:
        return {}
    references = [pair.references for pair in pairs]
    texts = [pair.caption for pair in pairs], [pair.other for pair in pairs]
    known = [[caption_tokens(one) for one in several] for several in references]
    mine, theirs = ([caption_tokens(text) for text in some] for some in texts)
    found = _wer_difference(texts, references, seed)
    found["CIDEr-D"] = _mean_difference(cider_d(mine, known), cider_d(theirs, known), seed)
    found["BLEU-4"] = _bleu_difference(mine, theirs, known, seed)
    rouges = [[rouge_l(*one) for one in zip(said, known, strict=True)] for said in (mine, theirs)]
    found["ROUGE-L"] = _mean_difference(rouges[0], rouges[1], seed)
    return found


def _wer_difference(texts: tuple[list[str], list[str]], references: list[list[str]], seed: int) -> dict[str, Any]:
    """Empty where no reference holds a word."""
    mine, theirs = ([match.best_edits for match in match_captions(some, references)] for some in texts)
    rows = Counter((a.edits, a.words, b.edits, b.words) for a, b in zip(mine, theirs, strict=True))
    sums = [sum(row[place] * count for row, count in rows.items()) for place in range(4)]
    if not sums[1] or not sums[3]:
        return {}
    return {
        "WER": _figures(sums[0] / sums[1], sums[2] / sums[3], difference_interval(rows, seed), lower_is_better=True)
    }


def _mean_difference(mine: Sequence[float], theirs: Sequence[float], seed: int) -> dict[str, Any]:
    gaps = [round(a - b, 6) for a, b in zip(mine, theirs, strict=True)]
    return _figures(sum(mine) / len(mine), sum(theirs) / len(theirs), mean_interval(gaps, seed))


def _bleu_difference(
    mine: Sequence[Tokens], theirs: Sequence[Tokens], known: Sequence[Sequence[Tokens]], seed: int
) -> dict[str, Any]:
    counts = [
        (*bleu_counts(own, several), *bleu_counts(other, several))
        for own, other, several in zip(mine, theirs, known, strict=True)
    ]
    own, other = (float(bleu_of(part)[3]) for part in np.array(counts, np.float64).sum(axis=0).reshape(2, 10))
    gap = interval(Counter(counts), lambda sums: bleu_of(sums[:, :10])[:, 3] - bleu_of(sums[:, 10:])[:, 3], seed)
    return _figures(own, other, gap)


def _figures(
    mine: float, theirs: float, interval: tuple[float, float] | None, lower_is_better: bool = False
) -> dict[str, Any]:
    """`verdict`: "better" or "worse" than the other where the interval leaves out 0, else "not shown to differ"."""
    verdict = "not shown to differ"
    if interval is not None and (interval[0] > 0 or interval[1] < 0):
        verdict = "better" if (interval[1] < 0) == lower_is_better else "worse"
    gap = mine - theirs
    return {"this": mine, "other": theirs, "difference": gap, "interval": interval, "verdict": verdict}


def shown(changed: Sequence[Pair]) -> list[dict[str, Any]]:
    """Pairs as a report keeps them: `caption` and `other`."""
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
