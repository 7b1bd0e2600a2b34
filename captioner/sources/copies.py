"""Copies that a manifest declares: rows with the same `sha256` are one file under several names.

They are listed one after the other, so that they get into one chunk, where the file is read once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from captioner.data import RawImage
from captioner.sources.reading import raise_if_source_failed, reads_of, run_reads
from captioner.sources.root import Root

KNOWN_SHA256 = pa.field("known_sha256", pa.string())  # a column of the plan beside PLAN_SCHEMA; null: not known
_HEX = re.compile("[0-9a-f]{64}")


def with_known_sha256(rows: pa.Table, sha256s: Sequence[str | None]) -> pa.Table:
    """Add KNOWN_SHA256 to `rows`, null where it is not a sha256 in hex, and move copies behind the first of them."""
    lower = [(text or "").lower() for text in sha256s]
    column = pa.array([text if _HEX.fullmatch(text) else None for text in lower], KNOWN_SHA256.type)
    rows = rows.append_column(KNOWN_SHA256, column)
    firsts = _first_indices(column.to_pylist())
    return rows if firsts == list(range(rows.num_rows)) else rows.take(np.argsort(firsts, kind="stable"))


def read_copies_once(rows: pa.Table, root: Root) -> list[RawImage]:
    """Return a RawImage for each planned row of a manifest, in order; copies share the bytes of the first.

    A copy is read itself where the first one does not have the sha256 of the manifest, or cannot be read. Raises
    SourceError where the source is at fault.
    """
    tasks, sha256s = reads_of(rows, root), _sha256s_of(rows)
    firsts = _first_indices(sha256s)
    distinct = sorted(set(firsts))
    images = dict(zip(distinct, run_reads([tasks[index] for index in distinct]), strict=True))
    copies = [index for index, first in enumerate(firsts) if index != first]
    verified = {first for first in {firsts[index] for index in copies} if _has_sha256(images[first], sha256s[first])}
    unverified = [index for index in copies if firsts[index] not in verified]
    images |= zip(unverified, run_reads([tasks[index] for index in unverified]), strict=True)
    ids, files = rows["image_id"].to_pylist(), rows["file"].to_pylist()
    for index in copies:
        if firsts[index] in verified:
            images[index] = RawImage(ids[index], root.uri(files[index]), images[firsts[index]].data)
    in_order = [images[index] for index in range(rows.num_rows)]
    raise_if_source_failed(in_order, root, in_archives=False)
    return in_order


def _sha256s_of(rows: pa.Table) -> list[str | None]:
    if KNOWN_SHA256.name not in rows.column_names:
        return [None] * rows.num_rows
    return list(rows[KNOWN_SHA256.name].to_pylist())


def _first_indices(sha256s: list[str | None]) -> list[int]:
    """Return for each row the index of the first row with the same sha256; its own index where that is not known."""
    first: dict[str, int] = {}
    return [first.setdefault(sha256, index) if sha256 else index for index, sha256 in enumerate(sha256s)]


def _has_sha256(image: RawImage, sha256: str | None) -> bool:
    return image.data is not None and hashlib.sha256(image.data).hexdigest() == sha256
