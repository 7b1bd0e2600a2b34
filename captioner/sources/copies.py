"""Copies that a manifest tells of: rows whose column `sha256` is the same are one file under several names.

They are listed one after the other, so that they come into one chunk, and there the file is read once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from captioner.data import RawImage
from captioner.sources.reading import check_archive, reads_of, run_reads
from captioner.sources.root import Root

KNOWN_SHA256 = pa.field("known_sha256", pa.string())  # of planned rows, beside PLAN_SCHEMA; null: not known
_HEX = re.compile("[0-9a-f]{64}")


def with_known_sha256(rows: pa.Table, told: Sequence[str | None]) -> pa.Table:
    """`rows` with KNOWN_SHA256, copies behind the first of their kind. What is no sha256 in hex is not known."""
    lower = [(text or "").lower() for text in told]
    known = pa.array([text if _HEX.fullmatch(text) else None for text in lower], KNOWN_SHA256.type)
    rows = rows.append_column(KNOWN_SHA256, known)
    firsts = _first_places(known.to_pylist())
    return rows if firsts == list(range(rows.num_rows)) else rows.take(np.argsort(firsts, kind="stable"))


def read_copies_once(rows: pa.Table, root: Root) -> list[RawImage]:
    """One RawImage for each planned row of a manifest, in order; copies share the bytes of the first.

    Only where those bytes are what the manifest says: else, and where the first cannot be read, each copy is read.
    Raises SourceError where the fault is the archive's.
    """
    tasks, known = reads_of(rows, root), _known(rows)
    firsts = _first_places(known)
    distinct = sorted(set(firsts))
    images = dict(zip(distinct, run_reads([tasks[place] for place in distinct]), strict=True))
    copies = [place for place, first in enumerate(firsts) if place != first]
    proven = {first for first in {firsts[place] for place in copies} if _is(images[first].data, known[first])}
    unproven = [place for place in copies if firsts[place] not in proven]
    images |= zip(unproven, run_reads([tasks[place] for place in unproven]), strict=True)
    ids, files = rows["image_id"].to_pylist(), rows["file"].to_pylist()
    for place in copies:
        if firsts[place] in proven:
            images[place] = RawImage(ids[place], root.uri(files[place]), images[firsts[place]].data)
    in_order = [images[place] for place in range(rows.num_rows)]
    check_archive(in_order, root, in_archives=False)
    return in_order


def _known(rows: pa.Table) -> list[str | None]:
    listed = KNOWN_SHA256.name in rows.column_names
    known: list[str | None] = rows[KNOWN_SHA256.name].to_pylist() if listed else [None] * rows.num_rows
    return known


def _first_places(known: list[str | None]) -> list[int]:
    """For each row the place of the first one that is known to be the same file; its own where none is."""
    first: dict[str, int] = {}
    return [first.setdefault(sha256, place) if sha256 else place for place, sha256 in enumerate(known)]


def _is(data: bytes | None, sha256: str | None) -> bool:
    return data is not None and hashlib.sha256(data).hexdigest() == sha256
