"""Checking a table: which rows are scored, against what, which flags are set, when captions are not good enough."""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from hypothesis import given
from hypothesis import strategies as st

from captioner import pipeline, steps
from captioner.config import CaptionConfig, CheckConfig
from captioner.console import commands
from captioner.console.progress import Progress
from captioner.data import STATUS_FAILED, Captions, Receipt
from captioner.errors import CheckFailedError, SourceError, StoppedEarlyError, UsageError
from captioner.models.weights import TRAINING_IMAGES
from captioner.run import quality
from captioner.run.job import open_job
from captioner.scoring import compare
from captioner.scoring.eligible_rows import CheckSpec, trained_images
from captioner.scoring.flags import caption_flags
from captioner.scoring.language import is_in_other_language, language_of
from captioner.scoring.references import read_references
from captioner.scoring.running_wer import RunningWer, draw_sample
from captioner.scoring.sample import LowestRanks, rank
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable, open_table
from captioner.store.verify import count_rows, verify
from captioner.testing import make_folder
from ray_jobs.cli import main

Change = Callable[[int, dict[str, Any]], None]


def captioned(archive: Path, out: Path, change: Change | None = None, rows_per_file: int = 50_000) -> CaptionsTable:
    """A finished table; `change(number, row)` rewrites its rows."""
    pipeline.run(caption_config(archive, out, rows_per_file=rows_per_file))
    number = 0
    for part in sorted((out / "captions").iterdir()) if change else ():
        table = pq.read_table(part)
        rows = table.to_pylist()
        for row in rows:
            change(number, row)
            number += 1
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), part)
    return open_table(str(out))


def tell_the_truth(number: int, row: dict[str, Any]) -> None:
    row["caption"] = row["reference_captions"][0]


def half_true(number: int, row: dict[str, Any]) -> None:
    words = row["reference_captions"][0].split()
    row["caption"] = " ".join(words[: 3 + number % 9])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("archive"), 120)


