"""From tables of pairs to decoded pixels and to batches on a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from captioner.data import Pixels, PixelSpec, object_array
from captioner.errors import SourceError
from captioner.training.pair_sources import PairSources
from captioner.training.pixel_cache import PixelCache

_PIXELS, _HEIGHT, _WIDTH = "_pixels", "_height", "_width"


@dataclass(frozen=True)
class Decode:
    """Adds columns of pixels, uint8, and with images of variable size of their sizes, to a table of pairs. Picklable.

    `cache`: of decoded images, if any. Raises SourceError for an image that could be read when the run was prepared and
    cannot be read now, or is another one.
    """

    sources: PairSources
    spec: PixelSpec
    cache: PixelCache | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        images = self._images(rows)
        if self.spec.variable_size:
            return _with_variable_pixels(rows, images)
        flat = np.stack(images).reshape(len(rows), -1)
        pixels = pa.FixedSizeBinaryArray.from_buffers(pa.binary(flat.shape[1]), len(flat), [None, pa.py_buffer(flat)])
        return rows.append_column(_PIXELS, pixels)

    def _images(self, rows: pa.Table) -> list[npt.NDArray[np.uint8]]:
        """Return the pixels of each image, uint8 [height, width, 3], from the cache where it has them."""
        shas = rows["sha256"].to_pylist()
        images = [None if self.cache is None else self.cache.read(sha256, self.spec) for sha256 in shas]
        missing = [index for index, image in enumerate(images) if image is None]
        if missing:
            for index, image in zip(missing, self._decode(rows.take(missing)), strict=True):
                images[index] = image
                if self.cache is not None:
                    self.cache.write(shas[index], self.spec, image)
        return [image for image in images if image is not None]

    def _decode(self, rows: pa.Table) -> list[npt.NDArray[np.uint8]]:
        """Return the pixels of each image."""
        batch = self.sources.decode(rows, self.spec)
        for row, sha256 in zip(batch.rows.to_pylist(), rows["sha256"].to_pylist(), strict=True):
            if row["error_code"]:
                raise SourceError(
                    f"{row['uri']}: could be read before and cannot now: {row['error_code']}: {row['error_message']}; "
                    "restore the image and run the same command"
                )
            if row["sha256"] != sha256:
                raise SourceError(
                    f"{row['uri']}: is another image than when the pairs were fixed; restore it and run the same "
                    "command, or train into another OUT"
                )
        return list(batch.pixels)


def _with_variable_pixels(rows: pa.Table, images: list[npt.NDArray[np.uint8]]) -> pa.Table:
    columns = {
        _PIXELS: pa.array([image.tobytes() for image in images], pa.large_binary()),
        _HEIGHT: pa.array([image.shape[0] for image in images], pa.int32()),
        _WIDTH: pa.array([image.shape[1] for image in images], pa.int32()),
    }
    for name, values in columns.items():
        rows = rows.append_column(name, values)
    return rows


def pixels_of(rows: pa.Table, spec: PixelSpec) -> Pixels:
    """Return the pixels of decoded rows: uint8 [N, height, width, 3], or an object array of images of variable size.

    Where the column is one chunk it is not copied.
    """
    if spec.variable_size:
        sizes = zip(rows[_HEIGHT].to_pylist(), rows[_WIDTH].to_pylist(), rows[_PIXELS], strict=True)
        images = [np.frombuffer(data.as_buffer(), np.uint8).reshape(height, width, 3) for height, width, data in sizes]
        return object_array(images)
    column = rows[_PIXELS].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    size = spec.height * spec.width * 3
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return flat.reshape(len(column), spec.height, spec.width, 3)


@dataclass(frozen=True)
class Collate:
    """Makes a batch of decoded pairs, on the CPU.

    The batch: `pixels` uint8 [N, H, W, 3]; `input_ids` int64 [N, T], each caption from its start token to its last
    token but one; `positions` int64 [K], which of the N x T tokens predict a caption token; `labels` int64 [K], the
    tokens that they should predict. Positions are computed here because selecting tokens by a mask on a GPU would wait
    for the GPU.

    `tokenizer`: of `plain_text_tokenizer`. `start`: ids that every caption starts with. `end`: id of the end token.
    `padding`: id that pads shorter captions to the longest of the batch. `max_tokens`: of a caption; longer ones are
    cut, and still get an end token.
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
        """Return `input_ids`, `positions` and `labels` of captions."""
        tokens = self.tokenizer(captions, add_special_tokens=False).input_ids
        rows = [[*self.start, *ids[: self.max_tokens], self.end] for ids in tokens]
        length = max(map(len, rows)) - 1
        input_ids = torch.tensor([ids[:-1] + [self.padding] * (length - len(ids) + 1) for ids in rows])
        first = len(self.start) - 1  # the start ids are given, not predicted
        positions = [row * length + index for row, ids in enumerate(rows) for index in range(first, len(ids) - 1)]
        labels = [token for ids in rows for token in ids[first + 1 :]]
        return {"input_ids": input_ids, "positions": torch.tensor(positions), "labels": torch.tensor(labels)}


def batches_of(tables: Iterable[pa.Table], batch_size: int, collate: Collate) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of decoded tables. Only the last batch of a table may be smaller than `batch_size`."""
    for table in tables:
        for first in range(0, len(table), batch_size):
            yield collate(table.slice(first, batch_size))


class Upload:
    """Copies batches to a device; to be called in a thread of its own.

    A call returns when the copy is complete; meanwhile the device computes on an earlier batch.
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

    def mark_used(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the batch, after telling torch that the calling thread's stream uses its memory.

        Without it the memory could be reused for the next copy while the device still reads it.
        """
        if self._stream is not None:
            for values in batch.values():
                values.record_stream(torch.cuda.current_stream(self._device))
        return batch
