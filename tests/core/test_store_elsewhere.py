"""A table on something that is not a local disk: one PUT a file, the same promise."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from helpers import caption_config, contents

from captioner import files, pipeline
from captioner.errors import NoAnswerError, OutputError, UsageError
from captioner.store.directory import Directory
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import Killed, killed_at_write, make_folder
from ray_jobs.cli import main


def test_a_table_in_an_object_store_survives_kills(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 40)
    pipeline.run(caption_config(archive, str(tmp_path / "local")))

    for write in (4, 9, 12, 14, 17):
        out = f"memory://bucket/{tmp_path.name}/{write}"
        with pytest.raises(Killed), killed_at_write(write):
            pipeline.run(caption_config(archive, out))
        pipeline.run(caption_config(archive, out))

        assert verify(open_table(out)).proven
        assert contents(out) == contents(str(tmp_path / "local"))


def test_keys_in_a_uri_stay_out_of_the_records(tmp_path: Path) -> None:
    out = f"memory://key:secret@bucket/{tmp_path.name}/out?region=x"
    pipeline.run(caption_config(make_folder(tmp_path / "archive", 3), out))

    directory = open_table(out).directory
    written = [directory.read_bytes(name).decode() for name in ("run.json", "table.json")]
    assert f"memory://bucket/{tmp_path.name}/out" in written[0]
    assert not [text for text in written if "secret" in text]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_file_is_replaced_whole_and_can_go(tmp_path: Path, scheme: str) -> None:
    directory = Directory(f"{scheme}{tmp_path}/out")

    directory.write_bytes("a/b/c.json", b"{}")
    directory.write_json("a/b/c.json", {"x": 1})

    assert directory.read_json("a/b/c.json") == {"x": 1}
    assert directory.list_names("a/b") == ["c.json"]
    assert directory.list_folders("a") == ["b"]
    directory.delete("a/b/c.json")
    directory.delete("a/b/c.json")
    assert not directory.exists("a/b/c.json")
    directory.delete_folder("a")
    directory.delete_folder("a")
    assert directory.list_names("nowhere") == []


def test_what_a_killed_writer_left_is_not_seen_and_swept(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    directory.write_bytes("chunks/a.parquet", b"whole")
    (tmp_path / "chunks/b.parquet.0123.tmp").write_bytes(b"half")

    assert directory.list_names("chunks") == ["a.parquet"]
    directory.sweep("")
    assert [path.name for path in (tmp_path / "chunks").iterdir()] == ["a.parquet"]


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is needed")

    with pytest.raises(OutputError, match=r"cannot write .*taken/x.json"):
        Directory(str(tmp_path)).write_bytes("taken/x.json", b"{}")


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 2)
    (tmp_path / "out").write_text("a file")

    with pytest.raises(OutputError, match=r"out cannot be used as a directory: it is a file; give another OUT"):
        pipeline.run(caption_config(archive, str(tmp_path / "out")))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense PAR1")

    with pytest.raises(OutputError, match=r"x.parquet is damaged"):
        Directory(str(tmp_path)).read_table("x.parquet")


class SilentFileSystem(fsspec.AbstractFileSystem):
    """A store whose client waits for ever."""

    protocol = "silent"
    at_end = threading.Event()

    def info(self, path: str, **kwargs: object) -> dict:
        self.at_end.wait()
        raise FileNotFoundError(path)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    SilentFileSystem.at_end.clear()
    fsspec.register_implementation("silent", SilentFileSystem, clobber=True)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]
    SilentFileSystem.at_end.set()


@pytest.mark.parametrize(
    "uri", ["gs://anonymous@bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http", "silent://bucket/x"]
)
def test_a_store_that_never_answers_is_an_error_soon(
    monkeypatch: pytest.MonkeyPatch, silent_port: int, uri: str
) -> None:
    monkeypatch.setattr(files, "CONNECT_SECONDS", 0.5)
    uri = uri.format(port=silent_port)

    with pytest.raises(NoAnswerError, match=r"://bucket/x did not answer within 0.5 s; check the address, the network"):
        files.open_filesystem(uri)

    monkeypatch.setattr(files, "CONNECT_SECONDS", 600.0)
    with pytest.raises(UsageError, match=r"://bucket/x"):  # at once
        files.open_filesystem(uri)


@pytest.mark.parametrize("where", ["SOURCE", "OUT"])
def test_a_command_ends_although_the_client_of_its_store_still_waits(
    tmp_path: Path, silent_port: int, where: str
) -> None:
    """The one of S3 would keep the process for a minute and a half."""
    uri = f"s3://key:secret@bucket/x?endpoint_override=127.0.0.1:{silent_port}&scheme=http&region=us-east-1"
    folder = str(make_folder(tmp_path / "archive", 2))
    words = [
        "caption",
        *((uri, str(tmp_path / "out")) if where == "SOURCE" else (folder, uri)),
        "--model",
        "fake",
        "--local",
    ]
    code = f"from captioner import files; files.CONNECT_SECONDS = 1; from ray_jobs.cli import main; main({words})"

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("captioner: error: s3://bucket/x did not answer within 1 s; check")


@pytest.mark.parametrize("uri", ["gs://anonymous@bucket/x?{at}", "s3://key:secret@bucket/x?{at}&region=us-east-1"])
def test_a_store_where_nobody_listens_is_an_error_soon(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setattr(files, "CONNECT_SECONDS", 2.0)

    with pytest.raises(UsageError, match=r"://bucket/x (did not answer within 2 s|cannot be opened: .*); check the"):
        files.open_filesystem(uri.format(at="endpoint_override=127.0.0.1:1&scheme=http"))


def test_an_out_that_would_be_lost_with_the_process_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = str(make_folder(tmp_path / "archive", 2))
    for command, model in (("caption", "fake"), ("train", "starter")):
        with pytest.raises(SystemExit) as ended:
            main([command, archive, "memory://bucket/out", "--model", model])

        assert ended.value.code == 1
        assert "memory:// is lost when the command ends; give an OUT on a disk" in capsys.readouterr().err
