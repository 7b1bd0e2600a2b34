"""Caption a sample with the stages of a run, with as many workers of the same size, all at the same time.

On CPUs the two stages take time from each other, so that one measured without the other looks too fast. Ray Data would
let the decoders finish a small sample while the model still loads; here a few decoded pieces wait for each worker, as
in the middle of a run. Nothing is written.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from captioner.config import AutoInt, CaptionConfig
from captioner.data import NO_USAGE, Chunk, Source, Usage
from captioner.errors import CaptionerError, ClusterError
from captioner.models import ModelRef
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.questions import answer_fields
from captioner.run.fingerprint import facts_of
from captioner.steps import ChunkRows, Work
from captioner.store.directory import Directory
from captioner.store.table import CaptionsTable, as_hex
from ray_jobs.caption import calls_at_once
from ray_jobs.cluster import Sizes
from ray_jobs.failures import cause_of
from ray_jobs.stages import CaptionStage, DecodeStage, from_block, raise_error

BATCH = {"cpu": 16, "gpu": 128}  # images of a piece: those of a forward pass
MIN_PIECES, PIECES_PER_WORKER = 16, 4  # a smaller sample is captioned several times
MAX_WAITING = 2  # decoded pieces that may wait for each caption worker
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The measurements of a captioned part of the sample.

    `index`: of the part in the sample, which may be captioned several times. `prepare`: seconds of a decode worker.
    `generate`: seconds of a caption worker. `gap`: seconds since the full pipeline finished the previous piece; 0 while
    it fills. `output_bytes`: that its rows add to a Parquet file. `usage`: tokens of model servers.
    """

    index: int
    num_rows: int
    num_ok: int
    prepare: float
    generate: float
    source_bytes: int
    output_bytes: int
    gap: float = 0.0
    usage: Usage = NO_USAGE

    @classmethod
    def from_captioned(cls, captioned: ChunkRows, gap: float) -> Piece:
        rows, seconds = captioned.rows, captioned.seconds
        return cls(
            index=captioned.chunk.index,
            num_rows=rows.num_rows,
            num_ok=rows["error_code"].null_count,
            prepare=seconds["read"] + seconds["decode"],
            generate=seconds["generate"],
            source_bytes=pc.sum(rows["num_bytes"]).as_py() or 0,
            output_bytes=_parquet_bytes(rows) - _parquet_bytes(rows.slice(0, 0)),
            gap=gap,
            usage=captioned.usage,
        )


