"""`captioner estimate --images N`: time and cost of a run of any size from figures that were measured before.

It needs no source, no model and no cluster. Where the figures come from stands beside them, and in `docs/scale.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from captioner.console.text import counted
from captioner.errors import OK, UsageError


@dataclass(frozen=True, slots=True)
class Card:
    """What one GPU does in a run. `source`: where the figures were measured, and of what.

    `images_per_second`: with enough CPUs beside it. `decoded_per_cpu`: images that one virtual CPU beside it reads and
    decodes in a second.
    """

    images_per_second: float
    decoded_per_cpu: float
    source: str


# The engine's rate on batches of 256 times the share of it that `captioner.caption` reached (5,915 x 0.90); the
# decoders of the whole job: 2,545 images/s from 15 virtual CPUs that were busy for 89 % of the time.
CARDS = {
    "h100": Card(
        5_320,
        190,
        "NVIDIA H100 80 GB, git-base shape, bfloat16, greedy, 20 tokens, JPEGs of 640 x 480; benchmarks/README.md, "
        "2026-11-27",
    )
}

# Requests for each image with OUT on S3 (3,591 and 10,708 for 900,000 images in chunks of 512, counted by
# `python -m benchmarks.scale --s3`), and dollars for 1,000 of them.
# S3 Standard, us-east-1, list prices of November 2026; HEAD is billed as GET, deleting is free.
OUT_REQUESTS = {"PUT, LIST": (0.0040, 0.005), "GET, HEAD": (0.0119, 0.0004)}
SOURCE_READS = 1.0  # requests for each image: a file of its own; of tars and tables there are fewer
DOLLARS_PER_READ = 0.0004 / 1_000
DOLLARS_PER_GB_MONTH = 0.023
OUT_BYTES = 55  # of each row of a captions table with short ids and captions and no references


def run(num_images: int, gpu: str, num_gpus: int, cpus_per_gpu: int | None, price_per_gpu_hour: float | None) -> int:
    """Print the estimate; return the exit code. Raises UsageError for a GPU of which nothing was measured."""
    if gpu not in CARDS:
        raise UsageError(
            f"--gpu {gpu}: nothing was measured on it; give one of {', '.join(CARDS)}, or estimate a SOURCE"
        )
    for line in estimate_lines(num_images, CARDS[gpu], num_gpus, cpus_per_gpu, price_per_gpu_hour):
        print(line)
    return OK


def estimate_lines(
    num_images: int, card: Card, num_gpus: int = 1, cpus_per_gpu: int | None = None, price: float | None = None
) -> list[str]:
    """Return the estimate as lines to print. `price`: of a GPU hour, with the CPUs beside it."""
    enough = -(-card.images_per_second // card.decoded_per_cpu)
    cpus = enough if cpus_per_gpu is None else cpus_per_gpu
    rate = min(card.images_per_second, cpus * card.decoded_per_cpu)
    bottleneck = "decoding" if rate < card.images_per_second else "the GPU"
    gpu_hours = num_images / rate / 3_600
    requests = {kind: num_images * each for kind, (each, _) in OUT_REQUESTS.items()}
    cost_of_requests = sum(requests[kind] / 1_000 * dollars for kind, (_, dollars) in OUT_REQUESTS.items())
    reads = num_images * SOURCE_READS
    gigabytes = num_images * OUT_BYTES / 1e9
    shown = [
        f"images           {num_images:,}",
        f"images/s         {rate * num_gpus:,.0f} on {counted(num_gpus, 'GPU')}, bottleneck: {bottleneck}",
        f"CPUs             {cpus * num_gpus:,.0f} for decoding, {cpus:,.0f} for each GPU ({enough:,.0f} keep it busy)",
        f"time             {gpu_hours / num_gpus:,.1f} h",
        f"GPU time         {gpu_hours:,.1f} GPU h",
        *([] if price is None else [f"cost of GPUs     {gpu_hours * price:,.2f} at {price:g} an hour"]),
        f"requests to OUT  {sum(requests.values()):,.0f} of an object store, {cost_of_requests:,.2f} dollars",
        f"reading SOURCE   {reads:,.0f} requests where each image is a file, {reads * DOLLARS_PER_READ:,.2f} dollars",
        f"output           {gigabytes:,.1f} GB, {gigabytes * DOLLARS_PER_GB_MONTH:,.2f} dollars a month",
    ]
    return [
        *shown,
        f"measured on: {card.source}",
        "store prices: S3 Standard, us-east-1, November 2026; not counted: start-up, faults, traffic between regions",
        "other models, images or GPUs have other rates: captioner estimate SOURCE --model M measures them on a sample",
    ]
