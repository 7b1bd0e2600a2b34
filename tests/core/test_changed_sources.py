"""What was planned is what is read: a source that changed meanwhile gives failed rows, and never another caption."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from PIL import Image

from captioner import pipeline
from captioner.config import CaptionConfig
from captioner.console.commands import status
from captioner.data import Captions, Pixels
from captioner.errors import OutputError
from captioner.models.fake import FakeCaptioner
from captioner.run import changed
from captioner.sources import open_source
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.store.verify import verify

COUNT = 24


def image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 100, 255 - number)).save(buffer, "BMP")  # of one size, whatever the colour
    return buffer.getvalue()


def write(path: Path, numbers: list[int], kind: str, names: list[int] | None = None) -> None:
    """A source of the images `numbers`, whose ids are `names` (the same numbers unless given)."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    named = list(zip(names or numbers, numbers, strict=True))
    if kind == "folder":
        for name, number in named:
            (path / f"{name:03d}.bmp").write_bytes(image(number))
    elif kind == "parquet":
        table = pa.table({"id": [f"{name:03d}" for name, _ in named], "image": [image(number) for _, number in named]})
        pq.write_table(table, path / "x.parquet")
    elif kind == "saved":
        import datasets

        rows = {"id": [f"{name:03d}" for name, _ in named], "image": [image(number) for _, number in named]}
        datasets.Dataset.from_dict(rows).save_to_disk(str(path))
    else:
        with tarfile.open(path / "x.tar", "w") as tar:
            for name, number in named:
                header = tarfile.TarInfo(f"{name:03d}.bmp" if kind == "tar" else f"{name:03d}-{'é' * 90}.bmp")
                header.size = len(image(number))
                tar.addfile(header, io.BytesIO(image(number)))


def run(root: Path, **output: object) -> int:
    source = {"path": str(root / "images")}
    if not list((root / "images").glob("*.[tb][am][rp]")):
        source["id_column"] = "id"
    settings = {"source": source, "model": {"name": "fake"}, "output": {"path": str(root / "out"), **output}}
    return pipeline.run(CaptionConfig.model_validate(settings))


def rows_of(root: Path) -> dict[str, dict]:
    """The rows by number of the image's name."""
    rows = pa.concat_tables(read_parts(open_table(str(root / "out")))).to_pylist()
    return {row["image_id"].rpartition("/")[2][:3]: row for row in rows}


