"""Drivers killed at random moments, from a seed: after the last resume 0 lost, 0 doubled, the captions of a quiet run.

Long: `make chaos` runs it and prints the table. CHAOS_KILLS and CHAOS_SEED choose.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from captioner.errors import OutputError
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(0)]

KILLS = int(os.environ.get("CHAOS_KILLS", "10"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
PICTURES = 3_000


def start(archive: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["caption", str(archive), str(out), "--model", "fake", "--rows-per-file", "500"]
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
    table = pa.concat_tables(read_parts(open_table(str(out)))).to_pylist()
    return [(row["image_id"], row["status"], row["error_code"], row["caption"], row["chunk_id"]) for row in table]


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
    archive = make_folder(tmp_path / "archive", PICTURES, width=32)
    (archive / "broken.png").write_bytes(b"no picture")
    began = time.monotonic()
    assert start(archive, tmp_path / "quiet").wait() == 0
    duration = time.monotonic() - began
    expected = rows(tmp_path / "quiet")
    rng, out, lines = random.Random(SEED), tmp_path / "out", []
    for number in range(KILLS):
        moment, whole_tree = rng.uniform(0.1, 1.0) * duration, rng.random() < 0.5
        job = start(archive, out)
        try:
            code = job.wait(moment)
        except subprocess.TimeoutExpired:
            kill(job, whole_tree)
            code = -signal.SIGKILL
        killed = "ended before" if code == 0 else "everything" if whole_tree else "driver"
        assert code in (0, -signal.SIGKILL), code
        lines.append(f"{number + 1:4}  {moment:6.1f} s  {killed:12}  {state(out)}")
        if code == 0:  # done: a new table, or the other kills would have nothing to do
            lines[-1] += f"  {judged(out, expected)}"
            out = tmp_path / f"out-{number}"

    assert start(archive, out).wait() == 0
    verdict = judged(out, expected)
    with capfd.disabled():
        print(f"\nseed {SEED}, {PICTURES + 1} pictures, a quiet run takes {duration:.1f} s")
        print("kill      after  killed        found")
        print("\n".join(lines))
        print(f"after the last resume: {verdict}")


def judged(out: Path, expected: list[tuple]) -> str:
    found = verify(open_table(str(out)))
    assert (found.lost, found.doubled, found.problems, found.proven) == (0, 0, [], True)
    assert rows(out) == expected
    return "0 lost, 0 doubled, captions as undisturbed"
