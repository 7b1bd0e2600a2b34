"""The steps as Ray Data stages: columns to nouns and back, nothing else.

One block is one chunk from the first stage to the last. Pixels travel as one column of bytes, those of own sizes
with a column of their widths; the chunk and the seconds spent on it as JSON in every row.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa

from captioner.config import AutoInt
from captioner.data import Chunk, Pixels, Receipt, object_array
from captioner.steps import ChunkRows, Work, caption, commit, decode, read
from ray_jobs.metrics import DeviceMetrics, RunMetrics

_CHUNK, _PIXELS, _WIDTHS, _ERROR = "_chunk", "_pixels", "_widths", "_error"


class DecodeStage:
    """A block with one chunk's description -> its pictures, decoded."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.decoder = work.decoder()
        self.decoder.start()  # it imports torch while the model loads

    def __call__(self, block: pa.Table) -> pa.Table:
        (chunk,) = (Chunk(**row) for row in block.to_pylist())
        return to_block(decode(self.work, read(self.work, chunk), self.decoder))


class CaptionStage:
    """Blocks of decoded pictures -> blocks of caption rows; holds the model.

    On a GPU `AT_ONCE` calls run at once: while one's images are searched, the next one's are on their way to the device
    and the rows of the one before are made. Of such calls two that raise together may both be lost, and the run waits
    for ever (Ray 2.60): so none raises, and the error goes on as a block, which the CommitStage raises.
    """

    AT_ONCE = 2

    def __init__(self, work: Work, batch_size: AutoInt, num_threads: int) -> None:
        from captioner.models import load

        self.work = work
        self.captioner = load(work.model, batch_size=batch_size, num_threads=num_threads)
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
    travelling = json.dumps({"chunk": asdict(rows.chunk), "seconds": rows.seconds, "engine": rows.engine})
    block = rows.rows.append_column(_CHUNK, pa.array([travelling] * rows.chunk.num_rows))
    if rows.pixels is None:
        return block
    if rows.pixels.dtype == object:
        widths = pa.array([picture.shape[1] for picture in rows.pixels], pa.int32())
        pictures = pa.array([picture.tobytes() for picture in rows.pixels], pa.large_binary())
        return block.append_column(_WIDTHS, widths).append_column(_PIXELS, pictures)
    flat = np.ascontiguousarray(rows.pixels).reshape(len(rows.pixels), -1)
    kind = pa.binary(flat.shape[1])
    pixels = pa.FixedSizeBinaryArray.from_buffers(kind, len(flat), [None, pa.py_buffer(flat)])
    return block.append_column(_PIXELS, pixels)


def from_block(block: pa.Table, work: Work) -> ChunkRows:
    """Raises ValueError where the block is not one whole chunk: then Ray cut or merged what must stay together."""
    travelling = set(block[_CHUNK].to_pylist())
    if len(travelling) != 1:
        raise ValueError(f"a block holds rows of {len(travelling)} chunks")
    known = json.loads(travelling.pop())
    chunk = Chunk(**known["chunk"])
    if block.num_rows != chunk.num_rows:
        raise ValueError(f"chunk {chunk.chunk_id} came as {block.num_rows} of its {chunk.num_rows} rows")
    pixels = _pixels_of(block, work) if _PIXELS in block.column_names else None
    rows = block.drop_columns([name for name in (_CHUNK, _PIXELS, _WIDTHS) if name in block.column_names])
    return ChunkRows(chunk, rows, pixels, known["seconds"], known["engine"])


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
