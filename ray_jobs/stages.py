"""The steps as Ray Data stages: columns to nouns and back, nothing else.

One chunk is one row and one block from the first stage to the last: whatever Ray merges or cuts, a row stays whole.
The images of the chunk are a list in that row. Pixels travel as one field of bytes, those of own sizes with their
widths beside them; the chunk and the seconds spent on it as JSON.
"""

from __future__ import annotations

import json
import pickle
import uuid
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from captioner.config import AutoInt
from captioner.data import Chunk, Pixels, Receipt, object_array
from captioner.steps import ChunkRows, Work, caption, commit, decode, read
from ray_jobs.gpus import worker_device
from ray_jobs.metrics import DeviceMetrics, RunMetrics

if TYPE_CHECKING:
    from ray.util.queue import Queue

_CHUNK, _IMAGES = "chunk", "images"
_PIXELS, _WIDTHS = "_pixels", "_widths"
_FACTS = ("seconds", "engine", "device")  # of a ChunkRows
_ERROR = "error"


class DecodeStage:
    """A block with one chunk's description -> its images, decoded."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.decoder = work.decoder()
        self.decoder.start()  # it imports torch while the model loads

    def __call__(self, block: pa.Table) -> pa.Table:
        (chunk,) = (Chunk(**row) for row in block.to_pylist())
        return to_block(decode(self.work, read(self.work, chunk), self.decoder))


class CaptionStage:
    """Blocks of decoded images -> blocks of caption rows; holds the model.

    On a GPU `AT_ONCE` calls run at once: while one's images are searched, the next one's are on their way to the device
    and the rows of the one before are made. Of such calls two that raise together may both be lost, and the run waits
    for ever (Ray 2.60): so none raises, and the error goes on as a block, which the CommitStage raises.
    """

    AT_ONCE = 2

    def __init__(self, work: Work, batch_size: AutoInt, num_threads: int, messages: Queue | None = None) -> None:
        """Load the model. `messages`: a queue for lines about the start, each with the worker's name."""
        from captioner.models import load

        self.work = work
        notify = None if messages is None else partial(_put, messages, uuid.uuid4().hex)
        self.captioner = load(work.model, worker_device(work.device), batch_size, num_threads, notify)
        self.memory = work.new_memory()
        self.metrics = DeviceMetrics()

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            return to_block(self._caption(from_block(block, self.work)))
        except Exception as error:
            return error_block(error)

    def _caption(self, decoded: ChunkRows) -> ChunkRows:
        rows = caption(self.work, self.captioner, decoded, self.memory)
        batch_size = getattr(self.captioner, "batch_size", rows.chunk.num_rows)
        busy = self.metrics.add(rows.seconds["generate"], batch_size)
        return replace(rows, seconds=rows.seconds | {"generate": busy})


class CommitStage:
    """A block of caption rows -> one row: the receipt."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.metrics = RunMetrics()

    def __call__(self, block: pa.Table) -> pa.Table:
        raise_error(block)
        receipt = commit(self.work, from_block(block, self.work))
        self.metrics.add(receipt)
        return pa.table({"receipt": [json.dumps(asdict(receipt))]})


def _put(messages: Queue, worker: str, line: str) -> None:
    import ray.exceptions

    with suppress(ray.exceptions.RayError):  # the queue's node has gone; captions need none
        messages.put((worker, line))


def error_block(error: Exception) -> pa.Table:
    """A block in place of the rows of a chunk that met `error`."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an exception of another library, which may survive neither
        data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return pa.table({_ERROR: pa.array([data], pa.binary())})


def raise_error(block: pa.Table) -> None:
    """Raise what `error_block` was given; nothing for any other block."""
    if _ERROR in block.column_names:
        raise pickle.loads(block[_ERROR][0].as_py())


def receipts_of(block: pa.Table) -> list[Receipt]:
    return [Receipt(**json.loads(text)) for text in block["receipt"].to_pylist()]


def to_block(rows: ChunkRows) -> pa.Table:
    """The chunk as one row: what it is as JSON, and its images as a list of structs; no buffer is copied."""
    facts = json.dumps({"chunk": asdict(rows.chunk), **{name: getattr(rows, name) for name in _FACTS}})
    (images,) = _with_pixels(rows).combine_chunks().to_batches()
    images = pa.LargeListArray.from_arrays([0, len(images)], images.to_struct_array())
    return pa.table({_CHUNK: [facts], _IMAGES: images})


def from_block(block: pa.Table, work: Work) -> ChunkRows:
    """Raises ValueError where the block is not one chunk: then Ray merged what must stay apart."""
    if block.num_rows != 1:
        raise ValueError(f"a block holds {block.num_rows} chunks instead of one")
    facts = json.loads(block[_CHUNK][0].as_py())
    images = pa.Table.from_struct_array(block[_IMAGES][0].values)
    pixels = _pixels_of(images, work) if _PIXELS in images.column_names else None
    rows = images.drop_columns([name for name in (_PIXELS, _WIDTHS) if name in images.column_names])
    return ChunkRows(Chunk(**facts["chunk"]), rows, pixels, **{name: facts[name] for name in _FACTS})


def _with_pixels(rows: ChunkRows) -> pa.Table:
    if rows.pixels is None:
        return rows.rows
    if rows.pixels.dtype == object:
        widths = pa.array([image.shape[1] for image in rows.pixels], pa.int32())
        images = pa.array([image.tobytes() for image in rows.pixels], pa.large_binary())
        return rows.rows.append_column(_WIDTHS, widths).append_column(_PIXELS, images)
    flat = np.ascontiguousarray(rows.pixels).reshape(len(rows.pixels), -1)
    kind = pa.binary(flat.shape[1])
    pixels = pa.FixedSizeBinaryArray.from_buffers(kind, len(flat), [None, pa.py_buffer(flat)])
    return rows.rows.append_column(_PIXELS, pixels)


def _pixels_of(block: pa.Table, work: Work) -> Pixels:
    column = block[_PIXELS]
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies
    spec = work.model.spec
    if _WIDTHS in block.column_names:
        both = zip(column, block[_WIDTHS].to_pylist(), strict=True)
        return object_array([np.frombuffer(data.as_buffer(), np.uint8).reshape(-1, width, 3) for data, width in both])
    size = spec.height * spec.width * 3
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * size, column.offset * size)
    return flat.reshape(len(column), spec.height, spec.width, 3)
