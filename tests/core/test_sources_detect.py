"""What a source is taken for, and what in it is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import source_at

from captioner.config import CaptionConfig, settings_of
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
    return (
        ids,
        [name for listing in listings for name in listing.ignored],
        [note for listing in listings for note in listing.notes],
    )


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


@pytest.mark.parametrize("content", ["{}", "[]", "not JSON", '{"splits": 3}'])
def test_json_files_of_something_else_make_no_saved_dataset(tmp_path: Path, content: str) -> None:
    make_folder(tmp_path, 3)
    for name in ("state.json", "dataset_info.json", "dataset_dict.json"):
        (tmp_path / name).write_text(content)
    if "splits" in content:
        with pytest.raises(SourceError, match="cannot be loaded as a Hugging Face dataset"):
            source_at(tmp_path)
    else:
        assert isinstance(source_at(tmp_path), FolderSource)


def test_as_overrides(tmp_path: Path) -> None:
    make_folder(tmp_path, 3)
    make_tar(tmp_path / "x.tar", 2)

    assert isinstance(source_at(tmp_path, take_as="folder"), FolderSource)
    assert listed(tmp_path, take_as="tars")[0] == ["x.tar/000000.png", "x.tar/000001.png"]
    assert "--as tars" in describe(source_at(tmp_path, take_as="tars"))
    with pytest.raises(UsageError, match=r"--as parquet: .* holds none: it holds 1 tar, 3 image files"):
        source_at(tmp_path, take_as="parquet")
    with pytest.raises(UsageError, match="--as manifest"):
        source_at(make_parquet(tmp_path / "t.parquet", 1), take_as="manifest")


@pytest.mark.parametrize(("glob", "include"), [("*.png", "*.png"), ("[0]*2.png", "[0]*2.png"), ("**/*.png", "**.png")])
def test_a_glob_of_images_says_how_to_select_them(tmp_path: Path, glob: str, include: str) -> None:
    make_folder(tmp_path, 3)
    with pytest.raises(UsageError) as error:
        source_at(tmp_path / glob)
    assert f"a glob of images; give the folder {tmp_path} with --include '{include}'" in str(error.value)
    assert len(listed(tmp_path, include=[include])[0]) == (1 if "2" in glob else 3)


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
def test_what_cannot_be_listed_is_skipped_and_named(
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
    assert note.startswith("skipped")
    assert len(note) < 400
    assert listed(tmp_path, exclude=[f"{where}/*"]) == (ids, [], [])


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
def test_metadata_of_something_else_is_skipped_and_named(tmp_path: Path, name: str, data: bytes, where: str) -> None:
    make_folder(tmp_path / where, 3)
    (tmp_path / where / "metadata.jsonl").unlink()
    (tmp_path / where / name).write_bytes(data)

    ids, ignored, notes = listed(tmp_path)

    assert len(ids) == 3
    assert ignored == [where + name]
    (note,) = notes
    assert note.startswith("skipped, it holds no captions")
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


# Which kinds of source take a flag of the group; "-" is refused.
FLAGS_BY_KIND = """
                    folder  tars  parquet  dataset  manifest
include             +       +     +        +        +
exclude             +       +     +        +        +
split               -       +     +        +        +
image_column        -       -     +        +        +
id_column           -       -     +        +        +
reference_column    +       +     +        +        +
keep_columns        -       -     +        +        +
limit               +       +     +        +        +
pages               +       +     -        -        +
max_pixels          +       +     +        +        +
max_file_size       +       +     +        +        +
decode_timeout      +       +     +        +        +
"""
VALUES = {
    "include": ["*"],
    "exclude": ["x"],
    "split": "test",
    "image_column": "image",
    "id_column": "id",
    "reference_column": "captions",
    "keep_columns": ["id"],
    "limit": 1,
    "pages": "all",
    "max_pixels": 100,
    "max_file_size": 100,
    "decode_timeout": 1.0,
}


@pytest.fixture(scope="module")
def source_of_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source of each kind, in two splits where its files can have them."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("kinds")
    make_folder(root / "folder", 1)
    for split in ("train", "test"):
        make_tar(root / f"tars/{split}-0.tar", 1)
        make_parquet(root / f"parquet/{split}-0.parquet", 1)
    table = datasets.Dataset.from_parquet(str(root / "parquet/test-0.parquet"), split="test")
    datasets.DatasetDict(train=table, test=table).save_to_disk(str(root / "dataset"))
    for split in ("train", "test"):
        line = {"image": "../folder/000000.png", "id": split, "captions": ["a"]}
        (root / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
    return {kind: root / kind for kind in ("folder", "tars", "parquet", "dataset")} | {"manifest": root / "t*.jsonl"}


FLAGS = [s.field for s in settings_of(CaptionConfig) if s.group == "source" and not s.argument]


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag != "take_as"])
def test_a_flag_is_taken_or_refused_by_kind(source_of_kind: dict[str, Path], flag: str) -> None:
    header, *lines = FLAGS_BY_KIND.strip().splitlines()
    marks = {words[0]: dict(zip(header.split(), words[1:], strict=True)) for words in map(str.split, lines)}
    for kind, path in source_of_kind.items():
        if marks[flag][kind] == "+":
            source_at(path, **{flag: VALUES[flag]})
        else:
            with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} .* is a ") as error:
                source_at(path, **{flag: VALUES[flag]})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("take_as", ["folder", "tars", "parquet", "dataset", "manifest"])
def test_a_file_is_what_it_is_whatever_as_says(source_of_kind: dict[str, Path], take_as: str) -> None:
    for kind, path in {
        "tars": source_of_kind["tars"] / "test-0.tar",
        "parquet": source_of_kind["parquet"] / "test-0.parquet",
        "manifest": source_of_kind["tars"].parent / "test.jsonl",
    }.items():
        if kind == take_as:
            source_at(path, take_as=take_as)
        else:
            with pytest.raises(UsageError, match=f"--as {take_as}: .* is a"):
                source_at(path, take_as=take_as)
