"""`captioner estimate`: what captioning an archive would take here, from a sample captioned on the cluster itself.

The source is listed to its end and a seeded sample of it is read, decoded and captioned by workers of the size that
`captioner caption` would use. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import AutoInt, CaptionConfig, SourceConfig
from captioner.data import Source
from captioner.errors import OK, ClusterError, SourceError, UsageError
from captioner.models import ModelRef, load, resolve
from captioner.sources import open_source
from captioner.stopping import say
from captioner.store.listing import list_units
from captioner.store.plan import matching
from ray_jobs.cluster import Sizes, connect, share_out

PICTURES_PER_PIECE = 64  # enough for the batches of a GPU
MIN_PIECES = 8
RESAMPLES = 1_000
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Piece:
    """What a worker measured on some of the sampled pictures. `prepare`, `generate`: seconds."""

    num_rows: int
    num_ok: int
    prepare: float
    generate: float
    source_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """`rate`: pictures a second, with the bounds of a 90 % interval. Sizes in bytes, of the whole archive."""

    num_pictures: int
    rate: float
    low: float
    high: float
    bound_by: str
    source_bytes: float
    output_bytes: float
    share_ok: float


def run(config: CaptionConfig, sample: int, seed: int, price_per_gpu_hour: float | None) -> int:
    """Print the prediction. Raises CaptionerError."""
    if not config.source.path or not config.model.name:
        raise UsageError("estimate needs SOURCE and --model")
    source = open_source(config.source)
    total, rows = draw_sample(source, config.source, sample, seed)
    if not total:
        raise SourceError(f"{config.source.path}: no pictures found")
    say(f"{total:,} pictures listed; captioning a sample of {rows.num_rows:,}")
    sizes = share_out(connect(config.cluster), config.cluster)
    device_dtype = "bfloat16" if sizes.gpus_per_worker else "float32"
    model = resolve(config.model, device_dtype if config.model.dtype == "auto" else config.model.dtype, say)
    pieces = measure(source, rows, model, sizes, config)
    prediction = predict(pieces, total, sizes.num_workers, sizes.decode_cpus, seed)
    for line in lines(prediction, sizes, price_per_gpu_hour):
        print(line)
    return OK


def draw_sample(source: Source, config: SourceConfig, size: int, seed: int) -> tuple[int, pa.Table]:
    """(pictures in the source, a uniform sample of their planned rows): each row draws a number, the lowest stay."""
    random = np.random.default_rng(seed)
    total, kept, keys = 0, None, np.empty(0)
    for _, listing in list_units(source, list(source.units())):
        rows = matching(listing.rows, config)
        rows = rows if config.limit is None else rows.slice(0, config.limit - total)
        total += rows.num_rows
        keys = np.concatenate([keys, random.random(rows.num_rows)])
        kept = rows if kept is None else pa.concat_tables([kept, rows])
        lowest = np.sort(np.argsort(keys)[:size])
        keys, kept = keys[lowest], kept.take(lowest)
    return total, kept


class Sampler:
    """A worker: holds the model, measures pieces."""

    def __init__(self, source: Source, model: ModelRef, max_pixels: int, batch_size: AutoInt, num_threads: int) -> None:
        self._source, self._model, self._max_pixels = source, model, max_pixels
        self._captioner = load(model, batch_size=batch_size, num_threads=num_threads)

    def measure(self, rows: pa.Table) -> Piece:
        from captioner.imaging import decode_images

        started = time.perf_counter()
        raws = self._source.read(rows)
        batch = decode_images(raws, self._model.spec, self._max_pixels)
        prepared = time.perf_counter()
        fine = [place for place, code in enumerate(batch.rows["error_code"].to_pylist()) if not code]
        texts = self._captioner.caption(batch.pixels[fine]).texts if fine else []
        generated = time.perf_counter()
        written = batch.rows.append_column("caption", [_padded(texts, len(raws))])
        return Piece(
            num_rows=rows.num_rows,
            num_ok=len(fine),
            prepare=prepared - started,
            generate=generated - prepared,
            source_bytes=sum(len(raw.data) for raw in raws if raw.data),
            output_bytes=_parquet_bytes(written) - _parquet_bytes(written.slice(0, 0)),
        )


def measure(source: Source, rows: pa.Table, model: ModelRef, sizes: Sizes, config: CaptionConfig) -> list[Piece]:
    """Every piece of the sample, each measured by a worker that has captioned before. Raises ClusterError."""
    import ray
    from ray.util import ActorPool

    worker = ray.remote(num_cpus=sizes.cpus_per_worker, num_gpus=sizes.gpus_per_worker or None)(Sampler)
    settings = (source, model, config.source.max_pixels, config.model.batch_size, sizes.threads_per_worker)
    workers = [worker.remote(*settings) for _ in range(sizes.num_workers)]
    per_piece = min(PICTURES_PER_PIECE, max(1, rows.num_rows // MIN_PIECES))
    pieces = [rows.slice(first, per_piece) for first in range(0, rows.num_rows, per_piece)]
    try:
        ray.get([one.measure.remote(pieces[0]) for one in workers], timeout=TIMEOUT_S)  # the first call warms up
        pool = ActorPool(workers)
        return list(pool.map(lambda one, piece: one.measure.remote(piece), pieces))
    except ray.exceptions.RayError as error:
        raise ClusterError(f"the sample could not be captioned: {str(error).strip().splitlines()[-1]}") from error
    finally:
        for one in workers:
            ray.kill(one)


def predict(pieces: Sequence[Piece], total: int, num_workers: int, decoders: int, seed: int = 0) -> Prediction:
    """The rate is that of the slower of the two stages; the interval comes from drawing the pieces again and again."""
    table = np.array([[p.num_rows, p.prepare, p.generate, p.source_bytes, p.output_bytes, p.num_ok] for p in pieces])

    def rates(sums: Any) -> tuple[Any, Any]:
        pictures, prepare, generate = sums[..., 0], sums[..., 1], sums[..., 2]
        return pictures * decoders / np.maximum(prepare, 1e-9), pictures * num_workers / np.maximum(generate, 1e-9)

    sums = table.sum(axis=0)
    decode_rate, caption_rate = rates(sums)
    draws = np.random.default_rng(seed).integers(len(pieces), size=(RESAMPLES, len(pieces)))
    low, high = np.quantile(np.minimum(*rates(table[draws].sum(axis=1))), [0.05, 0.95])
    scale = total / sums[0]
    return Prediction(
        total,
        float(min(decode_rate, caption_rate)),
        float(low),
        float(high),
        "decoding" if decode_rate < caption_rate else "the model",
        float(sums[3] * scale),
        float(sums[4] * scale),
        float(sums[5] / sums[0]),
    )


def lines(found: Prediction, sizes: Sizes, price_per_gpu_hour: float | None) -> list[str]:
    hours = [found.num_pictures / rate / 3600 for rate in (found.rate, found.high, found.low)]
    gpus = sizes.num_workers * sizes.gpus_per_worker

    def spread(unit: str, scale: float = 1.0) -> str:
        middle, least, most = (f"{scale * value:,.2f}" for value in hours)
        return f"{middle} {unit} ({least} to {most})"

    told = [
        f"pictures        {found.num_pictures:,}, {found.source_bytes / 1e9:,.2f} GB",
        f"images/s        {found.rate:,.1f} ({found.low:,.1f} to {found.high:,.1f}), bound by {found.bound_by}",
        f"time            {spread('h')}",
        f"captioned       {found.share_ok:.1%} of the sample",
        f"output          {found.output_bytes / 1e6:,.1f} MB",
    ]
    if gpus:
        told.append(f"GPU time        {spread('GPU h', gpus)} on {gpus:g} GPUs")
    if price_per_gpu_hour is not None and gpus:
        told.append(f"cost            {spread('', gpus * price_per_gpu_hour)}")
    return [*told, "in brackets: 90 % interval of the sample; start-up and faults are not in it"]


def _padded(texts: list[str], count: int) -> list[str]:
    return texts + [""] * (count - len(texts))


def _parquet_bytes(table: pa.Table) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return int(sink.getvalue().size)
