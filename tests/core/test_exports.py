"""Exports: which texts go out, each form read back, nothing half-written."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import pipeline
from captioner.config import AltTextConfig, ExportConfig, SourceConfig
from captioner.errors import CaptionerError, OutputError
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.publishing.exports.coco import coco_id
from captioner.publishing.exports.command import FORMATS, export_texts
from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import relative_path
from captioner.publishing.exports.originals import Originals
from captioner.publishing.exports.select import CHOSEN_SCHEMA, PROVENANCE, Tally
from captioner.publishing.exports.spreadsheet import safe_cell
from captioner.sources import open_source
from captioner.store.journal import Decision, Journal, Review
from captioner.store.table import CaptionsTable, open_table
from captioner.testing import make_folder, make_tar
from ray_jobs.cli import main

WRITTEN = '=1+1 is "written" by a person, <i>&</i> ends'
MARK = "(automatic description)"
STATUSES = {0: "approved", 1: "approved", 2: "edited", 3: "decorative", 4: "rejected", 5: "expert", 6: "skipped"}


def captioned(archive: Path, out: Path) -> CaptionsTable:
    """A finished table of the archive in parts of 16, with alt texts."""
    pipeline.run(caption_config(archive, out))
    table = open_table(str(out))
    make_alt_texts(table, AltTextConfig(language="en"))
    return table


def decide(table: CaptionsTable, decision: Decision, image_ids: list[str], text: str | None = None) -> None:
    with Journal(table.directory, "Ada") as journal:
        journal.append(Review(decision, tuple(image_ids), text, "Ada"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with archive/ and out/: 40 images, decisions of every kind about the first ones."""
    home = tmp_path_factory.mktemp("exports")
    table = captioned(make_folder(home / "archive", 40), home / "out")
    for number, status in STATUSES.items():
        text = {"edited": WRITTEN, "decorative": ""}.get(status)
        decide(table, status, [f"{number:06d}.png"], text)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """The same with paths of its own, for tests that change archive or reviews."""
    shutil.copytree(finished, tmp_path / "home")
    info = json.loads((tmp_path / "home/out/table.json").read_text())
    info["source"]["path"] = str(tmp_path / "home/archive")
    (tmp_path / "home/out/table.json").write_text(json.dumps(info))
    for part in (tmp_path / "home/out/captions").iterdir():
        rows = pq.read_table(part)
        uris = pc.replace_substring(rows["uri"], str(finished), str(tmp_path / "home"))
        pq.write_table(rows.set_column(1, rows.schema.field("uri"), uris), part)
    return tmp_path / "home"


def export(home: Path, to: str, dest: Path | None, **settings: Any) -> Tally:
    path = "" if dest is None else str(dest)
    return export_texts(open_table(str(home / "out")), ExportConfig(to=to, path=path, **settings))


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_damaged_lines_of_review_journals_are_counted(home: Path, tmp_path: Path) -> None:
    (journal,) = (home / "out/reviews").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0][:20] + b"\n", *lines[1:], b"\x00\xff\n"]))

    tally = export(home, "jsonl", tmp_path / "texts.jsonl")

    assert sum(tally.written.values()) == 3
    assert tally.left_out["damaged lines of the review journals, and the decisions in them"] == 2


def test_only_what_a_person_let_pass_goes_out(finished: Path, tmp_path: Path) -> None:
    tally = export(finished, "jsonl", tmp_path / "texts.jsonl")

    rows = {row["image_id"]: row for row in lines_of(tmp_path / "texts.jsonl")}
    assert {name: row["review_status"] for name, row in rows.items()} == {
        "000000.png": "approved",
        "000001.png": "approved",
        "000002.png": "edited",
        "000003.png": "decorative",
    }
    assert [rows[name]["text_by"] for name in sorted(rows)] == ["machine", "machine", "person", "person"]
    assert rows["000002.png"]["alt_text"] == WRITTEN
    assert sum(tally.left_out.values()) == 36
    for row in rows.values():
        assert (row["model"], row["reviewer"], row["language"]) == ("fake", "Ada", "en")
        assert row["run_id"]
        assert row["created_at"].startswith("20")


