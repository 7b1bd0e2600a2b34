"""`captioner estimate`: predict time, cost and size of a run from a sample captioned on the cluster.

The source is listed to its end. A seeded sample of it is read, decoded and captioned by workers of the number and size
that `captioner caption` would use, all at the same time (`ray_jobs.sampling`). Nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.config import CaptionConfig, ModelConfig, check_endpoint_settings
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.console.summary import usage_rows
from captioner.console.text import counted
from captioner.data import Source, Usage
from captioner.errors import OK, SourceError, UsageError
from captioner.files import shown
from captioner.models import is_small, resolve, resolve_dtype
from captioner.models.placement import check_spread
from captioner.run.question_checks import check_columns_of_questions
from captioner.sources import describe, open_source
from captioner.store.parallel_listing import list_units
from ray_jobs.cluster import Sizes, cluster_address, connect, sizes_of
from ray_jobs.gpus import device_kind
from ray_jobs.nodes import check_gpu_nodes
from ray_jobs.sampling import Piece, measure

RESAMPLES = 1_000
LOW, HIGH = 0.05, 0.95  # a 90 % interval


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is predicted for the whole source.

    `rate`: images/s; `low`, `high`: the bounds of its 90 % interval. Sizes are in bytes. `usage`: prompt tokens and
    answer tokens of model servers.
    """

    num_images: int
    rate: float
    low: float
    high: float
    bound_by: str
    source_bytes: float
    output_bytes: float
    share_ok: float
    usage: tuple[float, float] = (0.0, 0.0)


def run(config: CaptionConfig, sample: int, seed: int, price_per_gpu_hour: float | None) -> int:
    """Print the prediction; return the exit code. Raises CaptionerError."""
    if not config.source.path or not config.model.name:
        raise UsageError("estimate needs SOURCE and --model")
    if config.cluster.local:
        raise UsageError("--local: estimate measures workers on Ray; leave it out")
    check_endpoint_settings(config.model)
    cluster_address(config.cluster)  # what is wrong with it is said before the source is listed
    with phase(f"opening {shown(config.source.path)}", notify):
        source = open_source(config.source)
    notify(f"{shown(config.source.path)} is {describe(source)}")
    with phase("listing images", notify):
        total, rows = draw_sample(source, config.source.limit, sample, seed)
    if not total:
        raise SourceError(f"{config.source.path}: no images found")
    notify(f"{counted(total, 'image')} listed; captioning a sample of {rows.num_rows:,}")
    resources = connect(config.cluster)
    model, device = resolve(config.model, notify=notify), config.model.compute_on
    check_columns_of_questions(model, config.source)
    check_spread(model, config.cluster)
    sizes = sizes_of(config, resources, is_small(model))
    model = model.shared_by(sizes.num_workers)
    check_gpu_nodes(device, sizes)
    model = resolve_dtype(model, config.model.dtype, device_kind(resources, sizes, device))
    with phase("starting workers, captioning the sample", notify):
        pieces = measure(source, rows, model, sizes, config)
    if not any(piece.num_ok for piece in pieces):
        raise SourceError(
            f"{config.source.path}: none of {counted(rows.num_rows, 'sampled image')} can be read and captioned; "
            "`captioner try FILE` says why for one file"
        )
    prediction = predict(pieces, total, sizes.num_workers, sizes.decode_cpus, seed)
    for line in prediction_lines(prediction, sizes, price_per_gpu_hour, config.model):
        print(line)
    return OK


def draw_sample(source: Source, limit: int | None, size: int, seed: int) -> tuple[int, pa.Table]:
    """Return the number of images in the source and a uniform sample of their planned rows.

    Each row gets a random key; the rows with the lowest keys are the sample.
    """
    random = np.random.default_rng(seed)
    total, sample, keys = 0, None, np.empty(0)
    for _, listing in list_units(source, list(source.units())):
        rows = listing.rows if limit is None else listing.rows.slice(0, limit - total)
        total += rows.num_rows
        keys = np.concatenate([keys, random.random(rows.num_rows)])
        sample = rows if sample is None else pa.concat_tables([sample, rows])
        lowest = np.sort(np.argsort(keys)[:size])
        keys, sample = keys[lowest], sample.take(lowest)
    return total, sample


