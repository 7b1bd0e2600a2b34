"""A source of any size and an engine that answers at once: everything of a run but pixels and model.

Listing, rows and captions are made from the number of the image: nothing is stored, and every run gives the same.
"""

from __future__ import annotations

import binascii
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_FAILED, STATUS_OK, Chunk, Listing, RawImage, Receipt
from captioner.sources.plan_rows import BATCH_ROWS, plan_table
from captioner.starter.scenes import COLOURS, SHAPES
from captioner.steps import ChunkRows, Work, commit

IMAGES_PER_UNIT = 100_000
REFERENCE_EVERY = 100  # images, of which one has a reference caption
FAILURE_EVERY = 1_000  # images, of which one fails in the first generation
_NUM_TEXTS = 50_021  # captions that differ
_SCHEME = "synthetic://"


@dataclass(frozen=True, slots=True)
class SyntheticSource:
    """A source of `num_images` images that exist in its listing only."""

    num_images: int

    @property
    def name(self) -> str:
        return _SCHEME

    def units(self) -> Sequence[str]:
        return [f"{number:05d}" for number in range(-(-self.num_images // IMAGES_PER_UNIT))]

    def kept_fields(self) -> list[pa.Field]:
        return []

    def list_unit(self, unit: str) -> Iterator[Listing]:
        first_of_unit = int(unit) * IMAGES_PER_UNIT
        end = min(self.num_images, first_of_unit + IMAGES_PER_UNIT)
        for first in range(first_of_unit, end, BATCH_ROWS):
            numbers = np.arange(first, min(end, first + BATCH_ROWS))
            ids = _joined(f"{unit}/", numbers, ".jpg")
            yield Listing(plan_table(ids, ids.cast(pa.binary()), references=_references(numbers)), [])

    def read(self, rows: pa.Table) -> list[RawImage]:
        """Raise NotImplementedError: the InstantEngine reads no image."""
        raise NotImplementedError


@dataclass
class InstantEngine:
    """Commits chunks of a SyntheticSource without an image or a model: plan, receipts and commits are the real ones.

    `stop_after`: raise KeyboardInterrupt after so many chunks, as Ctrl-C does. `first_chunk_at`: time.perf_counter() of
    its first commit.
    """

    stop_after: int | None = None
    first_chunk_at: float | None = None

    def start(self) -> None:
        """There is nothing to start."""

    def device(self) -> str:
        return "cpu"

    def slots(self) -> dict[str, float]:
        return {"decode": 1, "device": 1, "write": 1}

    def caption_chunks(self, work: Work, chunks: list[Chunk]) -> Generator[Receipt, None, None]:
        texts = pa.array(_texts())
        for count, chunk in enumerate(chunks):
            if count == self.stop_after:
                raise KeyboardInterrupt
            receipt = commit(work, captioned(work, chunk, texts))
            if self.first_chunk_at is None:
                self.first_chunk_at = time.perf_counter()
            yield receipt


def captioned(work: Work, chunk: Chunk, texts: pa.Array) -> ChunkRows:
    """Return a chunk of a SyntheticSource with all columns of the table. `texts`: captions to choose from."""
    planned = work.planned_rows(chunk)
    ids = planned["image_id"].combine_chunks()
    numbers = pc.cast(pc.utf8_slice_codeunits(pc.utf8_slice_codeunits(ids, -13), 0, 9), pa.int64()).to_numpy()
    has_failed = (numbers % FAILURE_EVERY == 7) & (chunk.generation == 0)
    failed = pa.array(has_failed)
    count, schema = len(ids), work.table.schema
    columns: dict[str, pa.Array] = {
        "image_id": ids,
        "uri": pc.binary_join_element_wise(_SCHEME, ids, ""),
        "sha256": _digests(chunk, count),
        "width": pa.array(320 + numbers % 4_000, pa.int32()),
        "height": pa.array(240 + numbers % 3_000, pa.int32()),
        "num_bytes": pa.array(40_000 + numbers * 7919 % 2_000_000, pa.int64()),
        "status": pc.if_else(failed, STATUS_FAILED, STATUS_OK),
        "error_code": pc.if_else(failed, "truncated", pa.scalar(None, pa.string())),
        "caption": pc.if_else(failed, pa.scalar(None, pa.string()), texts.take(pa.array(numbers * 31 % len(texts)))),
        "num_tokens": pc.if_else(failed, pa.scalar(None, pa.int32()), pa.array(8 + numbers % 12, pa.int32())),
        "logprob_mean": pc.if_else(
            failed, pa.scalar(None, pa.float32()), pa.array(-(numbers * 7919 % 30_011) / 10_000, pa.float32())
        ),
        "flags": pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.string())),
        "reference_captions": planned["reference_captions"].combine_chunks(),
        "chunk_row": pa.array(np.arange(count), pa.int32()),
    }
    same_for_all = _same_for_all(work, chunk)
    arrays = [
        columns[field.name]
        if field.name in columns
        else pa.repeat(pa.scalar(same_for_all.get(field.name), field.type), count)
        for field in schema
    ]
    rows = pa.Table.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema
    )
    return ChunkRows(chunk, rows, None, dict.fromkeys(("read", "decode", "generate"), 0.0))


def _same_for_all(work: Work, chunk: Chunk) -> dict[str, Any]:
    """Return the columns that have one value for all rows of a chunk."""
    return {
        "format": "JPEG",
        "model": work.model.name,
        "model_sha256": work.model.sha256,
        "fingerprint": work.model.fingerprint,
        "generation": chunk.generation,
        "run_id": work.run_id,
        "chunk_id": chunk.chunk_id,
        "created_at": datetime.now(UTC),
    }


def _texts() -> list[str]:
    """Return different captions of some ten words."""
    colours, shapes = itertools.cycle(COLOURS), itertools.cycle(SHAPES)
    return [
        f"a {next(colours)} {next(shapes)} number {number} beside a box on the table" for number in range(_NUM_TEXTS)
    ]


def _joined(before: str, numbers: npt.NDArray[np.int64], after: str) -> pa.Array:
    """Return strings of a number of nine digits between two texts."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 9, "0")
    return pc.binary_join_element_wise(before, digits, after, "")


def _references(numbers: npt.NDArray[np.int64]) -> pa.Array:
    """Return a list with one caption for each REFERENCE_EVERY-th image, null for the others."""
    is_first = numbers % REFERENCE_EVERY == 0
    ends = np.concatenate([[0], np.cumsum(is_first)]).astype(np.int32)
    values = _joined("a thing number ", numbers[is_first], " on the table")
    return pa.ListArray.from_arrays(pa.array(ends), values, mask=pa.array(~is_first))


def _digests(chunk: Chunk, count: int) -> pa.Array:
    """Return hexadecimal SHA-256s, none of which is that of anything."""
    random = np.random.default_rng([chunk.part, chunk.index])
    offsets = np.arange(0, 64 * count + 1, 64, dtype=np.int32)
    return pa.StringArray.from_buffers(
        count, pa.py_buffer(offsets), pa.py_buffer(binascii.hexlify(random.bytes(32 * count)))
    )
