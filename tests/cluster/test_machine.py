"""A machine that runs out of memory for a while, or has no room to spill to: the run ends by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import caption_config

from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import GATE_MARKER, decoder_faults, make_folder, num_committed_chunks
from ray_jobs.caption import run

pytestmark = pytest.mark.chaos

DEADLINE_S = 600.0
MARGIN = 2**30  # bytes of memory that may be taken before Ray kills


@contextmanager
def own_ray(**system_config: float) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=80 * 2**20,
        _system_config=system_config,
    )
    yield
    ray.shutdown()


def workers() -> set[int]:
    """Process numbers of the stages' workers."""
    return {p.pid for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Map")}


def hold_memory_until_a_worker_is_killed(out: Path, gate: Path, replacements: list[int]) -> None:
    """Note the workers that Ray starts in place of killed ones; then let the run go on to its end."""
    deadline = time.monotonic() + DEADLINE_S
    while not ((gate / "pid").exists() and num_committed_chunks(out)) and time.monotonic() < deadline:
        time.sleep(0.02)
    before, memory = workers(), np.ones(MARGIN * 3 // 2, np.uint8)
    while before <= workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    del memory
    while not replacements and time.monotonic() < deadline:
        replacements += workers() - before
        time.sleep(0.05)
    (gate / "open").touch()


def test_memory_that_runs_out_for_a_while_costs_workers_and_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out, gate = make_folder(tmp_path / "archive", 3_000, width=32), tmp_path / "out", tmp_path / "gate"
    gate.mkdir()
    with (archive / "002999.png").open("ab") as last:
        last.write(GATE_MARKER + bytes(gate))
    monkeypatch.setenv("PYTHONPATH", decoder_faults()["PYTHONPATH"])
    replacements: list[int] = []
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + MARGIN) / memory.total
    with own_ray(memory_usage_threshold=limit, memory_monitor_refresh_ms=100):
        hog = threading.Thread(target=hold_memory_until_a_worker_is_killed, args=[out, gate, replacements])
        hog.start()
        assert run(caption_config(archive, out, source={"decode_timeout": 3600}, rows_per_file=100)) == 0
        hog.join()

    assert replacements
    verification = verify(open_table(str(out)))
    assert (verification.lost, verification.doubled, verification.problems, verification.proven) == (0, 0, [], True)
    assert verification.counts.ok == 3_000


def test_an_object_store_that_is_full_and_cannot_spill_stops_nothing(tmp_path: Path) -> None:
    """A run's blocks are small, and it holds few of them."""
    import ray
    from ray.exceptions import OutOfDiskError

    archive, out, held = make_folder(tmp_path / "archive", 600, width=32), tmp_path / "out", []
    with own_ray(local_fs_capacity_threshold=0.001):  # any disk is fuller than that
        with pytest.raises(OutOfDiskError):
            held.extend(ray.put(np.zeros(9 * 2**20, np.uint8)) for _ in range(100))
        assert run(caption_config(archive, out, rows_per_file=100)) == 0

    assert verify(open_table(str(out))).proven
