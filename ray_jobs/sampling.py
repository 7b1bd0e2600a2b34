"""Caption a sample with decoders and caption workers of the sizes of a run, all at the same time.

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
from captioner.data import NO_USAGE, Pixels, Prompts, Source, Usage
from captioner.errors import ClusterError
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import ModelRef, load
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.questions import prompts_of
from captioner.sources.reading import ReadLimits, each_row_alone, limited_to, read_images, reads_at_once
from captioner.steps import Caption, caption_or_reasons
from ray_jobs.cluster import Sizes
from ray_jobs.failures import cause_of
from ray_jobs.gpus import worker_device

BATCH = {"cpu": 16, "gpu": 128}  # images of a piece: those of a forward pass
MIN_PIECES, PIECES_PER_WORKER = 16, 4  # a smaller sample is captioned several times
MAX_WAITING = 2  # decoded pieces that may wait for each caption worker
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The measurements of one piece, a part of the sampled images.

    `prepare`: seconds of a decode worker. `generate`: seconds of a caption worker. `gap`: seconds since the full
    pipeline finished the previous piece; 0 while it fills. `usage`: tokens of model servers.
    """

    num_rows: int
    num_ok: int
    prepare: float
    generate: float
    source_bytes: int
    output_bytes: int
    gap: float = 0.0
    usage: Usage = NO_USAGE


@dataclass(frozen=True, slots=True)
class Prepared:
    """A piece between the two stages. `piece` lacks `generate`. `prompts`: see `Captioner.caption`."""

    piece: Piece
    rows: pa.Table
    pixels: Pixels
    prompts: list[Prompts] | None


class Preparer:
    """A decode worker."""

    def __init__(self, source: Source, model: ModelRef, config: CaptionConfig) -> None:
        self._source, self._model, self._spec, self._settings = source, model, model.spec, config
        self._decoder = GuardedDecoder(model.spec, config.source.max_pixels, config.source.decode_timeout)

    def prepare(self, rows: pa.Table) -> Prepared:
        from captioner.imaging import decode_images

        started = time.perf_counter()
        limits = limited_to(ReadLimits(self._settings.source.max_file_size))
        with reads_at_once(self._settings.cluster.read_concurrency), each_row_alone(), limits:
            raws = read_images(self._source, rows)
        batch = decode_images(raws, self._spec, self._settings.source.max_pixels, self._decoder)
        seconds = time.perf_counter() - started
        decoded = [index for index, code in enumerate(batch.rows["error_code"].to_pylist()) if not code]
        size = sum(len(raw.data) for raw in raws if raw.data)
        piece = Piece(len(raws), len(decoded), seconds, 0.0, size, 0)
        return Prepared(piece, batch.rows, batch.pixels[decoded], prompts_of(self._model, rows.take(decoded)))


class Sampler:
    """A caption worker: holds the model."""

    def __init__(
        self, model: ModelRef, device: str, batch_size: AutoInt, num_threads: int, api_key: ApiKey | None = None
    ) -> None:
        self._captioner = load(model, worker_device(device), batch_size, num_threads, api_key=api_key)

    def measure(self, prepared: Prepared) -> Piece:
        started = time.perf_counter()
        usages: list[Usage] = []
        results = caption_or_reasons(self._captioner, prepared.pixels, usages, prompts=prepared.prompts)
        seconds = time.perf_counter() - started
        texts = [result.text for result in results if isinstance(result, Caption)]
        rows = prepared.rows.append_column("caption", [texts + [""] * (prepared.rows.num_rows - len(texts))])
        size = _parquet_bytes(rows) - _parquet_bytes(rows.slice(0, 0))
        usage = Usage.total(usages)
        return replace(prepared.piece, num_ok=len(texts), generate=seconds, output_bytes=size, usage=usage)


def measure(source: Source, rows: pa.Table, model: ModelRef, sizes: Sizes, config: CaptionConfig) -> list[Piece]:
    """Return the pieces of the sample in the order they were finished, after each worker has done one to warm up.

    Raises ClusterError.
    """
    import ray

    pieces = cut(rows, sizes, config.model.batch_size)
    prepare = ray.remote(num_cpus=sizes.cpus_per_decoder)(Preparer)
    caption = ray.remote(num_cpus=sizes.cpus_per_worker, num_gpus=sizes.gpus_per_worker or None)(Sampler)
    key = ApiKey.from_environment() if model.endpoint else None
    settings = (model, config.model.compute_on, config.model.batch_size, sizes.threads_per_worker, key)
    decoders = [prepare.remote(source, model, config) for _ in range(min(sizes.decode_cpus, len(pieces)))]
    workers = [caption.remote(*settings) for _ in range(sizes.num_workers)]
    try:
        first_calls = [decoder.prepare.remote(pieces[0]) for decoder in decoders]
        first_calls += [worker.measure.remote(first_calls[0]) for worker in workers]
        ray.get(first_calls, timeout=TIMEOUT_S)
        return list(_pipeline(decoders, workers, pieces))
    except ray.exceptions.RayError as error:
        raise cause_of(error, "nothing was written") from error
    finally:
        for actor in (*decoders, *workers):
            ray.kill(actor)


def cut(rows: pa.Table, sizes: Sizes, batch_size: AutoInt) -> list[pa.Table]:
    """Return the sample in pieces of about one batch, repeated until there are enough pieces for every worker."""
    batch = BATCH["gpu" if sizes.gpus_per_worker else "cpu"] if batch_size == "auto" else batch_size
    count: int = min(rows.num_rows, max(2, -(-rows.num_rows // batch)))
    edges = [rows.num_rows * index // count for index in range(count + 1)]
    pieces = [rows.slice(start, end - start) for start, end in itertools.pairwise(edges)]
    return pieces * -(-max(MIN_PIECES, PIECES_PER_WORKER * sizes.num_workers) // count)


def _pipeline(decoders: list[Any], workers: list[Any], pieces: list[pa.Table]) -> Iterator[Piece]:
    """Yield a measured piece for each of `pieces`.

    Decoders repeat the pieces to the end, so that no stage ever runs alone; they stop only while MAX_WAITING pieces
    wait for each worker.
    """
    import ray

    waiting, prepared = itertools.cycle(pieces), deque[Any]()
    free = {"decode": list(decoders), "caption": list(workers)}
    running: dict[Any, tuple[str, Any]] = {}
    num_finished, last_finish = 0, 0.0
    while num_finished < len(pieces):
        while free["decode"] and len(prepared) < MAX_WAITING * len(workers):
            actor = free["decode"].pop()
            running[actor.prepare.remote(next(waiting))] = ("decode", actor)
        while prepared and free["caption"]:
            actor = free["caption"].pop()
            running[actor.measure.remote(prepared.popleft())] = ("caption", actor)
        finished, _ = ray.wait(list(running), num_returns=1, timeout=TIMEOUT_S)
        if not finished:
            raise ClusterError(f"the sample could not be captioned: nothing ended within {TIMEOUT_S:g} s")
        stage, actor = running.pop(finished[0])
        free[stage].append(actor)
        if stage == "decode":
            prepared.append(finished[0])
            continue
        piece: Piece = ray.get(finished[0])
        now, num_finished = time.perf_counter(), num_finished + 1
        yield replace(piece, gap=now - last_finish if num_finished > len(workers) else 0.0)
        last_finish = now


def _parquet_bytes(table: pa.Table) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return int(sink.getvalue().size)
