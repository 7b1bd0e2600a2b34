"""A long run: 200,000 tiny pictures of one tar, with the fake captioner on Ray.

    python -m benchmarks.long_run [--pictures 200000]

Runs the job, kills everything when 90 % are committed, and runs it again. The last line is one JSON object:

    driver_mb, worker_mb, decoder_mb    private memory (USS) at 10 %, 50 % and 90 % of the chunks: flat, or it leaks
    rows_per_second                     from 10 % to 90 %
    resume_seconds                      start of the second run to its first new chunk
    finish_seconds, publish_seconds     the second run; last chunk to the end of it
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psutil

from captioner.testing import num_committed_chunks


def make_tar(path: Path, count: int) -> Path:
    """JPEGs of 16 x 16, one colour each."""
    from PIL import Image

    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (number % 256, number // 256 % 256, number // 65536)).save(buffer, "JPEG")
            member = tarfile.TarInfo(f"{number:07d}.jpg")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)
    return path


def start(archive: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray_jobs.caption", str(archive), str(out), "--model", "fake"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def wait_for_chunks(job: subprocess.Popen[bytes], out: Path, count: int) -> None:
    while num_committed_chunks(out) < count:
        if job.poll() is not None:
            raise SystemExit(f"the job ended with {job.returncode}")
        time.sleep(0.05)


def memory(job: subprocess.Popen[bytes]) -> dict[str, float]:
    """USS in MiB: of the driver, and of the largest worker and decoder process."""
    driver = psutil.Process(job.pid)
    sizes = {"driver_mb": driver.memory_full_info().uss / 2**20, "worker_mb": 0.0, "decoder_mb": 0.0}
    for process in driver.children(recursive=True):
        try:
            words = " ".join(process.cmdline())
            kind = "decoder_mb" if "imaging.child" in words else "worker_mb" if words.startswith("ray::Map") else None
            if kind:
                sizes[kind] = max(sizes[kind], process.memory_full_info().uss / 2**20)
        except psutil.Error:
            continue
    return {name: round(size, 1) for name, size in sizes.items()}


def kill(job: subprocess.Popen[bytes]) -> None:
    for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait()


def measure(folder: Path, pictures: int) -> dict:
    archive, out = make_tar(folder / "pictures.tar", pictures), folder / "out"
    total = -(-pictures // 512)
    job = start(archive, out)
    seen, times = [], []
    for share in (0.1, 0.5, 0.9):
        wait_for_chunks(job, out, int(total * share))
        times.append(time.perf_counter())
        seen.append(memory(job))
    kill(job)
    committed = num_committed_chunks(out)
    began = time.perf_counter()
    job = start(archive, out)
    wait_for_chunks(job, out, committed + 1)
    resumed = time.perf_counter()
    wait_for_chunks(job, out, total)
    captioned = time.perf_counter()
    if job.wait():
        raise SystemExit(f"the second run ended with {job.returncode}")
    ended = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", "verify", str(out)], check=True, stdout=subprocess.DEVNULL)
    return {
        "pictures": pictures,
        "chunks": total,
        **{name: [sizes[name] for sizes in seen] for name in seen[0]},
        "rows_per_second": round(0.8 * pictures / (times[2] - times[0])),
        "resume_seconds": round(resumed - began, 1),
        "publish_seconds": round(ended - captioned, 1),
        "finish_seconds": round(ended - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.pictures)))


if __name__ == "__main__":
    main()
