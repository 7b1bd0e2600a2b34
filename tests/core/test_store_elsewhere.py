"""A table on something that is not a local disk: one PUT a file, the same promise."""

from pathlib import Path

import pytest
from helpers import caption_config, contents

from captioner import pipeline
from captioner.errors import OutputError
from captioner.store.directory import Directory
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import Killed, killed_at_write, make_folder


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

    with pytest.raises(OutputError, match=r"out cannot be used as a directory"):
        pipeline.run(caption_config(archive, str(tmp_path / "out")))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense PAR1")

    with pytest.raises(OutputError, match=r"x.parquet is damaged"):
        Directory(str(tmp_path)).read_table("x.parquet")
