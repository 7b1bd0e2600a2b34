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
    """Make a batch of decoded pairs.

    It holds `pixels` uint8 [N, H, W, 3]; `input_ids` int64 [N, T] from the start token to the last but one token;
    `positions` int64 [K], which of the N x T tokens predict one of a caption, and `labels` int64 [K], the token that
    each of them should predict.

    Positions are made here, on the CPU: picking tokens by a mask on a GPU would wait for the GPU.

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
        """`input_ids`, `positions` and `labels` of captions."""
        tokens = self.tokenizer(captions, add_special_tokens=False).input_ids
        rows = [[*self.start, *ids[: self.max_tokens], self.end] for ids in tokens]
        length = max(map(len, rows)) - 1
        input_ids = torch.tensor([ids[:-1] + [self.padding] * (length - len(ids) + 1) for ids in rows])
        first = len(self.start) - 1  # the start ids are given, not predicted
        positions = [row * length + index for row, ids in enumerate(rows) for index in range(first, len(ids) - 1)]
        labels = [token for ids in rows for token in ids[first + 1 :]]
        return {"input_ids": input_ids, "positions": torch.tensor(positions), "labels": torch.tensor(labels)}


def batches_of(tables: Iterable[pa.Table], batch_size: int, collate: Collate) -> Iterator[dict[str, torch.Tensor]]:
    """Decoded tables cut into batches; a table's rows are whole batches, but for the last of an eval set."""
    for table in tables:
        for first in range(0, len(table), batch_size):
            yield collate(table.slice(first, batch_size))


class Upload:
    """Copies batches to a device.

    Meant for a thread of its own: it returns when the copy has arrived, and the device computes on an earlier batch
    meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._stream is None:
            return {name: values.to(self._device) for name, values in batch.items()}
        with torch.cuda.stream(self._stream):
            copied = {name: values.pin_memory().to(self._device, non_blocking=True) for name, values in batch.items()}
        self._stream.synchronize()
        return copied

    def used(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch, for the thread that computes on it: its memory is free for other copies only after that."""
        if self._stream is not None:
            for values in batch.values():
                values.record_stream(torch.cuda.current_stream(self._device))
        return batch