@pytest.fixture(scope="module")
def true_out(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> CaptionsTable:
    return captioned(archive, tmp_path_factory.mktemp("true") / "out", tell_the_truth)


@pytest.fixture
def true_table(true_out: CaptionsTable, tmp_path: Path) -> CaptionsTable:
    """A copy for one test: references that are given are remembered."""
    return open_table(str(shutil.copytree(true_out.directory.location, tmp_path / "true")))


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(str(ended.value.code))


def known_captions(archive: Path) -> dict[str, list[str]]:
    lines = (archive / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row["captions"] for row in map(json.loads, lines)}


# Which rows


def test_a_draw_depends_on_ids_and_seed_alone() -> None:
    ids = [f"{number}.jpg" for number in range(500)]
    drawn = []
    for order in (ids, random.Random(1).sample(ids, 500)):
        sample: LowestRanks[str] = LowestRanks(20)
        for name in order:
            sample.offer(rank(name, 7), name, name)
        drawn.append(list(sample))

    assert drawn[0] == drawn[1] == sorted(ids, key=lambda name: rank(name, 7))[:20]
    assert {rank(name, 7) for name in ids} != {rank(name, 8) for name in ids}


def test_the_same_rows_and_scores_whatever_the_sharding(tmp_path: Path, archive: Path) -> None:
    checks = []
    for rows_per_file in (50_000, 16):
        table = captioned(archive, tmp_path / str(rows_per_file), half_true, rows_per_file)
        check = quality.check(table, CheckConfig(sample=40, seed=3))
        rows = pa.concat_tables(
            table.directory.read_table(f"checks/{name}")
            for name in table.directory.list_names("checks")
            if name.startswith("part-")
        ).to_pylist()
        checks.append((check.scores, rows, draw_sample(table, 40, 3, None)))

    (scores, rows, sample), again = checks
    assert again == (scores, rows, sample)
    assert scores.num_rows == 40
    assert 0 < scores.wer < 1
    assert {row["image_id"] for row in rows if row["wer"] is not None} == set(sample)
    edits = sum(row["substitutions"] + row["deletions"] + row["insertions"] for row in rows if row["words"])
    assert scores.wer == edits / sum(row["words"] or 0 for row in rows)


def test_rows_are_scored_where_they_are_written_in_any_order(tmp_path: Path, archive: Path) -> None:
    """The sums in the receipts, whatever chunk comes first, are those of the check at the end."""
    receipts = []

    class Recording(pipeline.LocalEngine):
        def caption_chunks(self, work, chunks):
            for receipt in super().caption_chunks(work, chunks[::-1]):
                receipts.append(receipt)
                yield receipt

    config = caption_config(archive, tmp_path / "out", check={"sample": 50})
    pipeline.run(config, Recording(config))
    running = RunningWer(seed=0)
    for receipt in receipts:
        running.add((edits, words) for edits, words in json.loads(json.dumps(asdict(receipt)))["scored"])

    check = open_table(str(tmp_path / "out")).directory.read_json("checks/check.json")
    assert running.num_rows == check["num_rows"] == 50
    assert running.wer == check["wer"]
    assert list(running.interval()) == check["interval"]


def test_images_the_model_was_trained_on_are_not_scored_while_a_run_captions(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [sha256(image.read_bytes()).hexdigest() for image in sorted(archive.glob("*.png"))]
    (tmp_path / "fake").mkdir()
    pq.write_table(pa.table({"sha256": digests[:30]}), tmp_path / "fake" / TRAINING_IMAGES)
    monkeypatch.chdir(tmp_path)
    receipts = []
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda *args, **kw: (receipts.append(args[1]), update(*args, **kw)))

    pipeline.run(caption_config(archive, tmp_path / "out", check={"sample": "all"}))

    check = open_table(str(tmp_path / "out")).directory.read_json("checks/check.json")
    assert sum(len(receipt.scored) for receipt in receipts) == check["num_rows"] == 90


def test_the_heartbeat_tells_the_wer_so_far(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    update = Progress.update

    def record(self: Progress, receipt: Receipt, note: str = "") -> None:
        update(self, receipt, note)
        lines.append(self.line())

    monkeypatch.setattr(Progress, "update", record)
    pipeline.run(caption_config(archive, tmp_path / "out", check={"sample": 50}))

    assert len(lines) == 8
    assert re.search(r"failed 0  WER 1\.000 of 50  ETA", lines[-1])


def test_images_the_model_was_trained_on_are_left_out(tmp_path: Path, archive: Path) -> None:
    table = captioned(archive, tmp_path / "out", tell_the_truth)
    seen = pa.concat_tables(read_parts(table, ["sha256"]))["sha256"][:30]
    (tmp_path / "model").mkdir()
    pq.write_table(pa.table({"sha256": seen}), tmp_path / "model" / TRAINING_IMAGES)
    run = table.directory.read_json("run.json")
    table.directory.write_json("run.json", run | {"model": {"path": str(tmp_path / "model")}})

    check = quality.check(table, CheckConfig(sample="all"))

    assert (check.trained_left_out, check.with_references, check.scores.num_rows) == (30, 90, 90)


def test_images_that_an_adapter_or_its_base_was_trained_on_are_left_out(tmp_path: Path, archive: Path) -> None:
    table = captioned(archive, tmp_path / "out", tell_the_truth)
    seen = pa.concat_tables(read_parts(table, ["sha256"]))["sha256"].to_pylist()
    for name, trained in (("base", seen[:10]), ("adapter", seen[5:30])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"sha256": trained}), tmp_path / name / TRAINING_IMAGES)
    model = {"path": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")}
    table.directory.write_json("run.json", table.directory.read_json("run.json") | {"model": model})

    assert trained_images(table) == set(seen[:30])
    assert quality.check(table, CheckConfig(sample="all")).trained_left_out == 30


# Against what


def coco(path: Path, references: dict[str, list[str]]) -> Path:
    file = path / "captions.json"
    images = [{"id": number, "file_name": name} for number, name in enumerate(references)]
    notes = [{"image_id": n, "caption": text} for n, several in enumerate(references.values()) for text in several]
    file.write_text(json.dumps({"images": images, "annotations": notes}))
    return file


def jsonl(path: Path, references: dict[str, list[str]]) -> Path:
    file = path / "metadata.jsonl"
    file.write_text(
        "".join(json.dumps({"file_name": name, "captions": texts}) + "\n" for name, texts in references.items())
    )
    return file


def csv(path: Path, references: dict[str, list[str]]) -> Path:
    file = path / "captions.csv"
    rows = [f'{name},"{text}"\n' for name, texts in references.items() for text in texts]
    file.write_text("image,caption\n" + "".join(rows))
    return file


def parquet(path: Path, references: dict[str, list[str]]) -> Path:
    file = path / "captions.parquet"
    pq.write_table(pa.table({"image_id": list(references), "reference_captions": list(references.values())}), file)
    return file


def texts(path: Path, references: dict[str, list[str]]) -> Path:
    for number, (name, several) in enumerate(references.items()):
        (path / name).with_suffix(".txt" if number % 2 else ".caption").write_text("\n".join(several))
    return path


@pytest.mark.parametrize("write", [coco, jsonl, csv, parquet, texts])
def test_references_of_every_kind(
    tmp_path: Path, archive: Path, true_table: CaptionsTable, write: Callable[[Path, dict[str, list[str]]], Path]
) -> None:
    references = known_captions(archive)
    file = write(tmp_path, references)

    assert read_references(str(file)).find("000003.png") == references["000003.png"]
    check = quality.check(true_table, CheckConfig(references=str(file)))
    assert (check.scores.num_rows, check.scores.wer, check.unmatched[0]) == (120, 0.0, 0)


def test_a_run_is_checked_against_the_references_it_is_given(tmp_path: Path, archive: Path) -> None:
    references = known_captions(archive)
    bare = make_folder(tmp_path / "bare", 120)
    (bare / "metadata.jsonl").unlink()
    file = str(coco(tmp_path, dict(list(references.items())[:90])))

    pipeline.run(caption_config(bare, tmp_path / "out", check={"references": file, "sample": "all"}))

    check = open_table(str(tmp_path / "out")).directory.read_json("checks/check.json")
    assert (check["num_rows"], check["with_references"], check["references"]) == (90, 90, file)
    assert open_table(str(tmp_path / "out")).directory.read_json("run.json")["check"]["wer"] == check["wer"] == 1.0


def test_references_given_once_are_those_of_later_checks(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = make_folder(tmp_path / "bare", 120)
    (bare / "metadata.jsonl").unlink()
    file = csv(tmp_path, known_captions(archive))
    table = captioned(bare, tmp_path / "out")
    quality.report(table)
    assert quality.check(table, CheckConfig()).references is None

    quality.check(table, CheckConfig(references=str(file)))
    assert quality.check(table, CheckConfig()).references == str(file)
    pipeline.run(caption_config(bare, tmp_path / "out", rows_per_file=50_000))  # nothing to do, but check
    assert table.directory.read_json("checks/check.json")["references"] == str(file)

    file.rename(tmp_path / "moved.csv")
    assert quality.check(table, CheckConfig()).references is None
    assert f"without the references that were given before: --references {file}" in capsys.readouterr().err
    quality.check(table, CheckConfig(references=""))
    (tmp_path / "moved.csv").rename(file)
    assert quality.check(table, CheckConfig()).references is None


def test_references_of_an_earlier_check_that_match_nothing_are_named_as_such(tmp_path: Path, archive: Path) -> None:
    table, file = captioned(archive, tmp_path / "out"), csv(tmp_path, known_captions(archive))
    quality.check(table, CheckConfig(references=str(file)))
    file.write_text("path,text\nelsewhere.png,a cat\n")

    with pytest.raises(UsageError, match=f"^the references given before, {file}: none of its names"):
        quality.check(table, CheckConfig())


def test_a_check_of_an_unfinished_run_begins_with_how_much_is_done(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = caption_config(archive, tmp_path / "out")
    engine = pipeline.LocalEngine(config)
    job = open_job(config, engine, lambda line: None)
    list(engine.caption_chunks(job.work, job.missing_chunks(job.table.open_plans()[0])[:3]))
    capsys.readouterr()

    commands.check(str(tmp_path / "out"), CheckConfig())
    assert capsys.readouterr().out.startswith("not finished: 48 of 120 images captioned (40%)")

    pipeline.run(caption_config(archive, tmp_path / "out"))
    capsys.readouterr()
    commands.check(str(tmp_path / "out"), CheckConfig())
    assert "not finished" not in capsys.readouterr().out


def test_images_are_found_by_id_then_path_then_name_then_stem(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("path,text\na/1.jpg,one\n2.jpg,two\n3,three\nb/5.jpg,x\nc/5.jpg,y\n")
    references = read_references(str(tmp_path / "r.csv"))

    assert references.find("a/1.jpg") == ["one"]
    assert references.find("train/2.jpg") == ["two"]
    assert references.find("train/3.png") == ["three"]
    assert references.find("elsewhere/5.jpg") is None  # of two by that name
    assert references.unmatched() == (2, ["b/5.jpg", "c/5.jpg"])
    with pytest.raises(UsageError, match=r"'2\.jpg' fits both 'train/2\.jpg' and 'val/2\.jpg'"):
        references.find("val/2.jpg")


def test_references_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("ein Hund\n", "utf-16")
    (folder / "b.TXT").write_text("eine Katze\n", "utf-8-sig")
    for location in ("~/texts", folder.as_uri(), str(folder)):
        assert read_references(location).captions == {"a": ["ein Hund"], "b": ["eine Katze"]}

    (folder / "c.txt").write_bytes("ein Bär\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"--references .*c\.txt: it is not UTF-8 text; save it as UTF-8"):
        read_references(str(folder))
    for text in folder.iterdir():
        text.unlink()
    (folder / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    assert read_references("~/texts").captions == {"a.png": ["a dog"]}


@pytest.mark.parametrize(
    ("tree", "captions"),
    [
        ({"images": None, "annotations": [{"image_id": 1, "caption": "x"}]}, {"1": ["x"]}),
        ({"images": [{"id": 1, "file_name": None}], "annotations": [{"image_id": 1, "caption": "x"}]}, {"1": ["x"]}),
        ({"images": [{"file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}, "needs an id"),
        ({"annotations": [{"caption": "x"}]}, "each caption an image_id"),
        ({"annotations": {"1": {"caption": "x"}}}, "are not those of COCO"),
        ({"images": ["a.jpg"], "annotations": ["x"]}, "are not those of COCO"),
        ({"images": [], "annotations": None}, "holds no caption"),
    ],
)
def test_dialects_of_coco_are_read_or_refused_in_one_line(
    tmp_path: Path, tree: dict[str, Any], captions: dict[str, list[str]] | str
) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(tree))

    if isinstance(captions, dict):
        assert read_references(str(file)).captions == captions
    else:
        with pytest.raises(SourceError, match=f"^--references .*{captions}"):
            read_references(str(file))


def test_what_is_given_for_an_image_id_is_of_no_other_image(tmp_path: Path) -> None:
    make_folder(tmp_path / "archive/train", 3)
    (tmp_path / "archive/train/metadata.jsonl").unlink()
    shutil.copytree(tmp_path / "archive/train", tmp_path / "archive/val")
    given = {"val/000001.png": ["a dog"], "000002.png": ["a cat"], "val/000002.png": ["a cow"]}

    check = {"references": str(csv(tmp_path, given)), "sample": "all"}
    pipeline.run(caption_config(tmp_path / "archive", tmp_path / "out", check=check))

    rows = pq.read_table(tmp_path / "out/checks/part-00000.parquet").to_pylist()
    assert {row["image_id"]: row["reference"] for row in rows if row["reference"]} == {
        "val/000001.png": "a dog",
        "train/000002.png": "a cat",
        "val/000002.png": "a cow",
    }


def test_references_of_no_image_are_counted_and_shown(tmp_path: Path, archive: Path, true_table) -> None:
    references = known_captions(archive) | {"gone.png": ["a dog"], "lost.png": ["a cat"]}

    check = quality.check(true_table, CheckConfig(references=str(csv(tmp_path, references))))

    assert check.unmatched == (2, ["gone.png", "lost.png"])
    assert check.with_references == 120


def test_references_that_fit_nothing_are_an_error_before_any_image_is_captioned(
    tmp_path: Path, archive: Path, true_table: CaptionsTable
) -> None:
    file = str(csv(tmp_path, {"other.jpg": ["a dog"]}))

    quality.check(true_table, CheckConfig())
    with pytest.raises(UsageError, match=r"none of its names \(1, such as 'other.jpg'\).*like '000000.png'"):
        quality.check(true_table, CheckConfig(references=file))
    with pytest.raises(UsageError, match=r"such as 'other.jpg'"):
        pipeline.run(caption_config(archive, tmp_path / "out", check={"references": file}))
    assert count_rows(open_table(str(tmp_path / "out"))).remaining == 120
    assert true_table.directory.exists("checks/check.json")  # the older check stays


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.csv", None, "no such file"),
        ("r.csv", "a,b\n1,2\n", "no column named image_id"),
        ("r.json", "{", "cannot be read as JSON"),
        ("r.json", "[1]", "expected COCO captions"),
        ("r.xlsx", "x", r"expected COCO .json, .jsonl, .csv, .tsv, .parquet"),
        ("r.csv", "image_id,caption\na,\n", "holds no caption"),
    ],
)
def test_bad_references_are_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)

    with pytest.raises(SourceError, match=message):
        read_references(str(tmp_path / name))


def test_references_in_text_files_may_be_utf16_and_another_encoding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a café\n7\n".encode("utf-16"))
    assert read_references(str(tmp_path)).captions == {"a": ["a café"]}
    (tmp_path / "b.txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(SourceError, match=r"b.txt: it is not UTF-8 text; save it as UTF-8"):
        read_references(str(tmp_path))


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.parquet"])
def test_columns_of_references_can_be_named(tmp_path: Path, name: str) -> None:
    table = pa.table(
        {"Datei": ["a.png", "b.png"], "alt": ["a dog", "a cat"], "lang": ["a hound", None], "text": ["x", "y"]}
    )
    file = tmp_path / name
    if name == "r.csv":
        pa.csv.write_csv(table, file)
    elif name == "r.parquet":
        pq.write_table(table, file)
    else:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))

    assert read_references(str(file), ["Datei", "alt"]).captions == {"a.png": ["a dog"], "b.png": ["a cat"]}
    assert read_references(str(file), ["Datei", "alt", "lang"]).captions["a.png"] == ["a dog", "a hound"]
    with pytest.raises(SourceError, match=r"no column 'name'; it has: Datei, alt, lang, text"):
        read_references(str(file), ["name", "alt"])
    with pytest.raises(SourceError, match=r"name the columns with --references-columns"):
        read_references(str(file))


def test_columns_are_refused_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"a.png": "a dog"}')
    with pytest.raises(UsageError, match=r"--references-columns a,b: .* has no columns"):
        read_references(str(tmp_path / "r.json"), ["a", "b"])
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="give a column of names, then one or more of captions"):
        read_references(str(tmp_path / "r.csv"), ["a"])
    with pytest.raises(UsageError, match="--references-columns: they are of the table that --references names"):
        quality.check_spec(
            captioned(make_folder(tmp_path / "archive", 4), tmp_path / "out"),
            CheckConfig(references_columns=["a", "b"]),
        )


# Flags


@pytest.mark.parametrize(
    ("caption", "flags"),
    [
        ("a dog on the grass", []),
        ("a red square, a red square and a ring", []),
        ("a very very old man", []),
        ("", ["empty"]),
        ("  ", ["empty"]),
        ("a bald bald bald man", ["repeated"]),
        ("a dog and a dog and a dog and a cat", ["repeated"]),
        ("on the beach on the beach on the beach", ["repeated"]),
        ("a man [unused0] in a hat", ["special_tokens"]),
        ("a cat</s>", ["special_tokens"]),
        ("a <|endoftext|> cat", ["special_tokens"]),
        ("1 < 2 and [sic]", []),
        ("An image of a cat", ["image_of"]),
        ("this is a black and white photo of a street", ["image_of"]),
        ("a photographer of birds", []),
        ("a man taking a picture of a cat", []),
        ("The picture shows a cat", ["preamble"]),
        ("w" * 126, ["over_125"]),
        ("w" * 251, ["over_125", "over_250"]),
    ],
)
def test_flags_of_one_caption(caption: str, flags: list[str]) -> None:
    assert caption_flags(caption) == flags


def test_flags_of_how_a_caption_came_about() -> None:
    assert caption_flags("a dog", float("nan"), finished=False) == ["truncated", "no_logprob"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a dog on the grass", "en"),
        ("ein Hund auf der Wiese", "de"),
        ("un chien sur la table", "fr"),
        ("женщина держит зонт под дождём", "ru"),
        ("一只红色的狗", "zh"),
        ("犬が草の上を走っている", "ja"),
        ("สุนัขวิ่งบนสนามหญ้า", "th"),
        ("एक कुत्ता घास पर दौड़ रहा है", "hi"),
        ("كلب يجري على العشب", "ar"),
        ("red dog", None),
        ("42", None),
        ("", None),
    ],
)
def test_language(text: str, language: str | None) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("text", "language", "is_other"),
    [
        ("two cats on a sofa", "de", True),
        ("zwei Katzen auf einem Sofa", "en", True),
        ("собака бежит по траве", "en", True),  # in which Cyrillic language is uncertain
        ("一只红色的狗", "ja", True),
        ("une pizza margherita", "it", False),  # too little to be sure
        ("red dog", "de", False),
        ("兩隻貓在沙發上", "zh", False),
        ("", "en", False),
    ],
)
def test_only_captions_that_are_surely_in_another_language(text: str, language: str, is_other: bool) -> None:
    assert is_in_other_language(text, language) is is_other


def test_captions_are_flagged_that_are_not_in_the_language_asked_for(true_table: CaptionsTable) -> None:
    assert quality.check(true_table, CheckConfig(language="en-GB")).flags["other_language"] == 0
    assert quality.check(true_table, CheckConfig(language="de", sample=0)).flags["other_language"] == 120
    with pytest.raises(UsageError, match=r"--language tlh: captions in this language are not recognised; .* de, "):
        quality.check(true_table, CheckConfig(language="tlh"))


def test_the_report_says_that_words_are_characters(tmp_path: Path, archive: Path, capsys) -> None:
    def change(number: int, row: dict[str, Any]) -> None:
        digits = "零一二三四五六七八九"
        row["reference_captions"] = ["图片" + "".join(digits[int(digit)] for digit in str(number)) + "号"]
        row["caption"] = row["reference_captions"][0].replace("号", "张")

    table = captioned(archive, tmp_path / "out", change)

    assert commands.check(table.directory.location, CheckConfig(sample="all")) == 0
    # Of 120 numbers 10 have one character, 90 two and 20 three: 120 wrong of 3 * 120 + 10 + 180 + 60 characters.
    assert "WER in characters 0.20 (" in capsys.readouterr().out
    assert table.directory.read_json("checks/check.json")["wer"] == 120 / 610
    page = Path(table.directory.location, "report", "index.html").read_text(encoding="utf-8")
    assert "WER and MER count characters: references are in a script without spaces between words." in page


def test_flags_of_a_caption_among_its_run(tmp_path: Path, archive: Path) -> None:
    def change(number: int, row: dict[str, Any]) -> None:
        row["logprob_mean"] = -4.0 if number < 2 else -0.2
        row["caption"] = row["reference_captions"][0]
        if number % 10 == 0:
            row["caption"] = "a man riding a wave on the beach"
        if number in (5, 7):
            row["caption"] = "ein Hund läuft über die Wiese"
        if number == 8:
            row["caption"] = "a Naughty Word on the wall"

    table = captioned(archive, tmp_path / "out", change)
    (tmp_path / "terms.txt").write_text("# comment\n\nnaughty word\n")

    quality.check(table, CheckConfig(terms=str(tmp_path / "terms.txt")))

    rows = {
        row["image_id"]: row["flags"] for row in table.directory.read_table("checks/part-00000.parquet").to_pylist()
    }
    flagged = {name: flags for name, flags in rows.items() if flags}
    assert len(rows) == 120
    assert flagged == {
        "000000.png": ["same_caption", "low_confidence"],
        "000001.png": ["low_confidence"],
        **{f"{number:06d}.png": ["same_caption"] for number in range(10, 120, 10)},
        "000005.png": ["other_language"],
        "000007.png": ["other_language"],
        "000008.png": ["listed_term"],
    }


def test_copies_of_one_image_may_share_a_caption(tmp_path: Path, archive: Path) -> None:
    def change(number: int, row: dict[str, Any]) -> None:
        row["caption"] = "a dog on the beach" if number < 40 else f"{number} dogs on the beach"
        row["sha256"] = "same" if number < 40 else row["sha256"]

    check = quality.check(captioned(archive, tmp_path / "out", change), CheckConfig())

    assert check.flags["same_caption"] == 0


def test_the_captions_table_is_never_touched(true_table: CaptionsTable) -> None:
    files = sorted(Path(true_table.directory.location, "captions").iterdir())
    before = [file.read_bytes() for file in files]

    quality.check(true_table, CheckConfig(seed=9))

    assert [file.read_bytes() for file in files] == before


# Good enough?


def test_right_references_pass_and_shuffled_ones_fail_the_lift_gate(
    tmp_path: Path, archive: Path, true_table: CaptionsTable, capsys: pytest.CaptureFixture[str]
) -> None:
    references, out = known_captions(archive), true_table.directory.location
    wrong = dict(zip(references, [*list(references.values())[7:], *list(references.values())[:7]], strict=True))
    (tmp_path / "wrong").mkdir()

    right = exit_code(
        "check", out, "--references", str(jsonl(tmp_path, references)), "--min-lift", "0.5", "--max-wer", "0.1"
    )
    shown = capsys.readouterr().out
    wrong_code = exit_code("check", out, "--references", str(jsonl(tmp_path / "wrong", wrong)), "--min-lift", "0.5")
    wrong_output = capsys.readouterr()

    assert (right, wrong_code) == (0, 2)
    assert re.search(r"^WER +0.000 +95 % interval 0.000 to 0.000", shown, re.MULTILINE)
    assert shown.count("(reference: ") == 3  # three best; nothing is wrong with the worst
    assert wrong_output.out.count("(reference: ") == 6
    assert re.search(r"lift -?0\.\d+ is below --min-lift 0.5", wrong_output.err)
    assert "Not good enough" in wrong_output.out


def test_a_gate_without_data_fails(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 3)
    (archive / "metadata.jsonl").unlink()
    table = captioned(archive, tmp_path / "out")

    assert quality.check(table, CheckConfig()).scores.wer is None
    assert exit_code("check", str(tmp_path / "out")) == 0
    assert exit_code("check", str(tmp_path / "out"), "--max-wer", "2") == 2


def test_a_run_whose_captions_are_too_bad_is_whole_and_exits_2(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(CheckFailedError, match=r"WER 1.000 of 30 captions is above --max-wer 0.9") as failed:
        pipeline.run(caption_config(archive, tmp_path / "out", check={"sample": 30, "max_wer": 0.9}))

    table = open_table(str(tmp_path / "out"))
    assert failed.value.exit_code == 2
    assert verify(table).proven
    assert table.directory.read_json("run.json")["state"] == "finished"
    assert (tmp_path / "out/report/index.html").exists()


def receipt(num_ok: int, num_duplicates: int = 0, **fields: Any) -> Receipt:
    return Receipt("0-0-0", num_ok, num_ok, {}, num_duplicates=num_duplicates, **fields)


@pytest.mark.parametrize(
    ("receipts", "line"),
    [
        ([receipt(32, flags={"empty": 20}), receipt(32, flags={"empty": 12})], r"32 of 64 captions are empty \(.*\)"),
        ([receipt(64, flags={"truncated": 64, "over_250": 64})], r"64 of 64 captions are cut off at the token limit"),
        ([receipt(64, flags={"special_tokens": 33})], "33 of 64 captions contain special tokens"),
        ([receipt(64, flags={"repeated": 60})], "60 of 64 captions repeat"),
        ([receipt(64, flags={"no_logprob": 60})], "60 of 64 captions have no finite log-probability"),
        ([receipt(40, commonest=("a dog", 30)), receipt(40, commonest=("a dog", 20))], "50 of 80 images .*'a dog'"),
        ([receipt(90, num_duplicates=70, commonest=("a dog", 12))], "12 of 20 images with the same caption"),
    ],
)
def test_a_fault_of_most_captions_is_said_once_while_running_and_at_the_end(receipts: list[Receipt], line: str) -> None:
    lines: list[str] = []
    running_check = quality.RunningCheck(CaptionConfig().check, lines.append)

    for chunk_receipt in [*receipts, receipt(0), receipt(0)]:
        running_check.add(chunk_receipt)

    (while_running,), (at_the_end,) = lines, running_check.notes()
    assert re.match(line, at_the_end)
    assert while_running.endswith(" so far")


@pytest.mark.parametrize(
    "receipts",
    [
        [receipt(63, flags={"empty": 31}), receipt(63, flags={"truncated": 31})],
        [receipt(64, flags={"over_125": 64, "image_of": 64})],
        [receipt(90, num_duplicates=80, commonest=("a dog", 9))],
        [receipt(0)],
    ],
)
def test_a_run_with_some_faults_is_no_senseless_run(receipts: list[Receipt]) -> None:
    lines: list[str] = []
    running_check = quality.RunningCheck(CaptionConfig().check, lines.append)

    for chunk_receipt in receipts:
        running_check.add(chunk_receipt)

    assert (lines, running_check.notes()) == ([], [])


@given(st.lists(st.tuples(st.sampled_from(["a cat", "a dog", "a red box"]), st.integers(0, 20)), max_size=30))
def test_the_caption_that_is_named_is_the_most_frequent_of_all_chunks(commonest: list[tuple[str, int]]) -> None:
    running_check = quality.RunningCheck(CaptionConfig().check, lambda line: None)
    totals = Counter[str]()
    for caption, count in commonest:
        running_check.add(receipt(count, commonest=(caption, count)))
        totals[caption] += count
        most, total = max(totals.values()), totals.total()
        notes = running_check.notes()
        assert bool(notes) == (most >= quality.MIN_SAME and 2 * most >= total)
        assert all(f"{most:,} of {total:,} images" in note for note in notes)
        assert not notes or any(repr(each) in notes[0] for each in totals if totals[each] == most)


def test_a_receipt_counts_flags_and_the_most_frequent_caption(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 4)
    shutil.copy(archive / "000001.png", archive / "copy.png")

    class SameForAll:
        def caption(self, pixels: Any) -> Captions:
            count = len(pixels)
            return Captions(["a dog a dog a dog"] * count, [6] * count, [-1.0] * count, [False] * count)

    config = caption_config(archive, tmp_path / "out")
    job = open_job(config, pipeline.LocalEngine(config), print)
    (plan,) = job.generations()
    (chunk,) = job.missing_chunks(plan)
    with job.work.decoder() as decoder:
        decoded = steps.decode(job.work, steps.read(job.work, chunk), decoder)
    counted = steps.commit(job.work, steps.caption(job.work, SameForAll(), decoded, job.work.new_memory()))

    assert counted.flags == {"truncated": 5, "repeated": 5}
    assert counted.commonest == ("a dog a dog a dog", 4)
    assert counted.num_duplicates == 1


def test_too_many_flagged_captions_are_exit_code_2(tmp_path: Path, archive: Path) -> None:
    def empty_every_third(number: int, row: dict[str, Any]) -> None:
        row["caption"], row["flags"] = ("", ["empty"]) if number % 3 == 0 else (f"image {number}", [])

    captioned(archive, tmp_path / "out", empty_every_third)

    assert exit_code("check", str(tmp_path / "out"), "--max-flagged", "0.4") == 0
    assert exit_code("check", str(tmp_path / "out"), "--max-flagged", "0.3") == 2


def test_a_limit_of_flagged_captions_fails_where_there_are_none(tmp_path: Path, archive: Path) -> None:
    def fail(number: int, row: dict[str, Any]) -> None:
        row |= {"caption": None, "status": STATUS_FAILED, "error_code": "truncated"}

    settings = CheckConfig(max_flagged=0.2)
    check = quality.check(captioned(archive, tmp_path / "out", fail), settings)

    assert quality.failed_gates(check, settings) == ["--max-flagged 0.2 cannot be checked: no image has a caption"]


def test_a_hopeless_run_stops_early_and_goes_on_when_asked_again(tmp_path: Path, archive: Path) -> None:
    config = caption_config(archive, tmp_path / "out", check={"max_wer": 0.9, "stop_early": True, "sample": "all"})

    with pytest.raises(StoppedEarlyError, match=r"stopped early: WER 1.000 of 64 captions .* --max-wer 0.9"):
        pipeline.run(config)

    table = open_table(str(tmp_path / "out"))
    assert count_rows(table).ok == 64  # four chunks of 16: the first from 50 rows on
    assert table.directory.read_json("run.json")["state"].startswith("stopped early")
    pipeline.run(caption_config(archive, tmp_path / "out"))
    assert verify(table).proven


def test_an_uncertain_run_is_not_stopped() -> None:
    running = RunningWer(seed=0)
    running.add([(9, 10)] * 40)
    assert not running.is_hopeless(0.5)  # too few rows
    running.add([(0, 10)] * 30)
    assert not running.is_hopeless(0.5)  # 0.514, but it may come down
    running.add([(9, 10)] * 200)
    assert running.is_hopeless(0.5)
    assert not running.is_hopeless(0.9)


def test_a_sample_of_none_scores_nothing(true_table: CaptionsTable) -> None:
    check = quality.check(true_table, CheckConfig(sample=0))

    assert (check.scores.num_rows, check.scores.wer, check.with_references) == (0, None, 120)


def test_of_a_large_table_every_nth_part_can_be_checked(tmp_path: Path, archive: Path) -> None:
    table = captioned(archive, tmp_path / "out", tell_the_truth, rows_per_file=16)

    check = quality.check(table, CheckConfig(sample="all"), max_rows=60)

    assert 16 <= check.stats.num_rows <= 64
    assert check.scores.num_rows == check.stats.num_rows


def test_two_runs_are_compared_image_by_image(tmp_path: Path, archive: Path, true_table: CaptionsTable) -> None:
    table = captioned(archive, tmp_path / "out", half_true)

    comparison = quality.check(table, CheckConfig(), against=true_table.directory.location).comparison

    assert comparison is not None
    assert comparison["num_rows"] == comparison["scored"] == 120
    assert 60 < comparison["changed"] <= 120
    figures = comparison["differences"]["WER"]
    assert figures["other"] == 0
    assert figures["interval"][0] < figures["this"] == figures["difference"] < figures["interval"][1]
    assert figures["verdict"] == "worse"
    for name in ("CIDEr-D", "BLEU-4", "ROUGE-L"):
        assert comparison["differences"][name]["interval"][1] < 0, name
        assert comparison["differences"][name]["verdict"] == "worse"
    bleus = [quality.check(captions_table, CheckConfig()).scores.bleu for captions_table in (table, true_table)]
    measured = comparison["differences"]["BLEU-4"]
    assert [measured["this"], measured["other"]] == [bleu[3] for bleu in bleus if bleu]
    assert all(row["caption"] != row["other"] for row in comparison["shown"])


def test_the_images_that_both_runs_captioned_are_compared_but_for_those_a_model_was_trained_on(
    tmp_path: Path, archive: Path, true_table: CaptionsTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "COMPARED_ROWS", 6)
    few = tmp_path / "few"
    shutil.copytree(archive, few)
    for image in sorted(few.glob("*.png"))[8:]:
        image.unlink()
    table = captioned(few, tmp_path / "out", half_true)
    ids = [row["image_id"] for row in pa.concat_tables(read_parts(table)).to_pylist()]
    drawn = sorted(ids, key=lambda image_id: rank(image_id, 0))[:6]
    learned = [row["sha256"] for row in pa.concat_tables(read_parts(table)).to_pylist() if row["image_id"] in drawn[:2]]
    (tmp_path / "model").mkdir()
    pq.write_table(pa.table({"sha256": learned}), tmp_path / "model" / TRAINING_IMAGES)
    run = true_table.directory.read_json("run.json")
    true_table.directory.write_json("run.json", run | {"model": {"path": str(tmp_path / "model")}})

    for this, other in ((table, true_table), (true_table, table)):
        comparison = compare.compare_tables(this, other, CheckSpec())
        assert comparison["num_rows"] == 6
        assert {row["image_id"] for row in comparison["shown"]} <= set(drawn)
        assert (comparison["trained_left_out"], comparison["scored"]) == (2, 4)


def test_the_same_captions_are_not_shown_to_differ(
    true_table: CaptionsTable, capsys: pytest.CaptureFixture[str]
) -> None:
    out = true_table.directory.location

    assert exit_code("check", out, "--against", out) == 0

    shown = capsys.readouterr().out
    assert "0 of 120 captions changed" in shown
    assert shown.count("not shown to differ") == 4
