"""Check a sample of a finished table against the references its rows carry."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from hashlib import blake2b
from heapq import nsmallest
from typing import Any

import pyarrow.compute as pc

from captioner.data import STATUS_OK
from captioner.scoring.wer import corpus_wer, shuffled_wer
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable

SAMPLE = 500


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """`wer`: corpus WER of `num_rows` captions, minimum over references. `shuffled_wer`: of the same captions on the
    wrong pictures."""

    num_rows: int
    wer: float
    shuffled_wer: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def spot_check(table: CaptionsTable, sample: int = SAMPLE, seed: int = 0) -> SpotCheck | None:
    """The check, or `None` where no captioned row has a reference.

    The rows are those whose ids have the smallest hashes, so the sample does not depend on chunks or workers.
    """
    drawn: list[tuple[bytes, str, list[str]]] = []
    for rows in read_parts(table, ["image_id", "status", "caption", "reference_captions"]):
        known = rows.filter(pc.greater(pc.fill_null(pc.list_value_length(rows["reference_captions"]), 0), 0))
        fine = known.filter(pc.equal(known["status"], STATUS_OK)).to_pylist()
        keyed = [(_hash(row["image_id"], seed), row["caption"], row["reference_captions"]) for row in fine]
        drawn = nsmallest(sample, drawn + keyed)
    captions, references = [caption for _, caption, _ in drawn], [known for _, _, known in drawn]
    wer = corpus_wer(captions, references) if drawn else None
    return None if wer is None else SpotCheck(len(drawn), wer, shuffled_wer(captions, references, seed))


def _hash(image_id: str, seed: int) -> bytes:
    return blake2b(f"{seed}:{image_id}".encode(), digest_size=16).digest()
