"""Stores that fail as told: what may pass is tried again, what does not stops the run cleanly, and it resumes."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers import caption_config, contents, with_few_references

from captioner import pipeline
from captioner.config import SourceConfig
from captioner.data import RawImage
from captioner.errors import OutputError, SourceError
from captioner.files import inside, open_filesystem
from captioner.scoring.references import read_references
from captioner.sources import open_source, reading
from captioner.store.directory import Directory
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import Killed, killed_at_write, make_folder, make_tar

pytestmark = pytest.mark.usefixtures("tiny_thumbnails")
BUSY = OSError("When uploading part: AWS Error SLOW_DOWN during UploadPart operation: Please reduce your request rate.")
REFUSED = OSError("When uploading part: AWS Error ACCESS_DENIED during PutObject operation: Access Denied")


class FailingFileSystem(MemoryFileSystem):
    """fsspec's memory as failing://, whose opens for writing raise the errors in `failures` first."""

    protocol = "failing"
    store: dict = {}  # noqa: RUF012
    failures: list = []  # noqa: RUF012
    puts = 0

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            type(self).puts += 1
            if self.failures:
                raise self.failures.pop(0)
        return super()._open(path, mode, **options)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    FailingFileSystem.failures = []
    waited: list[float] = []
    monkeypatch.setattr(Directory, "retry", replace(Directory.retry, sleep=waited.append))
    return waited


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_few_references(make_folder(tmp_path_factory.mktemp("archive"), 40))


def test_a_busy_store_is_asked_again(tmp_path: Path, archive: Path, waits: list[float]) -> None:
    out = f"failing://bucket{tmp_path}"
    FailingFileSystem.failures = [BUSY, BUSY, BUSY]

    assert pipeline.run(caption_config(archive, out)) == 0

    assert waits == [0.5, 2.0, 8.0]
    assert verify(open_table(out)).proven


def test_a_store_that_stays_busy_stops_the_run_and_it_resumes(tmp_path: Path, archive: Path) -> None:
    pipeline.run(caption_config(archive, tmp_path / "undisturbed"))
    FailingFileSystem.puts = 0
    pipeline.run(caption_config(archive, f"failing://count{tmp_path}"))
    total = FailingFileSystem.puts

    for number in range(0, total, 3):
        out = f"failing://bucket{tmp_path}/{number}"
        with pytest.raises(OutputError, match="SLOW_DOWN"), outage_at(number):
            pipeline.run(caption_config(archive, out))
        assert pipeline.run(caption_config(archive, out)) == 0
        assert verify(open_table(out)).proven
        assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_permission_that_is_revoked_is_not_asked_for_again(tmp_path: Path, waits: list[float]) -> None:
    FailingFileSystem.failures = [REFUSED]

    with pytest.raises(OutputError, match="ACCESS_DENIED"):
        Directory(f"failing://bucket{tmp_path}").write_bytes("x.json", b"{}")

    assert waits == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_closed_disk_stops_the_run_and_it_resumes(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float], number: int
) -> None:
    pipeline.run(caption_config(archive, tmp_path / "undisturbed"))
    for good in (0, 5, 14, 22, 28):
        out = tmp_path / f"out-{good}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_after(good, number))
            with pytest.raises(OutputError, match=os.strerror(number)):
                pipeline.run(caption_config(archive, out))
        assert list(out.rglob("*.tmp")) == []

        assert pipeline.run(caption_config(archive, out)) == 0
        assert verify(open_table(str(out))).proven
        assert contents(out) == contents(tmp_path / "undisturbed")
    assert waits == []


def test_messages_hold_no_keys() -> None:
    directory = Directory("s3://AKIAKEY:secret@bucket/out?endpoint_override=localhost:1&scheme=http")

    assert directory.shown("table.json") == "s3://bucket/out/table.json"


class outage_at:  # noqa: N801
    """From the n-th write on, every write fails."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> None:
        FailingFileSystem.failures = _FromThen(FailingFileSystem.puts + self.number)

    def __exit__(self, *_: object) -> None:
        FailingFileSystem.failures = []


class _FromThen:
    def __init__(self, first: int) -> None:
        self.first = first

    def __bool__(self) -> bool:
        return FailingFileSystem.puts > self.first

    def pop(self, _: int) -> OSError:
        return BUSY


def full_after(good: int, number: int):
    """os.fsync of a disk that takes that many more writes."""
    fsync, done = os.fsync, 0

    def wrapper(descriptor: int) -> None:
        nonlocal done
        done += 1
        if done > good:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return wrapper


KILLED_AT_WRITE = """
import sys
from captioner.store.lease import Lease
from captioner.testing.faults import sigkill_at_write
from ray_jobs.cli import main
Lease.beat_s = 3600.0  # a beat is a write: how many there are would depend on how fast the machine is
with sigkill_at_write(int(sys.argv[1])):
    main(sys.argv[2:])
