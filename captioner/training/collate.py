"""Tables of pairs -> decoded pixels -> batches for a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captioner.data import PixelSpec
from captioner.errors import SourceError
from captioner.training.archives import Archives

IGNORED = -100  # the label of what is no caption token, as everywhere in PyTorch
_PIXELS = "_pixels"


@dataclass(frozen=True)
class Decode:
    """Table of pairs -> the same with a column of pixels, uint8. Runs on any machine.

    Raises SourceError for a picture that could be read when the run was prepared and cannot any more.
    """

    archives: Archives
    spec: PixelSpec

    def __call__(self, rows: pa.Table) -> pa.Table:
        from captioner.imaging import decode_images

        batch = decode_images(self.archives.read(rows), self.spec, self.archives.max_pixels)
        for row in batch.rows.to_pylist():
            if row["error_code"]:
                raise SourceError(
                    f"{row['uri']}: could be read before and cannot now: {row['error_code']}: {row['error_message']}; "
                    "bring the picture back and run the same command"
                )
        flat = np.ascontiguousarray(batch.pixels).reshape(len(rows), -1)
        pixels = pa.FixedSizeBinaryArray.from_buffers(pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)])
        return rows.append_column(_PIXELS, pixels)


def pixels_of(rows: pa.Table, spec: PixelSpec) -> npt.NDArray[np.uint8]:
    """The pixels of decoded rows, uint8 [N, height, width, 3]; a view where that can be."""
    column = rows[_PIXELS].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    size = spec.height * spec.width * 3
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return flat.reshape(len(column), spec.height, spec.width, 3)


@dataclass(frozen=True)
class Collate:
    """Decoded pairs -> a batch: `pixels` uint8 [N, H, W, 3]; `input_ids` int64 [N, T] from the start token to the last
    but one token; `labels` int64 [N, T], the token after each, IGNORED where there is none.

    `start`: ids every caption starts from; `end`: of its end; `padding`: of what fills up shorter captions, only to
    the longest of the batch. `max_tokens`: of a caption; longer ones are cut (and still end).
    """

    tokenizer: Any
    start: tuple[int, ...]
    end: int
    padding: int
    spec: PixelSpec
    max_tokens: int | None

    def __call__(self, rows: pa.Table) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(np.array(pixels_of(rows, self.spec)))
        return {"pixels": pixels, **self.texts(rows["caption"].to_pylist())}

    def texts(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` of captions."""
        found = self.tokenizer(captions, add_special_tokens=False).input_ids
        rows = [[*self.start, *ids[: self.max_tokens], self.end] for ids in found]
        length = max(map(len, rows)) - 1
        input_ids = torch.full((len(rows), length), self.padding)
        labels = torch.full((len(rows), length), IGNORED)
        first = len(self.start) - 1  # the start ids are given, not predicted
        for place, ids in enumerate(rows):
            input_ids[place, : len(ids) - 1] = torch.tensor(ids[:-1])
            labels[place, first : len(ids) - 1] = torch.tensor(ids[first + 1 :])
        return {"input_ids": input_ids, "labels": labels}


def batches_of(tables: Iterable[pa.Table], batch_size: int, collate: Collate) -> Iterator[dict[str, torch.Tensor]]:
    """Decoded tables cut into batches; a table's rows are whole batches, but for the last of an eval set."""
    for table in tables:
        for first in range(0, len(table), batch_size):
            yield collate(table.slice(first, batch_size))
