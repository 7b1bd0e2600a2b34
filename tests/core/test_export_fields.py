"""Columns of the table as texts of exports and alt texts, words for training sets, and the upload to the hub."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from helpers import caption_config
from PIL import Image

from captioner import pipeline
from captioner.config import AltTextConfig, ExportConfig
from captioner.errors import OutputError, UsageError
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.publishing.alt_text.texts import read_texts
from captioner.publishing.exports import hub_dataset
from captioner.publishing.exports.command import export_texts
from captioner.publishing.exports.select import Tally
from captioner.store.journal import Decision, Journal, Review
from captioner.store.table import CaptionsTable, open_table

COUNT, PREFIX, SUFFIX = 8, "zwx style, ", ", rendered"
TITLES = ["A title", "Another", None, "  ", "Fifth", "Sixth", "Seventh", "Eighth"]


@pytest.fixture
def table(tmp_path: Path) -> CaptionsTable:
    """A table whose source has titles, two of them blank, and lists of tags; its alt texts are not made."""
    images = []
    for number in range(COUNT):
        data = io.BytesIO()
        Image.fromarray(np.full((20, 30, 3), 20 * number, np.uint8)).save(data, "PNG")
        images.append({"bytes": data.getvalue(), "path": f"{number}.png"})
    columns = {
        "image": pa.array(images),
        "id": [f"image {number}" for number in range(COUNT)],
        "title": pa.array(TITLES, pa.string()),
        "tags": [["red", f"tag {number}"] for number in range(COUNT - 1)] + [["red", None, "last"]],
        "score": [number / 4 for number in range(COUNT - 1)] + [math.nan],
        "box": pa.array([{"x": 1}] * COUNT),
    }
    pq.write_table(pa.table(columns), tmp_path / "source.parquet")
    source = {"id_column": "id", "keep_columns": ["title", "tags", "score", "box"]}
    pipeline.run(caption_config(tmp_path / "source.parquet", tmp_path / "out", source=source))
    return open_table(str(tmp_path / "out"))


def decide(table: CaptionsTable, decision: Decision, number: int, text: str | None = None) -> None:
    with Journal(table.directory, "Ada") as journal:
        journal.append(Review(decision, (f"image {number}",), text, "Ada"))


def export(table: CaptionsTable, to: str, dest: Path | str, **settings: Any) -> Tally:
    return export_texts(
        table, ExportConfig.model_validate({"to": to, "path": str(dest), "include_unreviewed": True, **settings})
    )


def texts_in(file: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["image_id"]: row["alt_text"] for row in rows}


def test_a_column_is_exported_as_it_is_and_what_lacks_in_it_is_named(table: CaptionsTable, tmp_path: Path) -> None:
    tally = export(table, "jsonl", tmp_path / "titles.jsonl", field="title")
    export(table, "jsonl", tmp_path / "tags.jsonl", field="tags")
    of_scores = export(table, "jsonl", tmp_path / "scores.jsonl", field="score")

    titles = {f"image {number}": title for number, title in enumerate(TITLES) if title and title.strip()}
    assert texts_in(tmp_path / "titles.jsonl") == titles
    assert tally.left_out == {"without a value in title": 2}
    assert tally.problems == [(f"image {number}", "without a value in title") for number in (2, 3)]
    assert texts_in(tmp_path / "tags.jsonl")["image 3"] == "red, tag 3"
    assert texts_in(tmp_path / "tags.jsonl")["image 7"] == "red, last"
    assert texts_in(tmp_path / "scores.jsonl")["image 3"] == "0.75"
    assert of_scores.problems == [("image 7", "without a value in score")]


def test_alt_texts_of_a_column_are_reviewed_and_exported(table: CaptionsTable, tmp_path: Path) -> None:
    counts = make_alt_texts(table, AltTextConfig(field="title"))
    decide(table, "edited", 0, "A better title.")
    decide(table, "rejected", 1)

    export(table, "jsonl", tmp_path / "alt.jsonl")
    export(table, "jsonl", tmp_path / "titles.jsonl", field="title")
    export(table, "jsonl", tmp_path / "captions.jsonl", field="caption")

    assert (counts.num_texts, counts.num_without) == (6, 2)
    alt, titles, captions = (texts_in(tmp_path / f"{name}.jsonl") for name in ("alt", "titles", "captions"))
    assert alt["image 0"] == titles["image 0"] == "A better title."
    assert alt["image 4"] == "Fifth."  # from the source: no model wrote it
    assert captions["image 4"].startswith("picture ")
    assert titles["image 4"] == "Fifth"
    assert captions["image 0"].startswith("picture ")  # the decision was about the title
    assert "image 1" not in {**alt, **titles, **captions}
    assert len(captions) == COUNT - 1
    assert {text for rows in read_texts(table) for text in rows["alt_text"].to_pylist()} >= {"Another.", "Fifth."}


def test_an_image_without_a_caption_has_no_text_of_another_column_either(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (20, 30)).save(picture, "PNG")
    images = pa.array([{"bytes": data, "path": "x.png"} for data in (b"no image", picture.getvalue())])
    pq.write_table(pa.table({"image": images, "id": ["bad", "good"], "title": ["One", "Two"]}), tmp_path / "s.parquet")
    source = {"id_column": "id", "keep_columns": ["title"]}
    pipeline.run(caption_config(tmp_path / "s.parquet", tmp_path / "out", source=source))
    table = open_table(str(tmp_path / "out"))

    counts = make_alt_texts(table, AltTextConfig(field="title"))
    tally = export(table, "xmp", tmp_path / "xmp")
    of_titles = export(table, "jsonl", tmp_path / "titles.jsonl", field="title")

    assert (counts.num_texts, counts.num_without) == (1, 1)
    assert tally.problems == [("bad", "without a caption or a value in title")]
    assert of_titles.problems == [("bad", "without a caption")]
    assert of_titles.left_out == {"without a caption": 1}
    assert texts_in(tmp_path / "titles.jsonl").keys() == {"good"}


def test_texts_that_came_with_the_source_are_not_said_to_be_a_models(table: CaptionsTable, tmp_path: Path) -> None:
    make_alt_texts(table, AltTextConfig(field="title"))
    decide(table, "approved", 0, "A title.")
    decide(table, "edited", 1, "A better title.")

    export(table, "jsonl", tmp_path / "alt.jsonl")
    export(table, "csv", tmp_path / "titles.csv", field="title")
    export(table, "xmp", tmp_path / "xmp", field="title")
    export(table, "jsonl", tmp_path / "captions.jsonl", field="caption")

    rows = [json.loads(line) for line in (tmp_path / "alt.jsonl").read_text().splitlines()]
    assert [row["text_by"] for row in rows] == ["source", "person", *["source"] * 4]
    assert {row["model"] for row in rows} == {row["model_sha256"] for row in rows} == {None}
    with (tmp_path / "titles.csv").open(encoding="utf-8-sig", newline="") as file:
        cells = {row["image_id"]: (row["alt_text"], row["text_by"], row["model"]) for row in csv.DictReader(file)}
    assert cells["image 4"] == ("Fifth", "source", "")
    packets = [(tmp_path / "xmp" / f"image {number}.xmp").read_text() for number in (0, 1, 4)]
    assert not any("captioner:Model" in packet or "automatic" in packet for packet in packets)
    for packet, writer in zip(
        packets,
        ("Source (approved by Ada)", "Ada (edited; first text from the source)", "Source (unreviewed)"),
        strict=True,
    ):
        assert f">{writer}<" in packet or f'"{writer}"' in packet
    captions = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert {(row["text_by"], row["model"]) for row in captions} == {("machine", "fake")}


@pytest.mark.parametrize("to", ["txt", "jsonl", "coco", "imagefolder", "webdataset", "parquet"])
def test_trigger_words_are_in_every_form_of_training_set(table: CaptionsTable, tmp_path: Path, to: str) -> None:
    export(table, to, tmp_path / "dest", field="title", prefix=PREFIX, suffix=SUFFIX)

    (written,) = tmp_path.glob("dest*")
    files = [written] if written.is_file() else [file for file in written.rglob("*") if file.is_file()]
    if to == "parquet":
        texts = pq.read_table(written)["alt_text"].to_pylist()
        assert texts == [f"{PREFIX}{title}{SUFFIX}" for title in TITLES if title and title.strip()]
    else:
        assert f"{PREFIX}Fifth{SUFFIX}".encode() in b"\n".join(file.read_bytes() for file in files)


def test_words_are_added_after_the_mark_of_texts_nobody_reviewed(table: CaptionsTable, tmp_path: Path) -> None:
    make_alt_texts(table, AltTextConfig())
    decide(table, "approved", 5, "Sixth.")
    decide(table, "decorative", 6, "")

    export(table, "jsonl", tmp_path / "texts.jsonl", prefix=PREFIX, suffix=SUFFIX)

    texts = texts_in(tmp_path / "texts.jsonl")
    assert re.fullmatch(f"{PREFIX}Picture .*[.] [(]automatic description[)]{SUFFIX}", texts["image 4"])
    assert texts["image 5"] == f"{PREFIX}Sixth.{SUFFIX}"
    assert texts["image 6"] == ""


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"field": "titel"}, "--field titel: the table has no such column; did you mean title"),
        ({"field": "qqq"}, "--field qqq: the table has no such column; columns of text are image_id, .*title, tags"),
        ({"field": "box"}, "--field box: holds struct<x: int64>, which is not text"),
        ({"to": "csv", "prefix": "x"}, "--prefix: does not apply to --to csv"),
        ({"to": "hub", "path": "data"}, "DEST data: with --to hub name a repository, OWNER/NAME"),
        ({"to": "hub", "path": "someone/data"}, "--to hub: HF_HUB_OFFLINE is set, so nothing can be uploaded"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    table: CaptionsTable, tmp_path: Path, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=reason):
        export(table, **{"to": "jsonl", "dest": settings.pop("path", tmp_path / "dest"), **settings})


class Hub:
    """Stands in for huggingface_hub.HfApi: keeps what it is sent, as the hub does."""

    def __init__(self, breaks_at: str = "", token: str = "") -> None:
        self.breaks_at, self.token = breaks_at, token
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded, and in no commit yet, by sha256
        self.sent: list[str] = []
        self.files: dict[str, bytes] = {}
        self.commits = 0

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert (repo_type, exist_ok) == ("dataset", True)
        self.private.setdefault(repo_id, private)

    def list_repo_files(self, repo_id: str, *, repo_type: str) -> list[str]:
        return [".gitattributes", *self.files]

    def preupload_lfs_files(self, repo_id: str, *, repo_type: str, additions: list[Any]) -> None:
        for addition in additions:
            if addition.path_in_repo == self.breaks_at:
                raise ConnectionError(f"the connection broke\nBearer {self.token}")
            sha256 = addition.upload_info.sha256.hex()
            if sha256 not in self.blobs:
                self.sent.append(addition.path_in_repo)
                self.blobs[sha256] = Path(addition.path_or_fileobj).read_bytes()
            addition.path_or_fileobj = b""

    def create_commit(self, repo_id: str, *, repo_type: str, operations: list[Any], commit_message: str) -> None:
        self.commits += 1
        for operation in operations:
            if isinstance(operation, huggingface_hub.CommitOperationDelete):
                del self.files[operation.path_in_repo]
            else:
                blob = self.blobs.get(operation.upload_info.sha256.hex())
                self.files[operation.path_in_repo] = blob or bytes(operation.path_or_fileobj)


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub stands in; shards are small, so that there are several."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_dataset, "SHARD_BYTES", 1)
    monkeypatch.setattr(hub_dataset, "GROUP_ROWS", 3)


def push(table: CaptionsTable, api: Hub, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Tally:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return export(table, "hub", "someone/data", **{"field": "title", "prefix": PREFIX, **settings})


@pytest.mark.usefixtures("connected")
def test_table_and_images_become_a_private_dataset_of_the_hub(
    table: CaptionsTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Hub()
    push(table, api, monkeypatch)

    assert (api.private, api.commits) == ({"someone/data": True}, 1)
    assert [name for name in api.files if name.startswith("data/")] == [
        "data/train-00000.parquet",
        "data/train-00001.parquet",
    ]
    for name, data in api.files.items():
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes(data)
    rows = load_dataset(str(tmp_path / "clone"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["text"] == [f"{PREFIX}{title}" for title in TITLES if title and title.strip()]
    assert [image.size for image in rows["image"]] == [(30, 20)] * 6
    assert rows["machine_caption"][0].startswith("picture ")
    assert set(rows["text_by"]) == {"source"}
    assert set(rows["model"]) == {None}


@pytest.mark.usefixtures("connected")
def test_an_upload_that_breaks_commits_nothing_and_goes_on_where_it_was(
    table: CaptionsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", token)
    api = Hub(breaks_at="data/train-00001.parquet", token=token)

    with pytest.raises(
        OutputError, match=r"someone/data: the upload failed: .* Bearer \*\*\*; run the same command"
    ) as caught:
        push(table, api, monkeypatch)
    assert token not in str(caught.value)
    assert not api.files
    api.breaks_at = ""
    push(table, api, monkeypatch)

    assert api.sent == ["data/train-00000.parquet", "data/train-00001.parquet"]
    assert api.commits == 1


@pytest.mark.usefixtures("connected")
def test_a_dataset_that_is_there_is_replaced_with_update_only(
    table: CaptionsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Hub()
    push(table, api, monkeypatch)
    before = dict(api.files)

    with pytest.raises(OutputError, match=r"holds a dataset already \(2 files in data/\); --update replaces it"):
        push(table, api, monkeypatch)
    assert api.files == before
    for number in range(3):
        decide(table, "rejected", number)
    make_alt_texts(table, AltTextConfig(field="title"))
    push(table, api, monkeypatch, update=True)

    assert api.commits == 2
    assert sum(pq.read_table(io.BytesIO(data)).num_rows for name, data in api.files.items() if "data/" in name) == 4
