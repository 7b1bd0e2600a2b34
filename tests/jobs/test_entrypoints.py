"""The jobs as programs: under python and under `uv run`, with paths as a person writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def uv(tmp_path: Path) -> list[str]:
    """`uv run`, as far as Ray looks: it searches the processes above it for one of that name. This one runs the rest of
    its command line and nothing else."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/uv"
    program.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "run").write_text("import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))\n")
    return [str(program), "run"]


def test_a_job_under_uv_run_works_where_it_is_started(tmp_path: Path, uv: list[str]) -> None:
    make_folder(tmp_path / "images", 20, width=32)
    words = [sys.executable, "-m", "ray_jobs.caption", "images", "out", "--model", "fake", "--num-workers", "1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}

    done = subprocess.run([*uv, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)

    assert done.returncode == 0, done.stderr
    assert verify(open_table(str(tmp_path / "out"))).proven