@pytest.mark.parametrize(("to", "name"), [("xmp", "XMP"), ("coco", "COCO"), ("imagefolder", "ImageFolder")])
def test_a_decorative_image_is_left_out_where_the_format_cannot_say_so(
    finished: Path, tmp_path: Path, to: str, name: str
) -> None:
    tally = export(finished, to, tmp_path / "out")

    assert tally.left_out[f"decorative, which {name} cannot express"] == 1


def test_unreviewed_texts_are_marked_and_rejected_ones_never_go_out(finished: Path, tmp_path: Path) -> None:
    export(finished, "jsonl", tmp_path / "texts.jsonl", include_unreviewed=True, automatic_mark="[machine]")

    rows = lines_of(tmp_path / "texts.jsonl")
    assert len(rows) == 38
    assert {row["review_status"] for row in rows} == {"approved", "edited", "decorative", "unreviewed"}
    assert all(row["alt_text"].endswith(" [machine]") == (row["review_status"] == "unreviewed") for row in rows)


def test_parquet_holds_the_same_rows_as_jsonl(finished: Path, tmp_path: Path) -> None:
    export(finished, "parquet", tmp_path / "texts.parquet", include_unreviewed=True)
    export(finished, "jsonl", tmp_path / "texts.jsonl", include_unreviewed=True)

    table = pq.read_table(tmp_path / "texts.parquet")
    assert table.schema.equals(CHOSEN_SCHEMA)
    assert table["alt_text"].to_pylist() == [row["alt_text"] for row in lines_of(tmp_path / "texts.jsonl")]


