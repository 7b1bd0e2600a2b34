"""Drivers killed at random moments, from a seed: after the last resume 0 lost, 0 doubled, the captions of a quiet run.

Long: `make chaos` runs it and prints the table. CHAOS_KILLS and CHAOS_SEED choose.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import rows_of

from captioner.errors import OutputError
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, num_committed_chunks

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

KILLS = int(os.environ.get("CHAOS_KILLS", "10"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
IMAGES = 3_000


def start(archive: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["caption", str(archive), str(out), "--model", "fake", "--rows-per-file", "100"]
    command = [sys.executable, "-m", "ray_jobs.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def kill(job: subprocess.Popen[bytes], whole_tree: bool) -> None:
    """The driver alone, so that its workers live on for a while, or everything below it too."""
    below = psutil.Process(job.pid).children(recursive=True) if whole_tree else []
    job.kill()
    for process in below:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait()


def rows(out: Path) -> list[tuple]:
    return [
        (row["image_id"], row["status"], row["error_code"], row["caption"], row["chunk_id"]) for row in rows_of(out)
    ]


def state(out: Path) -> str:
    """How far the run had come."""
    try:
        table = open_table(str(out))
    except OutputError:
        return "no table yet"
    if not table.plans():
        return "planning"
    if not table.open_plans():
        return "published"
    committed, published = len(table.committed_chunks(0)), len(table.published_parts())
    return f"{committed} chunks committed" + (f", {published} files published" if published else "")


def test_a_driver_killed_at_random_moments(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    archive = make_folder(tmp_path / "archive", IMAGES, width=32)
    (archive / "broken.png").write_bytes(b"no image")
    assert start(archive, tmp_path / "quiet").wait() == 0
    expected = rows(tmp_path / "quiet")
    rng, out, lines = random.Random(SEED), tmp_path / "out", []
    for number in range(KILLS):
        more, pause, whole_tree = rng.randrange(12), rng.uniform(0, 1), rng.random() < 0.5
        job = start(archive, out)
        if wait_for(job, out, more, pause):
            kill(job, whole_tree)
            lines.append(f"{number + 1:4}  {'everything' if whole_tree else 'driver':11} {state(out)}")
            continue
        assert job.returncode == 0
        lines.append(f"{number + 1:4}  too late    {judged(out, expected)}; a new table from here")
        out = tmp_path / f"out-{number}"

    assert start(archive, out).wait() == 0
    verdict = judged(out, expected)
    with capfd.disabled():
        print(f"\nseed {SEED}, {IMAGES + 1} images in 31 chunks\nkill  of what     found")
        print("\n".join(lines))
        print(f"after the last resume: {verdict}")


def wait_for(job: subprocess.Popen[bytes], out: Path, more: int, pause: float) -> bool:
    """Until so many more chunks are committed, or one more file is published, and a moment; whether the job lives.
    With `more` = 0 only for the moment: up to 5 s, in which it plans and starts Ray."""
    goal, published = num_committed_chunks(out) + more, num_published(out)
    while more and num_committed_chunks(out) < goal and num_published(out) == published and job.poll() is None:
        time.sleep(0.002)
    try:
        job.wait(pause * (0.1 if more else 5))
    except subprocess.TimeoutExpired:
        return True
    return False


def num_published(out: Path) -> int:
    return sum(1 for _ in out.glob("captions/*.parquet"))


def judged(out: Path, expected: list[tuple]) -> str:
    verification = verify(open_table(str(out)))
    assert (verification.lost, verification.doubled, verification.problems, verification.proven) == (0, 0, [], True)
    assert rows(out) == expected
    return "0 lost, 0 doubled, captions as undisturbed"
