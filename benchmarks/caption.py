"""The whole job beside its peers: the same pictures, model, search and threads, in turn in one run.

    python -m benchmarks.caption --model DIR --images DIR [--num-beams N] [--peers DIR] [--sizes 64,192]
        [--peer-sizes 64,192] [--rounds 2]

Ours is the `captioner caption` command with --no-dedupe; the peers are the scripts of --peers, which load the model
and take no chunks, no resume and no checks. Each is a process of its own and runs at two sizes, so that what it takes
to start drops out: steady state = (n2 - n1) / (t2 - t1), t the wall time of the process. A slow peer may be given
smaller sizes. Pictures are the JPEGs of --images, copied under other names as often as needed. torch has --threads
threads in each peer, by OMP_NUM_THREADS, which Ray passes on; the default is every CPU, as ours takes for a large
model. The last line is one JSON object, medians of the rounds; `of_engine` is our rate over that of the captioning
calls alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPUS = len(os.sched_getaffinity(0))
PEERS = ("ray_naive", "hf_batch", "seed_loop")


@dataclass(frozen=True)
class Run:
    """One process: wall seconds from start to end, caption by picture name, and for ours its run.json."""

    seconds: float
    captions: dict[str, str]
    record: dict[str, Any] | None


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        images, out = Path(options.images), Path(scratch) / "out"
        names = ["ours", *(options.against.split(",") if options.peers else ())]
        runs: dict[str, list[list[Run]]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names:
                folders = [_link_pictures(images, Path(scratch), size) for size in _sizes(name, options)]
                pair = [_run(name, folder, out, options) for folder in folders]
                runs[name].append(pair)
                print(f"round {number}: {name:<10}", [round(run.seconds, 2) for run in pair], flush=True)
    rates = {name: statistics.median(map(_rate, pairs)) for name, pairs in runs.items()}
    for name, rate in rates.items():
        print(f"{name:<10}{rate:>10.2f} images/s{rates['ours'] / rate:>8.2f} x")
    print(json.dumps(_result(runs, rates)))


def _sizes(name: str, options: argparse.Namespace) -> list[int]:
    sizes = options.sizes if name == "ours" else options.peer_sizes or options.sizes
    return [int(size) for size in sizes.split(",")]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--peers", help="directory with ray_naive.py, hf_batch.py and seed_loop.py")
    parser.add_argument("--against", default=",".join(PEERS), help="which of them, comma-separated")
    parser.add_argument("--num-beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sizes", default="64,192")
    parser.add_argument("--peer-sizes", help="of the peers' runs; default as --sizes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=CPUS)
    options = parser.parse_args()
    options.model = str(Path(options.model).resolve())  # Ray's workers run in a directory of their own
    return options


def _link_pictures(images: Path, scratch: Path, count: int) -> Path:
    """A folder of `count` JPEGs: the archive's own, over and over. Made once."""
    folder = scratch / f"pictures{count}"
    if not folder.exists():
        folder.mkdir()
        files = sorted(images.rglob("*.jpg"))
        for number in range(count):
            shutil.copyfile(files[number % len(files)], folder / f"{number:06d}.jpg")
    return folder


def _run(name: str, folder: Path, out: Path, options: argparse.Namespace) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    threads = str(options.threads)
    # Each starts a Ray of its own: by itself `ray.init()` joins whatever Ray it finds running on the machine.
    environment = (
        os.environ
        | {"RAY_ADDRESS": "local"}
        | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads}
    )
    started = time.perf_counter()
    finished = subprocess.run(
        _command(name, folder, out, options), env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if finished.returncode:
        raise SystemExit(f"{name}: exit code {finished.returncode}\n{finished.stderr[-2000:]}")
    record = json.loads((out / "run.json").read_text()) if name == "ours" else None
    return Run(seconds, _captions(name, out), record)


def _command(name: str, folder: Path, out: Path, options: argparse.Namespace) -> list[str]:
    search = ["--num-beams", str(options.num_beams), "--max-new-tokens", str(options.max_new_tokens)]
    search += ["--batch-size", str(options.batch_size)]
    if name == "ours":
        own = ["--no-dedupe", "--sample", "0"]
        job = [sys.executable, "-m", "ray_jobs.caption", str(folder), str(out), "--model", options.model]
        return [*job, *search, *own]
    script = str(Path(options.peers) / f"{name}.py")
    if name == "seed_loop":  # one picture at a time, whatever the batch
        search[-1] = "1"
    threads = [] if name == "ray_naive" else ["--threads", str(options.threads)]
    return [
        *(sys.executable, script, "--model", options.model, "--images", str(folder), "--out", str(out)),
        *search,
        *threads,
    ]


def _captions(name: str, out: Path) -> dict[str, str]:
    """Caption by file name."""
    if out.is_file():
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table(out / "captions" if name == "ours" else out).to_pylist()
    return {Path(row.get("path") or row["image_id"]).name: row["caption"].strip() for row in rows}


def _rate(pair: list[Run]) -> float:
    small, large = pair
    return (len(large.captions) - len(small.captions)) / (large.seconds - small.seconds)


def _result(runs: dict[str, list[list[Run]]], rates: dict[str, float]) -> dict[str, Any]:
    last = runs["ours"][-1][1]
    assert last.record is not None
    seconds, workers = last.record["seconds"], last.record["slots"]["device"]
    others = [pairs[-1][1].captions for name, pairs in runs.items() if name != "ours"]
    equal = [
        statistics.fmean(last.captions[name] == text for name, text in other.items() if name in last.captions)
        for other in others
    ]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {
        "ours": {
            "images_per_second": round(rates["ours"], 3),
            "of_engine": round(rates["ours"] * seconds["generate"] / len(last.captions) / workers, 3),
            "startup_seconds": seconds["startup"],
            "peak_memory_gb": round(peak, 2),
            "shares": last.record["busy"],
        },
        "peers": {name: {"images_per_second": round(rate, 3)} for name, rate in rates.items() if name != "ours"},
        "ratio": {name: round(rates["ours"] / rate, 3) for name, rate in rates.items() if name != "ours"},
        "captions_equal": round(min(equal), 4) if equal else None,
    }


if __name__ == "__main__":
    main()
