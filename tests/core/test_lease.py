"""One writer at a time on an object store: a marker that its owner keeps changing."""

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.errors import OutputError
from captioner.store.directory import LEASE_FILE, Directory
from captioner.store.lease import Lease, leased, this_machine
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder

OTHER = {"owner": "another", "machine": "elsewhere", "pid": 1, "beat": 1}


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(f"memory://{tmp_path}")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept."""
    seconds: list[float] = []
    monkeypatch.setattr(Lease, "sleep", lambda _, time: seconds.append(time))
    return seconds


def test_a_second_run_is_refused_while_the_first_one_lives(directory: Directory, monkeypatch) -> None:
    with leased(directory.location):
        first = directory.read_json(LEASE_FILE)
        monkeypatch.setattr(Lease, "sleep", lambda *_: directory.write_json(LEASE_FILE, first | {"beat": 2}))
        with pytest.raises(OutputError, match="another run is writing to it"):
            Lease(directory).acquire()

    assert not directory.exists(LEASE_FILE)


def test_the_marker_of_a_dead_run_elsewhere_is_waited_out(directory: Directory, slept: list[float]) -> None:
    directory.write_json(LEASE_FILE, OTHER)
    with leased(directory.location) as held:
        held.check()

    assert sum(slept) >= Lease.silent_s


def test_the_marker_of_a_dead_run_of_this_machine_is_taken_at_once(directory: Directory, slept: list[float]) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    directory.write_json(LEASE_FILE, OTHER | {"machine": this_machine(), "pid": dead.pid})
    with leased(directory.location):
        pass

    assert sum(slept) < Lease.silent_s


def test_of_two_that_start_at_once_one_goes_on(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "sleep", lambda *_: directory.write_json(LEASE_FILE, OTHER))
    with pytest.raises(OutputError, match="another run is writing to it"), leased(directory.location):
        pass

    assert directory.read_json(LEASE_FILE) == OTHER  # the one that wrote last has it


def test_a_run_that_was_silent_for_too_long_stops_when_another_has_taken_over(
    directory: Directory, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "beat_s", 0.01)
    with leased(directory.location) as held:
        directory.write_json(LEASE_FILE, OTHER)
        while not held.wait_until_lost(timeout=0.1):  # its keeper may have written after it had read
            directory.write_json(LEASE_FILE, OTHER)
        with pytest.raises(OutputError, match="was taken over by another run"):
            held.check()

    assert directory.read_json(LEASE_FILE) == OTHER


def test_a_run_that_lost_its_table_leaves_it_to_the_other(
    tmp_path: Path, directory: Directory, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_folder(tmp_path / "archive", 20)
    config = caption_config(archive, directory.location)
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "check", _lost)
        with pytest.raises(OutputError, match="taken over"):
            pipeline.run(config)
    assert not open_table(directory.location).is_published(0)

    assert pipeline.run(config) == 0
    assert verify(open_table(directory.location)).proven


def _lost(held: Lease) -> None:
    raise OutputError("taken over")


HOLDER = """
import sys
from captioner.store.lease import Lease, leased
Lease.beat_s = 0.2
with leased(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_that_holds_a_directory_without_locks(
    tmp_path: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system that refuses flock. The other one lives: nothing is waited out; it dies: at once."""
    monkeypatch.setattr("fcntl.flock", _refuse)
    archive, out = make_folder(tmp_path / "archive", 8), tmp_path / "out"
    config = caption_config(archive, out)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], **pipes)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"

    monkeypatch.setattr(Lease, "sleep", lambda *_: _wait_for_a_beat(out))
    with pytest.raises(OutputError, match="another run is writing to it"):
        pipeline.run(config)
    holder.kill()
    holder.wait()

    monkeypatch.setattr(Lease, "sleep", lambda _, time: slept.append(time))
    assert pipeline.run(config) == 0
    assert sum(slept) < Lease.silent_s
    assert verify(open_table(str(out))).proven
    assert not (out / LEASE_FILE).exists()


def _refuse(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no locks here")


def _wait_for_a_beat(out: Path) -> None:
    before = (out / LEASE_FILE).read_text()
    while (out / LEASE_FILE).read_text() == before:
        time.sleep(0.01)
