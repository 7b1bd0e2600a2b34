"""Two runs over the same pictures: which captions changed, and whether the change is for the better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_OK
from captioner.scoring.bootstrap import difference_interval, mean_interval
from captioner.scoring.choose import Question
from captioner.scoring.cider import cider_d
from captioner.scoring.draw import Draw, rank
from captioner.scoring.normalise import caption_tokens
from captioner.scoring.rouge import rouge_l
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
    """WER, CIDEr-D and ROUGE-L of this run and of the other; empty without references."""
    if not pairs:
        return {}
    references = [pair.references for pair in pairs]
    mine = [match.best_edits for match in match_captions([pair.caption for pair in pairs], references)]
    theirs = [match.best_edits for match in match_captions([pair.other for pair in pairs], references)]
    rows = Counter((a.edits, a.words, b.edits, b.words) for a, b in zip(mine, theirs, strict=True))
    sums = [sum(row[place] * count for row, count in rows.items()) for place in range(4)]
    found = {}
    if sums[1] and sums[3]:
        found["WER"] = _figures(sums[0] / sums[1], sums[2] / sums[3], difference_interval(rows, seed))
    known = [[caption_tokens(one) for one in several] for several in references]
    said = [
        [caption_tokens(text) for text in texts] for texts in ([p.caption for p in pairs], [p.other for p in pairs])
    ]
    for name, (own, other) in {
        "CIDEr-D": (cider_d(said[0], known), cider_d(said[1], known)),
        "ROUGE-L": (
            [rouge_l(*pair) for pair in zip(said[0], known, strict=True)],
            [rouge_l(*pair) for pair in zip(said[1], known, strict=True)],
        ),
    }.items():
        gaps = [round(a - b, 6) for a, b in zip(own, other, strict=True)]
        found[name] = _figures(sum(own) / len(own), sum(other) / len(other), mean_interval(gaps, seed))
    return found


def _figures(mine: float, theirs: float, interval: tuple[float, float] | None) -> dict[str, Any]:
    return {"this": mine, "other": theirs, "difference": mine - theirs, "interval": interval}


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
