"""Caption a sample as a run would: decoders and caption workers of its sizes at work at the same time.

On CPUs the two stages take time from each other, so that one measured without the other looks too fast. Decoders run
ahead of the captioners by a few pieces, as in a run. Nothing is written.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import AutoInt, CaptionConfig
from captioner.data import Pixels, Source
from captioner.errors import ClusterError
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import ModelRef, load
from captioner.sources.reading import read_images, reads_at_once
from captioner.steps import Caption, caption_or_reasons
from ray_jobs.cluster import Sizes
from ray_jobs.failures import cause_of
from ray_jobs.gpus import worker_device

BATCH = {"cpu": 16, "gpu": 128}  # images of a piece: those of a forward pass
MIN_PIECES, PIECES_PER_WORKER = 16, 4  # a smaller sample is captioned again and again
AHEAD = 2  # decoded pieces that wait, for each caption worker
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Piece:
    """What was measured on some of the sampled images.

    `prepare`: seconds between two pieces of one decode worker. `generate`: seconds of a caption worker. `gap`: seconds
    since the piece before came out of the full pipeline; 0 while it fills.
    """

    num_rows: int
    num_ok: int
    prepare: float
    generate: float
    source_bytes: int
    output_bytes: int
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A piece between the two stages. `piece` lacks `generate`."""

    piece: Piece
    rows: pa.Table
    pixels: Pixels


class Preparer:
    """A decode worker."""

    def __init__(self, source: Source, model: ModelRef, config: CaptionConfig) -> None:
        self._source, self._spec, self._settings = source, model.spec, config
        self._decoder = GuardedDecoder(model.spec, config.source.max_pixels, config.source.decode_timeout)

    def prepare(self, rows: pa.Table) -> Prepared:
        from captioner.imaging import decode_images

        started = time.perf_counter()
        with reads_at_once(self._settings.cluster.read_concurrency):
            raws = read_images(self._source, rows)
        batch = decode_images(raws, self._spec, self._settings.source.max_pixels, self._decoder)
        seconds = time.perf_counter() - started
        fine = [place for place, code in enumerate(batch.rows["error_code"].to_pylist()) if not code]
        size = sum(len(raw.data) for raw in raws if raw.data)
        return Prepared(Piece(len(raws), len(fine), seconds, 0.0, size, 0), batch.rows, batch.pixels[fine])


class Sampler:
    """A caption worker: holds the model."""

    def __init__(self, model: ModelRef, device: str, batch_size: AutoInt, num_threads: int) -> None:
        self._captioner = load(model, worker_device(device), batch_size, num_threads)

    def measure(self, prepared: Prepared) -> Piece:
        started = time.perf_counter()
        results = caption_or_reasons(self._captioner, prepared.pixels)
        seconds = time.perf_counter() - started
        texts = [result.text for result in results if isinstance(result, Caption)]
        written = prepared.rows.append_column("caption", [texts + [""] * (prepared.rows.num_rows - len(texts))])
        size = _parquet_bytes(written) - _parquet_bytes(written.slice(0, 0))
        return replace(prepared.piece, num_ok=len(texts), generate=seconds, output_bytes=size)


def measure(source: Source, rows: pa.Table, model: ModelRef, sizes: Sizes, config: CaptionConfig) -> list[Piece]:
    """The pieces of the sample in the order they came out, after each worker has done one. Raises ClusterError."""
    import ray

    pieces = cut(rows, sizes, config.model.batch_size)
    prepare = ray.remote(num_cpus=sizes.cpus_per_decoder)(Preparer)
    caption = ray.remote(num_cpus=sizes.cpus_per_worker, num_gpus=sizes.gpus_per_worker or None)(Sampler)
    settings = (model, config.model.device, config.model.batch_size, sizes.threads_per_worker)
    decoders = [prepare.remote(source, model, config) for _ in range(min(sizes.decode_cpus, len(pieces)))]
    workers = [caption.remote(*settings) for _ in range(sizes.num_workers)]
    try:
        warm = [one.prepare.remote(pieces[0]) for one in decoders]
        warm += [one.measure.remote(warm[0]) for one in workers]
        ray.get(warm, timeout=TIMEOUT_S)
        return list(_pipeline(decoders, workers, pieces))
    except ray.exceptions.RayError as error:
        raise cause_of(error, "nothing was written") from error
    finally:
        for one in (*decoders, *workers):
            ray.kill(one)


def cut(rows: pa.Table, sizes: Sizes, batch_size: AutoInt) -> list[pa.Table]:
    """The whole sample in pieces of about a batch each, as many times over as it takes to give every worker some."""
    batch = BATCH["gpu" if sizes.gpus_per_worker else "cpu"] if batch_size == "auto" else batch_size
    count: int = min(rows.num_rows, max(2, -(-rows.num_rows // batch)))
    edges = [rows.num_rows * place // count for place in range(count + 1)]
    pieces = [rows.slice(first, end - first) for first, end in itertools.pairwise(edges)]
    return pieces * -(-max(MIN_PIECES, PIECES_PER_WORKER * sizes.num_workers) // count)


def _pipeline(decoders: list[Any], workers: list[Any], pieces: list[pa.Table]) -> Iterator[Piece]:
    """Yield as many pieces as there are.

    Decoding goes on to the end, over and over, so that no stage is ever alone; decoders stop only while AHEAD pieces
    wait for each worker.
    """
    import ray

    waiting, prepared = itertools.cycle(pieces), deque[Any]()
    free = {"decode": list(decoders), "caption": list(workers)}
    running: dict[Any, tuple[str, Any]] = {}
    done, last = 0, 0.0
    while done < len(pieces):
        while free["decode"] and len(prepared) < AHEAD * len(workers):
            one = free["decode"].pop()
            running[one.prepare.remote(next(waiting))] = ("decode", one)
        while prepared and free["caption"]:
            one = free["caption"].pop()
            running[one.measure.remote(prepared.popleft())] = ("caption", one)
        ended, _ = ray.wait(list(running), num_returns=1, timeout=TIMEOUT_S)
        if not ended:
            raise ClusterError(f"the sample could not be captioned: nothing ended within {TIMEOUT_S:g} s")
        stage, one = running.pop(ended[0])
        free[stage].append(one)
        if stage == "decode":
            prepared.append(ended[0])
            continue
        piece: Piece = ray.get(ended[0])
        now, done = time.perf_counter(), done + 1
        yield replace(piece, gap=now - last if done > len(workers) else 0.0)
        last = now


def _parquet_bytes(table: pa.Table) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return int(sink.getvalue().size)