def captions_of(root: Path) -> dict[str, str | None]:
    return {name: row["caption"] for name, row in rows_of(root).items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The caption of each image."""
    root = tmp_path_factory.mktemp("expected")
    write(root / "images", list(range(COUNT)), "folder")
    settings = {
        "source": {"path": str(root / "images")},
        "model": {"name": "fake"},
        "output": {"path": str(root / "out")},
    }
    assert pipeline.run(CaptionConfig.model_validate(settings)) == 0
    captions = captions_of(root)
    assert len(set(captions.values())) == COUNT
    return captions


def other_order(kind: str) -> list[int]:
    numbers = list(range(COUNT))
    random.Random(kind).shuffle(numbers)
    return numbers


@pytest.mark.parametrize("kind", ["tar", "tar of long names", "parquet", "saved"])
@pytest.mark.parametrize("change", ["order", "bytes", "fewer", "more"])
def test_a_source_rewritten_after_planning_gives_no_caption_of_another_image(tmp_path, expected, kind, change) -> None:
    write(tmp_path / "images", list(range(COUNT)), kind)
    assert run(tmp_path, plan_only=True) == 0
    numbers = {"order": other_order(kind), "fewer": list(range(8, COUNT)), "more": list(range(-0, COUNT + 8))}
    if change == "bytes":  # the same names, other images
        write(tmp_path / "images", other_order(kind), kind, names=list(range(COUNT)))
        right = dict(zip(expected, (expected[f"{number:03d}"] for number in other_order(kind)), strict=True))
    else:
        write(tmp_path / "images", numbers[change], kind)
        right = expected

    with pytest.raises(Exception, match=f"{COUNT} of {COUNT} images failed"):
        run(tmp_path)
    assert {row["error_code"] for row in rows_of(tmp_path).values()} == {"changed"}

    status_code = run(tmp_path, retry_failed=True)
    rows = rows_of(tmp_path)
    still = {f"{number:03d}" for number in range(COUNT)} - {
        f"{number:03d}" for number in numbers.get(change, range(COUNT))
    }
    assert {name: row["caption"] for name, row in rows.items() if row["status"] == "ok"} == {
        name: caption for name, caption in right.items() if name not in still
    }
    assert {name for name, row in rows.items() if row["error_code"] == "changed"} == still
    assert status_code == 0
    assert verify(open_table(str(tmp_path / "out"))).proven


def test_extend_plans_what_changed_anew_and_adds_what_is_new(tmp_path, expected) -> None:
    write(tmp_path / "images", list(range(COUNT - 4)), "tar")
    assert run(tmp_path, plan_only=True) == 0
    numbers = other_order("tar")
    write(tmp_path / "images", numbers, "tar")

    assert run(tmp_path, extend=True) == 0

    assert captions_of(tmp_path) == expected
    assert verify(open_table(str(tmp_path / "out"))).proven
    assert run(tmp_path, extend=True) == 0
    assert len(open_table(str(tmp_path / "out")).plans()) == 3  # nothing is left to do


@pytest.mark.parametrize("kind", ["tar", "parquet", "saved", "folder"])
def test_what_changed_after_it_was_captioned_is_told_and_captioned_again_by_extend(
    tmp_path, expected, kind, capsys
) -> None:
    write(tmp_path / "images", list(range(COUNT)), kind)
    assert run(tmp_path) == 0
    assert status(str(tmp_path / "out")) == 0
    assert "have changed" not in capsys.readouterr().out
    write(tmp_path / "images", other_order(kind), kind, names=list(range(COUNT)))

    assert run(tmp_path) == 0
    moved = sum(name != number for name, number in enumerate(other_order(kind)))
    assert f"{moved if kind == 'folder' else COUNT} images have changed" in capsys.readouterr().err
    assert status(str(tmp_path / "out")) == 0
    assert "--extend captions again what changed" in capsys.readouterr().out

    assert run(tmp_path, extend=True) == 0
    order = other_order(kind)
    assert captions_of(tmp_path) == {f"{name:03d}": expected[f"{number:03d}"] for name, number in enumerate(order)}
    capsys.readouterr()
    assert run(tmp_path) == 0
    assert "have changed" not in capsys.readouterr().err


def test_a_retry_with_extend_captions_failed_changed_and_new_images(tmp_path) -> None:
    folder = tmp_path / "images"
    write(folder, [0, 1, 2], "folder")
    (folder / "001.bmp").write_bytes(b"no image")
    assert run(tmp_path) == 0
    before = captions_of(tmp_path)
    for name, number in (("001", 1), ("002", 7), ("003", 3)):
        (folder / f"{name}.bmp").write_bytes(image(number))

    assert run(tmp_path, retry_failed=True, extend=True) == 0

    captions = captions_of(tmp_path)
    assert captions.keys() == {"000", "001", "002", "003"}
    assert all(captions.values())
    assert captions["000"] == before["000"]
    assert captions["002"] != before["002"]
    assert verify(open_table(str(tmp_path / "out"))).proven


def test_a_file_of_an_older_time_and_another_size_has_changed_and_one_of_the_future_has_not(tmp_path, capsys) -> None:
    write(tmp_path / "images", list(range(COUNT)), "folder")
    assert run(tmp_path) == 0
    old, future = tmp_path / "images/003.bmp", tmp_path / "images/004.bmp"
    old.write_bytes(image(3) + b"more")
    os.utime(old, (1, 1))
    os.utime(future, (5e9, 5e9))
    for name in range(5, 10):  # copied, say: other times, the same bytes
        (tmp_path / f"images/{name:03d}.bmp").touch()

    assert run(tmp_path) == 0

    assert "1 image has changed since planned or captioned, e.g. '003.bmp'" in capsys.readouterr().err


def test_a_plan_of_an_earlier_version_still_compares_tar_members(tmp_path, expected) -> None:
    write(tmp_path / "images", list(range(COUNT)), "tar")
    assert run(tmp_path, plan_only=True) == 0
    for part in (tmp_path / "out/plan").rglob("part-*.parquet"):
        rows = pq.read_table(part)
        pq.write_table(rows.drop_columns("stamp"), part, row_group_size=16)
    write(tmp_path / "images", other_order("tar"), "tar")

    with pytest.raises(Exception, match="failed"):
        run(tmp_path, max_failed=0)

    same = {f"{number:03d}" for index, number in enumerate(other_order("tar")) if index == number}
    assert {name for name, row in rows_of(tmp_path).items() if row["status"] == "ok"} == same
    assert run(tmp_path, retry_failed=True) == 0
    assert captions_of(tmp_path) == expected


def test_the_plan_hardly_grows(tmp_path) -> None:
    write(tmp_path / "images", list(range(COUNT)), "tar")
    assert run(tmp_path, plan_only=True) == 0
    (part,) = (tmp_path / "out/plan").rglob("part-*.parquet")
    rows = pa.concat_tables([pq.read_table(part)] * 2_000)
    for name in ("with", "without"):
        table = rows if name == "with" else rows.drop_columns("stamp")
        pq.write_table(table, tmp_path / name, row_group_size=512, compression="zstd")

    assert (tmp_path / "with").stat().st_size - (tmp_path / "without").stat().st_size < rows.num_rows


@pytest.mark.parametrize("where", ["disk", "store"])
def test_changes_are_found_among_many_files_whatever_their_folder(tmp_path, monkeypatch, where, capsys) -> None:
    """Files are asked for, and read, in batches."""
    monkeypatch.setattr(changed, "FILES_PER_BATCH", 3)
    monkeypatch.setattr(changed, "PIECE_BYTES", 100)
    root = tmp_path if where == "disk" else f"memory://bucket{tmp_path}"
    filesystem = fsspec.url_to_fs(str(root))[0]

    def put(number: int, data: bytes) -> None:
        filesystem.pipe_file(f"{root}/images/{number % 4}/{number:03d}.bmp", data)

    for folder in range(4):
        filesystem.makedirs(f"{root}/images/{folder}", exist_ok=True)
    for number in range(COUNT):
        put(number, image(number))
    config = CaptionConfig.model_validate(
        {"source": {"path": f"{root}/images"}, "model": {"name": "fake"}, "output": {"path": str(tmp_path / "out")}}
    )
    assert pipeline.run(config) == 0
    put(3, image(30))
    put(8, image(8))  # a copy
    put(9, image(9) + b"more")
    put(23, image(31))
    filesystem.rm_file(f"{root}/images/2/010.bmp")

    table = open_table(str(tmp_path / "out"))
    result = changed.find_changed(table, open_source(config.source), None)

    rows = pa.concat_tables(read_parts(table))
    names = [rows["image_id"][int(index)].as_py() for indices in result.indices.values() for index in indices]
    other_size, newer = ["1/009.bmp"], ["3/003.bmp", "3/023.bmp"]
    assert sorted(names) == other_size + (newer if where == "disk" else [])  # this store tells no times
    assert result.num_images == len(names)
    assert changed.find_changed(table, open_source(config.source), 1).num_unsure == (2 if where == "disk" else 0)


def test_a_file_replaced_while_its_chunk_is_captioned_is_captioned_again_by_extend(
    tmp_path, expected, monkeypatch
) -> None:
    write(tmp_path / "images", [0, 1], "folder")
    caption = FakeCaptioner.caption

    def replaced_meanwhile(captioner: FakeCaptioner, pixels: Pixels) -> Captions:
        file = tmp_path / "images" / "000.bmp"
        file.write_bytes(image(2))
        os.utime(file, ns=(time.time_ns(), time.time_ns()))  # the system's own times are those of its last tick
        return caption(captioner, pixels)

    monkeypatch.setattr(FakeCaptioner, "caption", replaced_meanwhile)
    run(tmp_path)
    monkeypatch.undo()
    assert captions_of(tmp_path)["000"] == expected["000"]

    run(tmp_path, extend=True)

    assert captions_of(tmp_path) == {"000": expected["002"], "001": expected["001"]}


def write_prices(root: Path, prices: list[object], kind: pa.DataType) -> None:
    """A table of images with a kept column of that type."""
    images = [image(number) for number in range(len(prices))]
    names = [f"{number:03d}" for number in range(len(prices))]
    (root / "images").mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"id": names, "image": images, "price": pa.array(prices, kind)}), root / "images" / "x.parquet"
    )


def extend_with_prices(root: Path) -> list[object]:
    source = {"id_column": "id", "keep_columns": ["price"]}
    pipeline.run(caption_config(root / "images", root / "out", source=source, extend=(root / "out").exists()))
    assert verify(open_table(str(root / "out"))).proven
    return [row["price"] for row in rows_of(root).values()]


@pytest.mark.parametrize(
    ("first", "later", "prices"),
    [
        (pa.int64(), pa.null(), [None, None, None]),
        (pa.int64(), pa.int32(), [1, 2, 3]),
        (pa.int64(), pa.float64(), [1.0, 2.0, None]),
        (pa.float64(), pa.float32(), [0.5, 1.0, None]),
        (pa.string(), pa.large_string(), ["a", "b", "c"]),
    ],
)
def test_a_kept_column_of_another_type_is_taken_where_its_values_are_the_same(tmp_path, first, later, prices) -> None:
    write_prices(tmp_path, prices[:2], first)
    extend_with_prices(tmp_path)
    write_prices(tmp_path, prices, later)
    assert extend_with_prices(tmp_path) == prices


@pytest.mark.parametrize(
    ("first", "later", "prices", "rewritten"),
    [
        (pa.int64(), pa.float64(), [1, 2], [1.5, 2.0, 3.0]),
        (pa.int64(), pa.float64(), [1, 2], [1.5, 2.0]),  # nothing new: images are captioned again
        (pa.int32(), pa.int64(), [1, 2], [1, 2, 2**40]),
        (pa.int64(), pa.string(), [1, 2], ["1", "2", "007"]),
        (pa.null(), pa.string(), [None, None], [None, None, "a"]),
    ],
)
def test_a_kept_column_whose_values_do_not_fit_the_table_is_an_error_that_leaves_it_as_it_was(
    tmp_path, first, later, prices, rewritten
) -> None:
    write_prices(tmp_path, prices, first)
    extend_with_prices(tmp_path)
    write_prices(tmp_path, rewritten, later)
    words = rf"column 'price' is {first} in .*, and {later} in SOURCE now; give the column its former type"
    with pytest.raises(OutputError, match=words):
        extend_with_prices(tmp_path)

    assert len(open_table(str(tmp_path / "out")).plans()) == 1
    write_prices(tmp_path, [*prices, prices[0]], first)
    assert extend_with_prices(tmp_path) == [*prices, prices[0]]


def test_a_damaged_plan_is_not_made_again_with_a_kept_column_of_other_values(tmp_path) -> None:
    write_prices(tmp_path, [1, 2], pa.int64())
    extend_with_prices(tmp_path)
    next((tmp_path / "out/plan/g000").glob("*.parquet")).unlink()
    write_prices(tmp_path, [1.5, 2.0], pa.float64())
    with pytest.raises(OutputError, match=r"column 'price' is int64 in .*, and double in SOURCE now"):
        extend_with_prices(tmp_path)
