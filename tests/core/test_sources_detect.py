"""What a source is taken for, and what in it is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import source_at

from captioner.errors import SourceError, UsageError
from captioner.sources import describe
from captioner.sources.folder import FolderSource
from captioner.sources.parquet import ParquetSource
from captioner.sources.webdataset import WebDatasetSource
from captioner.testing import make_folder, make_parquet, make_tar

FOREIGN = [
    "_SUCCESS",
    "_committed_123",
    "0.idx",
    "0.tar.crc",
    "LICENSE",
    "state.json",
    "dataset_info.json",
    "preview.png",
]


def listed(path: Path, **settings: object) -> tuple[list[str], list[str], list[str]]:
    """Image ids, what was ignored, notes."""
    source = source_at(path, **settings)
    listings = [listing for unit in source.units() for listing in source.list_unit(unit)]
    ids = [name for listing in listings for name in listing.rows["image_id"].to_pylist()]
    return ids, [name for one in listings for name in one.ignored], [note for one in listings for note in one.notes]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_source_is_what_most_of_it_is(tmp_path: Path, kind: str, foreign: str) -> None:
    for number in range(2):
        {"tar": make_tar, "parquet": make_parquet}[kind](tmp_path / f"sub/{number}.{kind}", 3, seed=number)
    (tmp_path / foreign).write_text("{}")

    source = source_at(tmp_path)

    assert isinstance(source, WebDatasetSource if kind == "tar" else ParquetSource)
    assert len(listed(tmp_path)[0]) == 6
    assert "it holds 2" in describe(source)


@pytest.mark.parametrize("foreign", ["a.tar", "a.parquet", "state.json", "dataset_info.json"])
def test_a_folder_of_images_is_one_whatever_lies_in_it(tmp_path: Path, foreign: str) -> None:
    make_folder(tmp_path, 3)
    (tmp_path / foreign).write_bytes(b"{}")

    assert isinstance(source_at(tmp_path), FolderSource)
    assert [name for name in listed(tmp_path)[0] if name != foreign] == [f"{n:06d}.png" for n in range(3)]


def test_as_overrides(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    make_tar(tmp_path / "x.tar", 2)

    assert isinstance(source_at(tmp_path, take_as="folder"), FolderSource)
    assert listed(tmp_path, take_as="tars")[0] == ["x.tar/000000.png", "x.tar/000001.png"]
    assert "--as tars" in describe(source_at(tmp_path, take_as="tars"))
    with pytest.raises(UsageError, match=r"--as parquet: .* holds none: it holds 1 tars, 3 images"):
        source_at(tmp_path, take_as="parquet")
    with pytest.raises(UsageError, match="--as manifest"):
        source_at(make_parquet(tmp_path / "t.parquet", 1), take_as="manifest")


def make_deep(folder: Path) -> None:
    """A path of more than 4,096 bytes, which no system call takes, with a file in it."""
    folder.mkdir()
    parent = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=parent)
        child = os.open("n" * 250, os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(os.open("deep.png", os.O_CREAT | os.O_WRONLY, dir_fd=parent))
    os.close(parent)


@pytest.mark.parametrize("kind", ["refused", "deep"])
@pytest.mark.parametrize("where", ["bad", "sub/bad"])
def test_what_cannot_be_listed_is_passed_over_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, where: str
) -> None:
    make_folder(tmp_path, 3)
    make_folder(tmp_path / "sub", 3)
    scandir = os.scandir
    if kind == "deep":
        make_deep(tmp_path / where)
    else:
        (tmp_path / where).mkdir()

        def refusing(path: bytes):
            if bytes(path).endswith(b"/bad"):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)

    ids, ignored, notes = listed(tmp_path)

    assert len(ids) == 6
    assert any(name.startswith(f"{where}/") for name in ignored)
    (note,) = notes
    assert note.startswith("passed over")
    assert len(note) < 400
    assert listed(tmp_path, exclude=[f"{where}/*"]) == (ids, ["metadata.jsonl", "sub/metadata.jsonl"], [])


def test_a_source_that_cannot_be_listed_itself_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path, 3)

    def refusing(path: bytes):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(SourceError, match="cannot be listed: Permission denied"):
        source_at(tmp_path)


FOREIGN_METADATA = {
    "metadata.csv": b"patient,folder\n1,images\n",
    "metadata.jsonl": b'{"name": "a"}\n',
    "metadata.parquet": b"PAR1 but damaged",
}
FOREIGN_LINES = {"metadata.csv": b"a,b\n1,2,3\n4\n", "metadata.jsonl": b"not JSON at all\n"}


@pytest.mark.parametrize(("name", "data"), [*FOREIGN_METADATA.items(), *FOREIGN_LINES.items()])
@pytest.mark.parametrize("where", ["", "sub/deeper/"])
def test_metadata_of_something_else_is_passed_over_and_named(
    tmp_path: Path, name: str, data: bytes, where: str
) -> None:
    make_folder(tmp_path / where, 3)
    (tmp_path / where / "metadata.jsonl").unlink()
    (tmp_path / where / name).write_bytes(data)

    ids, ignored, notes = listed(tmp_path)

    assert len(ids) == 3
    assert ignored == [where + name]
    (note,) = notes
    assert note.startswith("passed over, it holds no captions")
    assert f"{where}{name}" in note
    assert listed(tmp_path, exclude=[where + name])[2] == []


def test_our_own_metadata_that_is_broken_is_still_an_error(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("{")

    with pytest.raises(SourceError, match="line 4 is not JSON"):
        listed(tmp_path)


def test_excluded_tars_and_tables_are_not_opened(tmp_path: Path) -> None:
    make_tar(tmp_path / "good.tar", 2)
    (tmp_path / "bad.tar").write_bytes(json.dumps({"no": "tar"}).encode() * 100)

    ids, _, notes = listed(tmp_path, exclude=["bad.tar/*"])

    assert ids == ["good.tar/000000.png", "good.tar/000001.png"]
    assert notes == []
