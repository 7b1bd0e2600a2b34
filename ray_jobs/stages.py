"""The steps as Ray Data stages: they convert blocks to the data types of the steps and back.

One chunk is one row and one block from the first stage to the last: Ray may merge or split blocks, but not rows. The
images of the chunk are a list in that row. Pixels are one field of bytes, with a field of widths for variable-size
images; the chunk and the seconds spent on it are JSON.
"""

from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from captioner.config import AutoInt
from captioner.console.text import counted
from captioner.data import Chunk, Pixels, Receipt, Usage, object_array
from captioner.models.endpoint.api_key import ApiKey
from captioner.steps import ChunkRows, Work, caption, commit, decode, read
from ray_jobs.gpus import worker_device
from ray_jobs.metrics import DeviceMetrics, RunMetrics

if TYPE_CHECKING:
    from ray.util.queue import Queue

_CHUNK, _IMAGES = "chunk", "images"
_PIXELS, _WIDTHS = "_pixels", "_widths"
_FACTS = ("seconds", "engine", "device", "usage", "read_at")  # of a ChunkRows
_ERROR = "error"


class DecodeStage:
    """Turns a block with the description of one chunk into its decoded images."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.decoder = work.decoder()
        self.decoder.start()  # its process imports torch while the model loads

    def __call__(self, block: pa.Table) -> pa.Table:
        (chunk,) = (Chunk(**row) for row in block.to_pylist())
        return to_block(decode(self.work, read(self.work, chunk), self.decoder))


class CaptionStage:
    """Turns blocks of decoded images into blocks of caption rows; holds the model.

    On a GPU `MAX_CALLS` calls run at the same time: while one captions, the next copies its images to the device, and
    the previous one makes its rows. Two such calls that raise together may both be lost, and the run waits for ever
    (Ray 2.60). So no call raises: an error is sent on as a block, and the CommitStage raises it.
    """

    MAX_CALLS = 2

    def __init__(
        self,
        work: Work,
        batch_size: AutoInt,
        num_threads: int,
        messages: Queue | None = None,
        api_key: ApiKey | None = None,
    ) -> None:
        """Load the model.

        `messages`: a queue for lines about the start, each with the worker's name. `api_key`: of the model servers; the
        environment of a worker may lack it.
        """
        from captioner.models import load

        self.work = work
        notify = None if messages is None else messages_to(messages)
        device = worker_device(work.device)
        self.captioner = load(work.model, device, batch_size, num_threads, notify, api_key, work.num_gpus)
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
    """Commits a block of caption rows; returns one row, the receipt."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.metrics = RunMetrics()

    def __call__(self, block: pa.Table) -> pa.Table:
        raise_error(block)
        receipt = commit(self.work, from_block(block, self.work))
        self.metrics.add(receipt)
        return pa.table({"receipt": [json.dumps(asdict(receipt))]})


def messages_to(messages: Queue) -> Callable[[str], None]:
    """Return a function that puts a line into a queue, with a name for this worker."""
    return partial(_put, messages, uuid.uuid4().hex)


def _put(messages: Queue, worker: str, line: str) -> None:
    import ray.exceptions

    with suppress(ray.exceptions.RayError):  # the queue's node is gone; captioning does not need it
        messages.put((worker, line))


def error_block(error: Exception) -> pa.Table:
    """Return a block that carries an error in place of the rows of a chunk."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # exceptions of other libraries may not survive pickling
        data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return pa.table({_ERROR: pa.array([data], pa.binary())})


def raise_error(block: pa.Table) -> None:
    """Raise the error of an `error_block`; do nothing for any other block."""
    if _ERROR in block.column_names:
        raise pickle.loads(block[_ERROR][0].as_py())


def receipts_of(block: pa.Table) -> list[Receipt]:
    return [Receipt(**json.loads(text)) for text in block["receipt"].to_pylist()]


def to_block(rows: ChunkRows) -> pa.Table:
    """Return the chunk as a block of one row: facts as JSON, images as a list of structs; no buffer is copied."""
    facts = json.dumps({"chunk": asdict(rows.chunk), **{name: getattr(rows, name) for name in _FACTS}})
    (images,) = _with_pixels(rows).combine_chunks().to_batches()
    images = pa.LargeListArray.from_arrays([0, len(images)], images.to_struct_array())
    return pa.table({_CHUNK: [facts], _IMAGES: images})


def from_block(block: pa.Table, work: Work) -> ChunkRows:
    """Return the chunk of a block. Raises ValueError where Ray has merged several chunks into it."""
    if block.num_rows != 1:
        raise ValueError(f"a block holds {counted(block.num_rows, 'chunk')} instead of one")
    facts = json.loads(block[_CHUNK][0].as_py())
    images = pa.Table.from_struct_array(block[_IMAGES][0].values)
    pixels = _pixels_of(images, work) if _PIXELS in images.column_names else None
    rows = images.drop_columns([name for name in (_PIXELS, _WIDTHS) if name in images.column_names])
    facts["usage"] = Usage(*facts["usage"])
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
