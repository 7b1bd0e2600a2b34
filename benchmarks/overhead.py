"""What the machinery costs: the whole job with a captioner that costs nothing.

    python -m benchmarks.overhead [--small 1000] [--large 20000] [--paths 1000000]

Captions two archives of small pictures on Ray with the fake captioner, each in a process tree of its own; samples the
private memory (USS) of the driver and of Ray's workers, and the object store apart. Then lists and plans a folder of
1,000,000 paths. The last line is one JSON object:

    rows_per_second           steady state of each run: without start-up
    driver_uss_mb, workers_uss_mb    peaks; a worker's is that of the largest one
    growth                    peak at the large size / peak at the small one
    plan                      seconds and bytes a path for listing and planning
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil


def make_pictures(folder: Path, count: int) -> Path:
    """Small JPEGs, each with bytes of its own."""
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        colour = (number % 256, number // 256 % 256, number // 65536 % 256)
        Image.new("RGB", (64, 48), colour).save(folder / f"{number:06d}.jpg")
    return folder


class MemoryWatch:
    """Peak private memory of a process and of the Ray workers below it, sampled twice a second."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.driver = self.worker = self.object_store = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            try:
                self.driver = max(self.driver, self._root.memory_full_info().uss)
                for child in self._root.children(recursive=True):
                    self._look_at(child)
            except psutil.Error:
                continue

    def _look_at(self, process: psutil.Process) -> None:
        try:
            name = " ".join(process.cmdline()[:1])
            if "raylet" in name:  # the object store lives in the raylet, in shared memory
                self.object_store = max(self.object_store, process.memory_info().shared)
            elif name.startswith("ray::"):
                self.worker = max(self.worker, process.memory_full_info().uss)
        except psutil.Error:
            pass


def caption(archive: Path, out: Path) -> dict:
    command = [sys.executable, "-m", "ray_jobs.caption", str(archive), str(out), "--model", "fake"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    with MemoryWatch(process.pid) as memory:
        code = process.wait()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    record = json.loads((out / "run.json").read_text())
    return {
        "rows": record["counts"]["ok"],
        "whole_seconds": round(time.perf_counter() - started, 1),
        "startup_seconds": record["seconds"]["startup"],
        "rows_per_second": record["images_per_second"],
        "driver_uss_mb": round(memory.driver / 1e6, 1),
        "workers_uss_mb": round(memory.worker / 1e6, 1),
        "object_store_mb": round(memory.object_store / 1e6, 1),
    }


def plan(folder: Path, out: Path, count: int) -> dict:
    """List and plan `count` empty files in a process of its own, and its peak memory."""
    for start in range(0, count, 10_000):
        sub = folder / f"{start // 10_000:04d}"
        sub.mkdir(parents=True)
        for number in range(start, min(start + 10_000, count)):
            (sub / f"{number:08d}.jpg").touch()
    code = (
        "import json, resource, sys, time\n"
        "from captioner.config import CaptionConfig\n"
        "from captioner import pipeline\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.perf_counter()\n"
        "pipeline.run(CaptionConfig.model_validate({'source': {'path': sys.argv[1]},"
        " 'output': {'path': sys.argv[2], 'plan_only': True}}))\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base\n"
        "print(json.dumps({'seconds': round(time.perf_counter() - start, 2), 'grown_mb': round(grown / 1e3, 1)}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(out)], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "paths": count, "bytes_per_path": round(result["grown_mb"] * 1e6 / count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1_000)
    parser.add_argument("--large", type=int, default=20_000)
    parser.add_argument("--paths", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        runs = {}
        for size in (args.small, args.large):
            runs[str(size)] = caption(make_pictures(root / f"pictures-{size}", size), root / f"out-{size}")
            print(size, runs[str(size)], file=sys.stderr, flush=True)
        planned = plan(root / "paths", root / "planned", args.paths)
    small, large = runs[str(args.small)], runs[str(args.large)]
    growth = {name: round(large[name] / small[name], 3) for name in ("driver_uss_mb", "workers_uss_mb")}
    machine = {"cpus": psutil.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"runs": runs, "growth": growth, "plan": planned, "machine": machine}))


if __name__ == "__main__":
    main()