def predict(pieces: Sequence[Piece], total: int, num_workers: int, decoders: int, seed: int = 0) -> Prediction:
    """Predict a whole run from the rate at which the full pipeline finished pieces.

    The interval of the rate is a bootstrap over the pieces. Its upper bound is at least the capacity of the slower
    stage, since a run has larger pieces and so less overhead.
    """
    table = np.array([[p.num_rows, p.prepare, p.generate] for p in pieces])
    each = {piece.index: piece for piece in pieces}.values()
    sizes = np.array([[p.num_rows, p.source_bytes, p.output_bytes, p.num_ok, *p.usage[:2]] for p in each]).sum(axis=0)
    of_an_image = sizes[1:] / sizes[0]
    gaps = np.array([[p.num_rows, p.gap] for p in pieces if p.gap > 0])
    random = np.random.default_rng(seed)

    def resampled_sums(rows: Any) -> Any:
        return rows[random.integers(len(rows), size=(RESAMPLES, len(rows)))].sum(axis=1)

    def capacities(sums: Any) -> tuple[Any, Any]:
        images, prepare, generate = sums[..., 0], sums[..., 1], sums[..., 2]
        return images * decoders / np.maximum(prepare, 1e-9), images * num_workers / np.maximum(generate, 1e-9)

    decoding, captioning = capacities(table.sum(axis=0))
    capacity, capacity_draws = min(decoding, captioning), np.minimum(*capacities(resampled_sums(table)))
    rate, rate_draws = capacity, capacity_draws
    if len(gaps) > 1:
        rate, gap_draws = gaps[:, 0].sum() / gaps[:, 1].sum(), resampled_sums(gaps)
        rate_draws = gap_draws[:, 0] / gap_draws[:, 1]
    high = max(np.quantile(rate_draws, HIGH), np.quantile(capacity_draws, HIGH))
    return Prediction(
        total,
        float(rate),
        float(min(rate, np.quantile(rate_draws, LOW))),
        float(max(rate, high)),
        "decoding" if decoding < captioning else "model",
        source_bytes=float(of_an_image[0] * total),
        output_bytes=float(of_an_image[1] * total),
        share_ok=float(of_an_image[2]),
        usage=(float(of_an_image[3] * total), float(of_an_image[4] * total)),
    )


def prediction_lines(
    prediction: Prediction, sizes: Sizes, price_per_gpu_hour: float | None, model: ModelConfig | None = None
) -> list[str]:
    """Return the prediction as lines to print, with intervals in brackets."""
    rates = (prediction.rate, prediction.high, prediction.low)
    seconds = [prediction.num_images / rate for rate in rates]
    expected, shortest, longest = map(_span, seconds)
    interval = f"({prediction.low:,.1f} to {prediction.high:,.1f})"
    shown = [
        f"images          {prediction.num_images:,}, {_size(prediction.source_bytes)}",
        f"images/s        {prediction.rate:,.1f} {interval}, bottleneck: {prediction.bound_by}",
        f"time            {expected} ({shortest} to {longest})",
        f"captioned       {prediction.share_ok:.1%} of the sample",
        f"output          {_size(prediction.output_bytes)}",
    ]
    gpus = sizes.num_workers * sizes.gpus_per_worker
    if gpus:
        hours = [gpus * duration / 3600 for duration in seconds]
        cards = counted(gpus, "GPU")
        if sizes.gpus_per_worker > 1:
            cards += f", {sizes.gpus_per_worker:g} for each worker"
        shown.append(f"GPU time        {hours[0]:,.2f} GPU h ({hours[1]:,.2f} to {hours[2]:,.2f}) on {cards}")
        if price_per_gpu_hour is not None:
            cost, lowest, highest = (price_per_gpu_hour * gpu_hours for gpu_hours in hours)
            shown.append(f"cost            {cost:,.2f} ({lowest:,.2f} to {highest:,.2f})")
    if model is not None and model.endpoint:
        usage = dict(zip(Usage._fields[:2], prediction.usage, strict=True)) | {"cost": model.cost_of(*prediction.usage)}
        shown += [f"{label:<16}{value}" for label, value in usage_rows(usage)]
    return [*shown, "in brackets: 90 % interval of this sample, not counting start-up, faults and other load"]


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.0f} kB"
