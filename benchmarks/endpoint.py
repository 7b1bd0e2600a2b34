"""Captioning by a model server that answers after a fixed time: images/s beside what its concurrency allows.

    python -m benchmarks.endpoint [--images 640] [--concurrency 32] [--delay 1.0] [--spread 0] [--ray] [--peer]

The server answers every request after --delay seconds, so that it can answer at most concurrency / delay images/s.
--spread: the sigma of a log-normal factor of the delay, since answers of models are not equally long; what is allowed
is then concurrency / the mean of the delays. Measured from its first request to its last answer, over the whole run:
start and end count; `steady_share`: without the first and the last --concurrency requests. --ray: on a local Ray in
place of --local. --peer: then Ray's HttpRequestProcessor on the same images and server, in the same run. It awaits the
requests of a batch one after the other (Ray 2.60), so that it gets --concurrency actors, which are all started before
the first request. Prints a line for each side.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from captioner.starter.scenes import make_scenes
from captioner.testing.model_server import ModelServer, Request

Side = Callable[[Path, ModelServer, argparse.Namespace], None]
PEER_BATCH = 4  # images; each actor has many batches, so that none waits for the last one of another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--delay", type=float, default=1.0)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    sides = {"captioner on Ray" if options.ray else "captioner --local": with_captioner}
    sides |= {"ray.data.llm": with_peer} if options.peer else {}
    with tempfile.TemporaryDirectory() as folder:
        archive = make_photos(Path(folder) / "images", options.images)
        for who, caption in sides.items():
            print(json.dumps({"who": who, **measure(caption, archive, options)}), flush=True)


def measure(caption: Side, archive: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one side."""
    spans: list[tuple[float, float]] = []  # of the requests: when they came, and how long the answer takes
    random = Random(0)

    def answer_later(asked: Request) -> None:
        delay = options.delay * math.exp(random.gauss(0, options.spread))
        spans.append((time.perf_counter(), delay))
        time.sleep(delay)

    with ModelServer(answer_later) as server:  # type: ignore[arg-type,func-returns-value]
        started = time.perf_counter()
        caption(archive, server, options)
        run = time.perf_counter() - started
    count, starts = options.concurrency, sorted(start for start, _ in spans)
    allowed = count / fmean(delay for _, delay in spans)
    rate = len(spans) / (max(start + delay for start, delay in spans) - starts[0])
    return {
        "images": len(spans),
        "images_per_second": round(rate, 2),
        "allowed": round(allowed, 2),
        "share": round(rate / allowed, 3),
        "steady_share": steady_share(spans, starts, count),
        "all_under_way_after": round(starts[count - 1] - starts[0], 2),
        "most_at_once": server.most_at_once,
        "run_seconds": round(run, 1),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def steady_share(spans: list[tuple[float, float]], starts: list[float], count: int) -> float | None:
    """Return the share of requests under way between the first and the last `count` starts; None for few requests."""
    if len(starts) <= 2 * count:
        return None
    first, last = starts[count - 1], starts[-count]
    busy = sum(max(0.0, min(start + delay, last) - max(start, first)) for start, delay in spans)
    return round(busy / (count * (last - first)), 3)


def make_photos(directory: Path, count: int) -> Path:
    """JPEGs of 640 x 480: rendered scenes."""
    directory.mkdir()
    for index, scene in enumerate(make_scenes(count, seed=0)):
        scene.render(640).resize((640, 480)).save(directory / f"{index:06d}.jpg", quality=90)
    return directory


def with_captioner(archive: Path, server: ModelServer, options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "ray_jobs.cli", "caption", str(archive), str(archive.parent / "out")]
    command += ["--endpoint", server.url, "--concurrency", str(options.concurrency), "--no-dedupe"]
    subprocess.run(command if options.ray else [*command, "--local"], check=True)


def with_peer(archive: Path, server: ModelServer, options: argparse.Namespace) -> None:
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    ray.init(num_cpus=4, include_dashboard=False)  # of which the actors need little: they wait
    ray.data.DataContext.get_current().wait_for_min_actors_s = 600
    config = HttpRequestProcessorConfig(
        url=f"{server.url}/chat/completions",
        concurrency=options.concurrency,
        batch_size=PEER_BATCH,
        http_request_stage={"num_cpus": 1 / options.concurrency},
    )
    model = server.model

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        url = "data:image/jpeg;base64," + base64.b64encode(row["bytes"]).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe it."}]
        return {"payload": {"model": model, "messages": [{"role": "user", "content": content}]}}

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        return {"text": row["http_response"]["choices"][0]["message"]["content"]}

    processor = build_processor(config, preprocess=ask, postprocess=answer)
    blocks = max(1, options.images // PEER_BATCH)
    rows = processor(ray.data.read_binary_files(str(archive), override_num_blocks=blocks)).take_all()
    assert len(rows) == options.images, f"{len(rows)} rows"


if __name__ == "__main__":
    main()