"""


# --- a real S3 protocol, on a server of this machine ----------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URI of an empty bucket, with a format field for the path."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store = pyarrow.fs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        store.create_dir("archive")
        yield (
            f"s3://archive/{{}}?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
        )
    server.stop()


def test_a_table_on_s3_is_written_killed_resumed_and_verified(tmp_path: Path, archive: Path, bucket: str) -> None:
    pipeline.run(caption_config(archive, tmp_path / "local"))

    for write in (3, 8, 12, 15, 18):
        out = bucket.format(f"out-{write}")
        with pytest.raises(Killed), killed_at_write(write):
            pipeline.run(caption_config(archive, out))
        assert pipeline.run(caption_config(archive, out)) == 0
        assert verify(open_table(out)).proven
        assert contents(out) == contents(tmp_path / "local")


@pytest.mark.parametrize("write", [15, 17])
def test_a_process_killed_with_a_table_on_s3_leaves_what_resumes(
    tmp_path: Path, archive: Path, bucket: str, write: int
) -> None:
    out = bucket.format(f"killed-{write}")
    words = ["caption", str(archive), out, "--model", "fake", "--rows-per-file", "16", "--local"]
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_WRITE, str(write), *words], stderr=subprocess.DEVNULL)
    verification = verify(open_table(out))

    assert killed.returncode == -signal.SIGKILL
    assert not verification.proven
    assert verification.counts.ok > 0  # some of it was done
    pipeline.run(caption_config(archive, tmp_path / "local"))
    assert pipeline.run(caption_config(archive, out)) == 0
    assert verify(open_table(out)).proven
    assert contents(out) == contents(tmp_path / "local")


def test_a_source_in_a_store_keeps_the_options_of_its_uri(tmp_path: Path, bucket: str) -> None:
    store, path = open_filesystem(bucket.format("named"))
    files = {
        "w/0.tar": make_tar(tmp_path / "0.tar", 1).read_bytes(),
        "f/a.png": b"image",
        "f/m.csv": b"path,caption\na.png,said\ns3://archive/named/f/a.png,\ns3://second/b.png,\n",
    }
    for name, data in files.items():
        with store.open_output_stream(f"{path}/{name}") as stream:
            stream.write(data)
    store.create_dir("second")
    with store.open_output_stream("second/b.png") as stream:
        stream.write(b"image")

    for name, num_images in {"w/0.tar": 1, "w/*.tar": 1, "f/a.png": 1, "f/m.csv": 3}.items():
        source = open_source(SourceConfig(path=bucket.format(f"named/{name}")))
        (listing,) = source.list_unit(*source.units())
        images = source.read(listing.rows)
        assert len(images) == num_images
        assert all(image.data for image in images)
        assert "endpoint" not in images[0].uri
    assert read_references(bucket.format("named/f/m.csv"))
    with pytest.raises(SourceError, match="no such file or directory"):
        open_source(SourceConfig(path=bucket.format("named/gone.tar")))


def test_a_read_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LATE", (0.01, 4))
    monkeypatch.setattr(reading, "VERY_LATE", (0.02, 10))
    released, calls = threading.Event(), Counter[int]()

    def read(number: int) -> RawImage:
        calls[number] += 1
        if number % 50 == 7 and calls[number] == 1:
            released.wait()
        return RawImage(str(number), str(number), b"bytes")

    try:
        with reading.reads_at_once(8):
            images = reading.run_reads([partial(read, number) for number in range(100)])
    finally:
        released.set()

    assert [image.image_id for image in images] == [str(number) for number in range(100)]
    assert calls[7] == calls[57] == 2


def test_of_many_slow_reads_few_are_started_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LATE", (0.01, 4))
    monkeypatch.setattr(reading, "VERY_LATE", (3600, 10))
    released, calls = threading.Event(), Counter[int]()

    def read(number: int) -> RawImage:
        calls[number] += 1
        if calls[number] == 2:
            released.set()
        if number % 10 == 7:
            released.wait()
        return RawImage(str(number), str(number), b"bytes")

    with reading.reads_at_once(32):
        images = reading.run_reads([partial(read, number) for number in range(100)])

    assert [image.image_id for image in images] == [str(number) for number in range(100)]
    assert calls.total() == 101


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("out/", "out/model"),
        ("what?/", "what?/model"),
        ("s3://bucket/out", "s3://bucket/out/model"),
        ("s3://bucket/out/?region=x&scheme=http", "s3://bucket/out/model?region=x&scheme=http"),
    ],
)
def test_a_file_in_a_folder_keeps_the_options_of_its_store(folder: str, expected: str) -> None:
    assert inside(folder, "model") == expected