@dataclass(frozen=True)
class SampleWork(Work):
    """Work on rows that are in no table. Chunk number `index` of it is `pieces[index]`."""

    pieces: tuple[pa.Table, ...] = ()

    def planned_rows(self, chunk: Chunk) -> pa.Table:
        return self.pieces[chunk.index]

    def rows_elsewhere(self, chunk: Chunk) -> Iterator[pa.Table]:
        for index, rows in enumerate(self.pieces):
            if index != chunk.index:
                yield rows.slice(rows.num_rows // 2, 1)


def sample_work(source: Source, pieces: list[pa.Table], model: ModelRef, config: CaptionConfig) -> SampleWork:
    """Return the work of a run with these settings, on a table of the same columns that is never written."""
    info = {
        "kept_schema": as_hex(source.kept_fields()),
        "answer_schema": as_hex(answer_fields(model)),
        "model": facts_of(model),
    }
    return SampleWork(
        CaptionsTable(Directory("sample"), info),
        source,
        config.source.max_pixels,
        model,
        "sample",
        config.source.decode_timeout,
        read_concurrency=config.cluster.read_concurrency,
        max_file_size=config.source.max_file_size,
        dedupe=False,  # a piece may be captioned several times
        device=config.model.compute_on,
        num_gpus=config.cluster.gpus_for_weights,
        pieces=tuple(pieces),
    )


def measure(source: Source, rows: pa.Table, model: ModelRef, sizes: Sizes, config: CaptionConfig) -> list[Piece]:
    """Return the pieces of the sample in the order they were finished, after each worker has done one to warm up.

    Raises ClusterError.
    """
    import ray

    pieces = cut(rows, sizes, config.model.batch_size)
    work = sample_work(source, pieces, model, config)
    blocks = [pa.Table.from_pylist([asdict(Chunk(0, 0, index, len(piece)))]) for index, piece in enumerate(pieces)]
    blocks *= num_repeats(len(pieces), sizes)
    calls = min(calls_at_once(work, sizes, len(pieces[0])), len(blocks) // 2)  # some pieces are measured after filling
    decode = ray.remote(num_cpus=sizes.cpus_per_decoder)(DecodeStage)
    caption = ray.remote(num_cpus=sizes.cpus_per_worker, num_gpus=sizes.gpus_per_worker or None, max_concurrency=calls)(
        CaptionStage
    )
    key = ApiKey.from_environment() if model.endpoint else None
    settings = (work, config.model.batch_size, sizes.threads_per_worker, None, key)
    decoders = [decode.remote(work) for _ in range(min(sizes.decode_cpus, len(blocks)))]
    workers = [caption.remote(*settings) for _ in range(sizes.num_workers)]
    try:
        first_calls = [decoder.__call__.remote(blocks[0]) for decoder in decoders]
        first_calls += [worker.__call__.remote(first_calls[0]) for worker in workers]
        ray.get(first_calls, timeout=TIMEOUT_S)
        return list(_pipeline(work, decoders, workers * calls, blocks))
    except CaptionerError:
        raise
    except Exception as error:  # of Ray, or of a library in a worker
        raise cause_of(error, "nothing was written") from error
    finally:
        for actor in (*decoders, *workers):
            ray.kill(actor)


def cut(rows: pa.Table, sizes: Sizes, batch_size: AutoInt) -> list[pa.Table]:
    """Return the sample in pieces of about one batch."""
    batch = BATCH["gpu" if sizes.gpus_per_worker else "cpu"] if batch_size == "auto" else batch_size
    count: int = min(rows.num_rows, max(2, -(-rows.num_rows // batch)))
    edges = [rows.num_rows * index // count for index in range(count + 1)]
    return [rows.slice(start, end - start) for start, end in itertools.pairwise(edges)]


def num_repeats(num_pieces: int, sizes: Sizes) -> int:
    """Return how often the sample is captioned, so that there are enough pieces for every worker."""
    return -(-max(MIN_PIECES, PIECES_PER_WORKER * sizes.num_workers) // num_pieces)


def _pipeline(work: SampleWork, decoders: list[Any], workers: list[Any], blocks: list[pa.Table]) -> Iterator[Piece]:
    """Yield a measured piece for each of `blocks`, which describe chunks; each piece of the sample at least once.

    Decoders repeat the pieces to the end, so that no stage ever runs alone; they stop only while MAX_WAITING pieces
    wait for each worker. `workers`: a worker is named once for each chunk that it may have at the same time.
    """
    import ray

    waiting, decoded = itertools.cycle(blocks), deque[Any]()
    free = {"decode": list(decoders), "caption": list(workers)}
    running: dict[Any, tuple[str, Any]] = {}
    unfinished, num_finished, last_finish = {index for index, _ in enumerate(work.pieces)}, 0, 0.0
    while num_finished < len(blocks) or unfinished:
        while free["decode"] and len(decoded) < MAX_WAITING * len(workers):
            actor = free["decode"].pop()
            running[actor.__call__.remote(next(waiting))] = ("decode", actor)
        while decoded and free["caption"]:
            actor = free["caption"].pop()
            running[actor.__call__.remote(decoded.popleft())] = ("caption", actor)
        finished, _ = ray.wait(list(running), num_returns=1, timeout=TIMEOUT_S)
        if not finished:
            raise ClusterError(f"the sample could not be captioned: nothing ended within {TIMEOUT_S:g} s")
        stage, actor = running.pop(finished[0])
        free[stage].append(actor)
        if stage == "decode":
            decoded.append(finished[0])
            continue
        block = ray.get(finished[0])
        raise_error(block)
        now, num_finished = time.perf_counter(), num_finished + 1
        piece = Piece.from_captioned(from_block(block, work), now - last_finish if num_finished > len(workers) else 0.0)
        unfinished.discard(piece.index)
        yield piece
        last_finish = now


def _parquet_bytes(table: pa.Table) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return int(sink.getvalue().size)