def test_csv_is_read_back_and_starts_no_formula(finished: Path, tmp_path: Path) -> None:
    export(finished, "csv", tmp_path / "texts.csv")

    assert (tmp_path / "texts.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # by which Excel knows UTF-8
    with (tmp_path / "texts.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}
    assert rows["000002.png"]["alt_text"] == f"'{WRITTEN}"
    assert rows["000003.png"]["alt_text"] == ""
    assert set(PROVENANCE) <= set(rows["000000.png"])
    assert not (tmp_path / "texts.csv.provenance.jsonl").exists()


@given(st.text())
def test_no_cell_is_a_formula(text: str) -> None:
    cell = safe_cell(text)

    assert cell in (text, f"'{text}")
    assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


def test_chosen_columns_keep_their_provenance_beside(finished: Path, tmp_path: Path) -> None:
    export(finished, "csv", tmp_path / "texts.csv", columns=["Datei=file_name", "alt_text"])

    assert (tmp_path / "texts.csv").read_text("utf-8-sig").splitlines()[0] == "Datei,alt_text"
    origins = lines_of(tmp_path / "texts.csv.provenance.jsonl")
    assert [set(PROVENANCE) <= set(origin) for origin in origins] == [True] * 4


def test_presets_of_publishing_systems(finished: Path, home: Path, tmp_path: Path) -> None:
    import hashlib

    decide(open_table(str(home / "out")), "edited", ["000001.png"], "x" * 256)

    export(finished, "csv", tmp_path / "wordpress.csv", preset="wordpress")
    tally = export(home, "csv", tmp_path / "wagtail.csv", preset="wagtail")

    assert (tmp_path / "wordpress.csv").read_text().splitlines()[0] == "filename,alt_text"
    with (tmp_path / "wagtail.csv").open(newline="") as file:
        rows = {row["filename"]: row for row in csv.DictReader(file)}
    image = (finished / "archive/000002.png").read_bytes()
    assert rows["000002.png"]["file_hash"] == hashlib.sha1(image).hexdigest()
    assert [name for name, _ in tally.problems] == ["000001.png"]
    assert sorted(rows) == ["000000.png", "000002.png", "000003.png"]


def test_coco_is_a_dataset_of_images_and_annotations(finished: Path, tmp_path: Path) -> None:
    export(finished, "coco", tmp_path / "captions")

    dataset = json.loads((tmp_path / "captions.json").read_text(encoding="utf-8"))
    images = {image["id"]: image for image in dataset["images"]}
    captions = {
        images[annotation["image_id"]]["file_name"]: annotation["caption"] for annotation in dataset["annotations"]
    }
    assert set(dataset) == {"info", "licenses", "images", "annotations"}
    assert all(isinstance(image_id, int) for image_id in images)
    assert len({annotation["id"] for annotation in dataset["annotations"]}) == len(images) == 3
    assert captions["000002.png"] == WRITTEN
    assert {(image["width"], image["height"]) for image in images.values()} == {(64, 64)}


def test_coco_ids_are_the_numbers_of_coco_names_and_unique(finished: Path, tmp_path: Path) -> None:
    names = [
        "train/000000391895.jpg",
        "val/000000391895.jpg",
        "cat.jpg",
        "COCO_val2014_000000000001.jpg",
        "999999999999.jpg",
    ]
    row = dict.fromkeys(CHOSEN_SCHEMA.names) | {"alt_text": "x", "flags": []}
    texts = iter([pa.Table.from_pylist([row | {"image_id": name} for name in names])])
    settings = ExportConfig(to="coco", path=str(tmp_path / "captions.json"))
    originals = Originals(open_table(str(finished / "out")))
    FORMATS["coco"].write(texts, Export(tmp_path / "captions.json", settings, Tally(), originals, lambda: iter(()), {}))

    ids = [image["id"] for image in json.loads((tmp_path / "captions.json").read_text())["images"]]
    assert (ids[0], ids[3], ids[4]) == (391895, 1, 999999999999)
    assert len(set(ids)) == 5


def test_coco_results_are_a_list_of_captions(finished: Path, tmp_path: Path) -> None:
    export(finished, "coco", tmp_path / "results.json", coco_results=True)

    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["image_id"] for result in results] == ["000000.png", "000001.png", "000002.png"]
    assert results[2]["caption"] == WRITTEN
    assert coco_id("val2014/COCO_val2014_000000391895.jpg") == 391895


def test_text_files_named_like_the_images(finished: Path, tmp_path: Path) -> None:
    export(finished, "txt", tmp_path / "texts")

    assert (tmp_path / "texts/000002.txt").read_text() == WRITTEN + "\n"
    assert sorted(file.name for file in (tmp_path / "texts").glob("*.txt")) == [
        "000000.txt",
        "000001.txt",
        "000002.txt",
    ]
    assert len(lines_of(tmp_path / "texts/captioner-provenance.jsonl")) == 3


@pytest.mark.parametrize(
    ("existing", "wanted"),
    [("skip", "mine"), ("overwrite", WRITTEN + "\n"), ("append", f"mine\n{WRITTEN}\n")],
)
def test_text_files_beside_the_originals(home: Path, existing: str, wanted: str) -> None:
    (home / "archive/000002.txt").write_text("mine")

    export(home, "txt", None, beside_originals=True, existing=existing)
    export(home, "txt", None, beside_originals=True, existing=existing)

    assert (home / "archive/000002.txt").read_text() == wanted
    assert (home / "archive/000000.txt").exists()


def provenance_beside(home: Path) -> list[dict[str, Any]]:
    return lines_of(home / "out/exports/captioner-provenance.jsonl")


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
def test_text_files_beside_the_originals_keep_their_provenance(home: Path, existing: str) -> None:
    export(home, "txt", None, beside_originals=True, existing=existing)
    first = provenance_beside(home)
    export(home, "txt", None, beside_originals=True, existing=existing)

    assert len(first) == 3
    assert provenance_beside(home) == first


KILLED_AT_RENAME = """
import os, signal, sys
from pathlib import Path
from captioner.config import ExportConfig
from captioner.publishing.exports.command import export_texts
from captioner.store.table import open_table

renames = 0
real = os.replace

def replace(*paths):
    global renames
    renames += 1
    if renames == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)

os.replace = replace
export_texts(open_table(sys.argv[1]), ExportConfig(to="txt", beside_originals=True, existing="overwrite"))
"""


def test_text_files_whose_export_was_killed_at_any_of_them_have_a_line_each_and_foreign_ones_none(home: Path) -> None:
    (home / "archive/000002.txt").write_text("mine")
    for number in range(1, 10):
        words = [str(home / "out"), str(number)]
        killed = subprocess.run([sys.executable, "-c", KILLED_AT_RENAME, *words])
        export(home, "txt", None, beside_originals=True)
        written = [file for file in sorted((home / "archive").glob("*.txt")) if file.read_text() != "mine"]
        assert sorted(line["path"] for line in provenance_beside(home)) == list(map(str, written))
        assert all(Path(line["path"]).read_text() == line["alt_text"] + "\n" for line in provenance_beside(home))
        for file in written:
            file.unlink()
        if not killed.returncode:
            break
        assert killed.returncode == -signal.SIGKILL

    assert number == 6  # of the lines before and after, and of three texts


def test_a_text_that_was_rejected_later_is_taken_back(home: Path) -> None:
    export(home, "txt", None, beside_originals=True)
    (home / "archive/000001.txt").write_text("changed by somebody\n")
    decide(open_table(str(home / "out")), "rejected", ["000000.png", "000001.png"])

    tally = export(home, "txt", None, beside_originals=True, update=True, existing="overwrite")

    assert not (home / "archive/000000.txt").exists()
    assert (home / "archive/000001.txt").exists()
    assert [Path(line["path"]).name for line in provenance_beside(home)] == ["000001.txt", "000002.txt"]
    assert tally.withdrawn == 1


def test_imagefolder_loads_with_datasets(finished: Path, tmp_path: Path) -> None:
    import datasets

    export(finished, "imagefolder", tmp_path / "data")

    loaded = datasets.load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    rows = {row["image_id"]: row for row in loaded}
    assert set(rows) == {"000000.png", "000001.png", "000002.png"}
    assert rows["000002.png"]["text"] == WRITTEN
    assert rows["000002.png"]["image"].size == Image.open(finished / "archive/000002.png").size
    card = (tmp_path / "data/README.md").read_text()
    assert "- en" in card
    assert "| edited | 1 |" in card


def test_webdataset_is_read_by_our_own_source(finished: Path, tmp_path: Path) -> None:
    export(finished, "webdataset", tmp_path / "shards")

    source = open_source(SourceConfig(path=str(tmp_path / "shards")))
    (listing,) = source.list_unit(source.units()[0])
    assert listing.rows["reference_captions"].to_pylist()[2] == [WRITTEN]
    raws = source.read(listing.rows)
    assert [raw.data for raw in raws] == [(finished / f"archive/{n:06d}.png").read_bytes() for n in range(3)]


def test_an_image_that_has_gone_is_counted_and_named(home: Path, tmp_path: Path) -> None:
    (home / "archive/000001.png").unlink()

    tally = export(home, "imagefolder", tmp_path / "data")

    assert tally.problems == [("000001.png", "image cannot be read: not_found")]
    assert [row["image_id"] for row in lines_of(tmp_path / "data/metadata.jsonl")] == ["000000.png", "000002.png"]
    assert sorted(file.name for file in (tmp_path / "data").glob("*.png")) == ["000000.png", "000002.png"]


def test_an_archive_that_has_gone_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    shutil.rmtree(home / "archive")

    with pytest.raises(CaptionerError, match="archive"):
        export(home, "webdataset", tmp_path / "made/shards")

    assert list((tmp_path / "made").iterdir()) == []


def test_images_of_a_tar_keep_their_names_apart(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", 3)
    table = captioned(tmp_path / "a.tar", tmp_path / "out")

    export_texts(table, ExportConfig(to="imagefolder", path=str(tmp_path / "data"), include_unreviewed=True))

    assert len(list((tmp_path / "data").rglob("*.png"))) == 3


@pytest.mark.parametrize("to", sorted(set(FORMATS) - {"html", "xmp", "txt", "hub"}))
def test_dest_that_is_there_is_an_error_and_update_refreshes_it(finished: Path, tmp_path: Path, to: str) -> None:
    dest = tmp_path / "dest"
    export(finished, to, dest)
    with pytest.raises(OutputError, match="--update"):
        export(finished, to, dest)

    export(finished, to, dest, update=True, include_unreviewed=True)

    assert [path.name for path in tmp_path.iterdir() if "captioner-" in path.name] == []


def test_update_replaces_no_folder_of_somebody_else(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")

    with pytest.raises(OutputError, match="not an earlier export"):
        export(finished, "webdataset", tmp_path / "mine", update=True)

    assert (tmp_path / "mine/thesis.txt").exists()


@pytest.mark.parametrize("to", ["jsonl", "imagefolder"])
def test_killed_in_the_middle_it_leaves_no_dest_and_can_be_run_again(finished: Path, tmp_path: Path, to: str) -> None:
    code = f"""
import os, signal
from captioner.config import ExportConfig
from captioner.publishing.exports import imagefolder, lines
from captioner.publishing.exports.command import run

def killing(write_line, count=[0]):
    def wrapper(file, value):
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write_line(file, value)
    return wrapper

lines.write_line, imagefolder.write_line = killing(lines.write_line), killing(imagefolder.write_line)
run({str(finished / "out")!r}, ExportConfig(to={to!r}, path={str(tmp_path / "dest")!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("dest*"))

    export(finished, to, tmp_path / "dest")

    assert [path.stem for path in tmp_path.iterdir()] == ["dest"]


def test_what_a_killed_refresh_took_away_comes_back(home: Path, tmp_path: Path) -> None:
    dest = tmp_path / "shards"
    export(home, "webdataset", dest)
    os.rename(dest, tmp_path / ".shards.captioner-old")  # the moment between its two renames
    shutil.rmtree(home / "archive")

    with pytest.raises(CaptionerError, match="archive"):
        export(home, "webdataset", dest, update=True)

    assert (dest / "00000.tar").exists()


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    table = captioned(make_folder(tmp_path / "archive", 3), tmp_path / "out")

    with pytest.raises(OutputError, match="3 not reviewed"):
        export_texts(table, ExportConfig(to="csv", path=str(tmp_path / "texts.csv")))

    assert not (tmp_path / "texts.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dest"], "no format given"),
        (["--to", "csv"], "no DEST given"),
        (["s3://bucket/x", "--to", "csv"], "to a local disk"),
        (["dest", "--to", "csv", "--approved-only", "--include-unreviewed"], "exclude each other"),
        (["dest", "--to", "csv", "--columns", "a=b"], "--columns a=b"),
        (["dest", "--to", "csv", "--columns", "uri", "--preset", "wagtail"], "exclude each other"),
        (["dest", "--to", "coco", "--embed"], "--embed: does not apply to --to coco"),
        (["dest", "--to", "csv", "--coco-results"], "--coco-results: does not apply to --to csv"),
        (["dest", "--to", "xmp", "--beside-originals"], "exclude each other"),
        (["dest", "--to", "html"], "--html-dir"),
        (["dest", "--to", "csv", "--automatic-mark", ""], "--automatic-mark"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(finished / "out"), *words])

    shown = capsys.readouterr().err
    assert ended.value.code == 1
    assert message in shown
    assert shown.count("\n") == 1


def test_a_dry_run_counts_and_writes_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(finished / "out"), str(tmp_path / "dest"), "--to", "webdataset", "--dry-run"])

    shown = capsys.readouterr()
    assert "3 texts would be exported" in shown.out
    assert "1 rejected" in shown.err
    assert list(tmp_path.iterdir()) == []


@given(st.text())
def test_a_name_stays_inside(image_id: str) -> None:
    path = relative_path(image_id)

    assert not path.is_absolute()
    assert ".." not in path.parts
    assert all(part and "\0" not in part and len(part.encode()) <= 255 for part in path.parts)


@pytest.mark.parametrize("to", ["csv", "jsonl", "coco", "parquet", "txt", "xmp"])
def test_texts_stream(finished: Path, tmp_path: Path, to: str) -> None:
    """At no time is more than two tables of the stream alive, however many there are."""
    table = open_table(str(finished / "out"))
    row = dict.fromkeys(CHOSEN_SCHEMA.names) | dict.fromkeys(
        ["uri", "alt_text", "caption", "text_by", "model", "model_sha256", "run_id"], "x"
    )
    row |= {"flags": [], "review_status": "approved", "reviewer": "Ada"}
    most = 0

    def stream() -> Iterator[pa.Table]:
        nonlocal most
        alive: list[weakref.ref] = []
        for number in range(30):
            chosen = pa.Table.from_pylist(
                [row | {"image_id": f"{number}-{n}", "created_at": 0} for n in range(20)], CHOSEN_SCHEMA
            )
            alive = [ref for ref in alive if ref() is not None] + [weakref.ref(chosen)]
            most = max(most, len(alive))
            yield chosen
            del chosen

    settings = ExportConfig(to=to, path=str(tmp_path / "dest"))
    FORMATS[to].write(
        stream(), Export(tmp_path / "dest", settings, Tally(), Originals(table), lambda: iter(()), {"to": to})
    )

    assert (tmp_path / "dest").exists()
    assert most <= 2
