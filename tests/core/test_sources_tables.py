"""What Parquet tables, Hugging Face datasets and manifests list and read."""

from __future__ import annotations

import io
import json
import pickle
import random
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import listed_rows, source_at
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner.data import PLAN_SCHEMA
from captioner.errors import SourceError
from captioner.sources.root import Root

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(path, /, row_group_size=None, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes(tmp_path, type_):
    source = source_at(parquet(tmp_path / "t.parquet", data=pa.array([b"a", None, b"", b"d"], type_)))
    rows = listed_rows(source)
    assert rows["image_id"].to_pylist() == [f"t.parquet#{row}" for row in range(4)]
    images = source.read(rows)
    assert [image.data for image in images] == [b"a", None, None, b"d"]
    assert [image.error_code for image in images] == ["", "not_found", "empty_file", ""]
    assert images[3].uri == f"{tmp_path}/t.parquet#3"


def test_a_struct_holds_bytes_or_a_path_beside_the_table(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "p.jpg").write_bytes(b"from a file")
    cells = [{"bytes": b"a", "path": "x.jpg"}, {"bytes": None, "path": "p.jpg"}, {"bytes": None, "path": None}, None]
    parquet(tmp_path / "sub" / "t.parquet", image=pa.array(cells, STRUCT))
    source = source_at(tmp_path / "*" / "t.parquet")
    images = source.read(listed_rows(source))
    assert [image.data for image in images] == [b"a", b"from a file", None, None]
    assert [image.error_code for image in images] == ["", "", "not_found", "not_found"]


def test_ids_references_and_kept_columns(tmp_path):
    parquet(
        tmp_path / "t.parquet",
        image=[b"a", b"b", b"c"],
        image_id=pa.array([7, 8, None]),
        caption=["one", "", "three"],
        score=pa.array([0.5, 1.5, None], pa.float32()),
    )
    source = source_at(tmp_path, keep_columns=["score"])
    rows = listed_rows(source)
    assert rows["image_id"].to_pylist() == ["7", "8", "t.parquet#2"]
    assert rows["reference_captions"].to_pylist() == [["one"], None, ["three"]]
    assert source.kept_fields() == [pa.field("score", pa.float32())]
    assert rows.schema.names == [*PLAN_SCHEMA.names, "score", "stamp"]
    assert rows["score"].to_pylist() == [0.5, 1.5, None]
    assert listed_rows(source_at(tmp_path, id_column="caption"))["image_id"].to_pylist() == ["one", "", "three"]


def test_a_listing_never_reads_the_images(tmp_path):
    """The bytes of the image column are wiped on disk: only listing still works."""
    file = parquet(tmp_path / "t.parquet", image=[b"x" * 1000, b"y" * 1000], image_id=["a", "b"])
    chunk = pq.read_metadata(file).row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    file.write_bytes(data)
    source = source_at(file)
    rows = listed_rows(source)
    assert rows["image_id"].to_pylist() == ["a", "b"]
    assert {image.error_code for image in source.read(rows)} == {"decode_error"}


@settings(max_examples=20, deadline=None)
@given(wanted=st.lists(st.integers(0, 199), min_size=1, max_size=30))
def test_any_rows_come_back_in_the_order_asked(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("table")
    parquet(folder / "a.parquet", row_group_size=7, image=[b"a%d" % n for n in range(100)])
    parquet(folder / "b.parquet", row_group_size=64, image=[b"b%d" % n for n in range(100)])
    source = source_at(folder)
    expected = [b"a%d" % n for n in range(100)] + [b"b%d" % n for n in range(100)]
    images = source.read(listed_rows(source).take(wanted))
    assert [image.data for image in images] == [expected[n] for n in wanted]


def test_a_table_that_is_gone_is_no_fault_of_its_images(tmp_path):
    source = source_at(parquet(tmp_path / "t.parquet", image=[b"x", b"y"]))
    rows = listed_rows(source)
    parquet(tmp_path / "other.parquet", image=[b"x"])
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(SourceError, match="the source is missing"):
        source.read(rows)


def test_the_image_column_is_found_by_type_then_name(tmp_path):
    both = parquet(tmp_path / "a.parquet", thumb=[b"t"], jpg=[b"j"], caption=["c"])
    assert source_at(both).read(listed_rows(source_at(both)))[0].data == b"j"
    assert source_at(both, image_column="thumb").read(listed_rows(source_at(both)))[0].data == b"t"
    unclear = parquet(tmp_path / "b.parquet", one=[b"t"], two=[b"j"])
    with pytest.raises(SourceError, match="one or two; choose with --image-column"):
        source_at(unclear)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"image_column": "n"}, r"'n' is int64; accepted are binary, struct\{bytes, path\}"),
        ({"image_column": "x"}, "--image-column 'x': no such column; it has: image, n, list"),
        ({"id_column": "list"}, "'list' is list<.*ids are strings or integers"),
        ({"reference_column": "n"}, "'n' is int64; captions are strings or lists"),
        ({"keep_columns": ["x"]}, "--keep-columns 'x': no such column; it has: image, n, list"),
        ({"keep_columns": ["caption"]}, "--keep-columns 'caption': the captions table already has a column"),
    ],
)
def test_wrong_columns_are_named(tmp_path, asked, message):
    table = parquet(tmp_path / "t.parquet", image=[b"x"], n=[1], list=[[1]], caption=["c"])
    with pytest.raises(SourceError, match=message.replace("image, n, list", "image, n, list, caption")):
        source_at(table, **asked)


def test_tables_that_hold_no_images(tmp_path):
    with pytest.raises(SourceError, match=r"no column of images among n \(int64\)"):
        source_at(parquet(tmp_path / "n.parquet", n=[1]))
    with pytest.raises(SourceError, match="img2dataset"):
        source_at(parquet(tmp_path / "u.parquet", URL=["http://x/y.jpg"]))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(SourceError, match=r"broken.parquet: cannot be read as a table"):
        source_at(tmp_path / "broken.parquet")


def write_manifest(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        names = list(rows[0])
        lines = [",".join(names), *(",".join(f'"{row[name] or ""}"' for name in names) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "ndjson", "parquet"])
def test_a_manifest_names_files_anywhere(tmp_path, suffix):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/manifest-test/r.jpg", b"remote")
    (tmp_path / "lists").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"absolute")
    (tmp_path / "lists" / "b.jpg").write_bytes(b"relative")
    paths = [str(tmp_path / "a.jpg"), "b.jpg", "memory://manifest-test/r.jpg", "gone.jpg", None]
    rows = [{"path": path, "code": f"00{n}", "caption": "said"} for n, path in enumerate(paths)]
    source = source_at(
        write_manifest(tmp_path / "lists" / f"m.{suffix}", rows), id_column="code", keep_columns=["code"]
    )
    plan = listed_rows(source)
    assert plan["image_id"].to_pylist() == plan["code"].to_pylist() == ["000", "001", "002", "003", "004"]
    assert plan["reference_captions"].to_pylist() == [["said"]] * 5
    images = pickle.loads(pickle.dumps(source)).read(plan)
    assert [image.data for image in images] == [b"absolute", b"relative", b"remote", None, None]
    assert [image.error_code for image in images[3:]] == ["not_found", "not_found"]
    assert images[1].uri == str(tmp_path / "lists" / "b.jpg")
    assert images[2].uri == "memory://manifest-test/r.jpg"


def test_a_manifest_of_windows_names_files_in_folders(tmp_path):
    for name in ("sub/c.png", "real\\name.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    rows = [{"path": path} for path in ("sub\\c.png", "real\\name.png", "sub\\gone.png")]
    source = source_at(write_manifest(tmp_path / "m.jsonl", rows))
    assert [image.data for image in source.read(listed_rows(source))] == [b"sub/c.png", b"real\\name.png", None]


def test_columns_of_a_tsv_are_separated_by_tabs(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "m.tsv").write_text("path\tcaption\ttags, words, more\na.png\ta dog, barking\tx\n")
    source = source_at(tmp_path / "m.tsv")
    rows = listed_rows(source)
    assert rows["reference_captions"].to_pylist() == [["a dog, barking"]]
    assert source.read(rows)[0].data == b"x"


def test_json_lines_that_datasets_wrote_name_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"beside")
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}, None]
    source = source_at(write_manifest(tmp_path / "m.jsonl", [{"image": cell} for cell in cells]))
    images = source.read(listed_rows(source))
    assert [image.data for image in images] == [b"beside", None, None]
    assert [image.error_code for image in images] == ["", "not_found", "not_found"]
    source = source_at(write_manifest(tmp_path / "m.jsonl", [{"image": {"bytes": "iVBORw0KGgo", "path": "a.png"}}]))
    with pytest.raises(SourceError, match=r"m.jsonl: images in text are not read; save the table as Parquet"):
        listed_rows(source)


@pytest.mark.parametrize("kind", ["manifest", "struct"])
def test_a_table_in_a_folder_names_files_in_stores(tmp_path, kind):
    pytest.importorskip("fsspec").filesystem("memory").pipe("/in-folder/r.jpg", b"remote")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"beside")

    def source_of(paths):
        values = paths if kind == "manifest" else [{"bytes": None, "path": path} for path in paths]
        pq.write_table(pa.table({"image": values}), tmp_path / "data" / "part-0.parquet")
        return source_at(tmp_path)

    source = source_of(["memory://in-folder/r.jpg", "a.bin"])
    assert [image.data for image in source.read(listed_rows(source))] == [b"remote", b"beside"]
    source = source_of(["https://x/y.jpg"])
    with pytest.raises(SourceError, match=r"https://x/y.jpg.*img2dataset"):
        source.read(listed_rows(source))


def test_a_manifest_without_ids_counts_rows(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", [{"file_name": f"{n}.jpg"} for n in range(5000)])
    source = source_at(manifest)
    assert [listing.rows.num_rows for listing in source.list_unit(source.units()[0])] == [4096, 904]
    assert listed_rows(source)["image_id"].to_pylist() == [f"m.csv#{n}" for n in range(5000)]


def test_a_manifest_that_breaks_off_is_an_error_with_its_name(tmp_path):
    lines = ["path,caption", *(f"{n}.jpg,said" for n in range(200_000)), "x.jpg,said,more"]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    with pytest.raises(SourceError, match=r"m.csv: cannot be read as a table: .*Expected 2 columns, got 3"):
        listed_rows(source_at(tmp_path / "m.csv"))
    (tmp_path / "m.jsonl").write_text("\n".join(['{"path": "a.jpg"}'] * 5000 + ['{"path": {"a": 7}}']))
    with pytest.raises(SourceError, match=r"m.jsonl: lines 4097 to 5001, 'path'"):
        listed_rows(source_at(tmp_path / "m.jsonl"))


def test_a_manifest_of_web_addresses_is_refused(tmp_path):
    manifest = write_manifest(tmp_path / "m.csv", [{"path": "a.jpg"}, {"path": "https://x/y.jpg"}])
    with pytest.raises(SourceError, match=r"https://x/y.jpg; .*img2dataset"):
        listed_rows(source_at(manifest))


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(10)]
    columns = {"image": images, "text": [f"number {n}" for n in range(10)], "label": list(range(10))}
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int32")}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_saved_dataset(tmp_path, saved):
    saved.select(range(9, -1, -1)).save_to_disk(tmp_path / "d")
    source = source_at(tmp_path / "d", keep_columns=["label"])
    rows = listed_rows(source)
    assert rows["image_id"].to_pylist() == [f"train#{n}" for n in range(10)]
    assert rows["reference_captions"].to_pylist()[0] == ["number 9"]
    assert rows["label"].to_pylist() == list(range(9, -1, -1))
    images = pickle.loads(pickle.dumps(source)).read(rows.take([3, 0, 3]))
    assert [image.image_id for image in images] == ["train#3", "train#0", "train#3"]
    assert all(image.data and image.data.startswith(b"\x89PNG") for image in images)
    assert images[0].data == images[2].data != images[1].data


def test_splits_of_a_saved_dataset(tmp_path, saved):
    datasets = pytest.importorskip("datasets")
    images = saved.select_columns(["image"])  # nothing but images: no column to list
    datasets.DatasetDict(train=images, test=images.select(range(3))).save_to_disk(str(tmp_path / "d"))
    rows = listed_rows(source_at(tmp_path / "d", split="test"))
    assert rows["image_id"].to_pylist() == ["test#0", "test#1", "test#2"]
    with pytest.raises(SourceError, match="no split 'dev'; choose one of train, test with --split"):
        source_at(tmp_path / "d", split="dev")


def test_a_dataset_saved_alone_is_the_split_that_it_was(tmp_path, saved):
    datasets = pytest.importorskip("datasets")
    saved.save_to_disk(tmp_path / "bare")
    assert listed_rows(source_at(tmp_path / "bare", split="train"))["image_id"][0].as_py() == "train#0"
    with pytest.raises(SourceError, match="no split 'nosuch'; choose one of train with --split"):
        source_at(tmp_path / "bare", split="nosuch")
    test = datasets.Dataset.from_dict(saved[:2], features=saved.features, split="test")
    test.save_to_disk(tmp_path / "test")
    datasets.DatasetDict(test=test).save_to_disk(str(tmp_path / "dict"))
    for name in ("test", "dict"):
        assert listed_rows(source_at(tmp_path / name))["image_id"].to_pylist() == ["test#0", "test#1"]
        with pytest.raises(SourceError, match="no split 'train'; choose one of test"):
            source_at(tmp_path / name, split="train")


def test_splits_whose_columns_have_other_types_are_one_line(tmp_path, saved):
    datasets = pytest.importorskip("datasets")
    other = saved.remove_columns("text").add_column("text", list(range(10)))
    datasets.DatasetDict(train=saved, test=other).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(SourceError, match=r"--split all: train, test have columns of other types: .*text"):
        source_at(tmp_path / "d", split="all")


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for path in ("nobody/nothing", "hf://datasets/nobody/nothing"):
        with pytest.raises(
            SourceError, match=r"^nobody/nothing: no such file or directory, and cannot be loaded"
        ) as error:
            source_at(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefix", ["file://", "file:", "file://localhost", "FILE://"])
@pytest.mark.parametrize("kind", ["manifest", "struct"])
def test_file_uris_are_paths(tmp_path, prefix, kind):
    image = tmp_path / "far away/é 100%.png"
    image.parent.mkdir()
    image.write_bytes(b"data")
    uri = prefix + image.as_uri().removeprefix("file://")
    if kind == "manifest":
        (tmp_path / "list.jsonl").write_text(json.dumps({"path": uri}))
        source = source_at(tmp_path / "list.jsonl")
    else:
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        source = source_at(parquet(tmp_path / "t.parquet", image=pa.array([{"bytes": None, "path": uri}], struct)))

    (listing,) = source.list_unit(*source.units())

    assert [raw.data for raw in source.read(listing.rows)] == [b"data"]


@pytest.mark.parametrize("flags", [{}, {"id_column": "id"}, {"keep_columns": ["id"]}])
def test_a_column_that_becomes_lists_and_holds_no_captions_is_an_error_with_its_name(tmp_path, flags):
    column = "id" if flags else "path"
    lines = [{"path": "a.jpg", "id": str(number)} for number in range(5000)]
    lines.append({"path": "b.jpg", "id": "last"} | {column: ["list"]})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SourceError, match=rf"m.jsonl: column '{column}' is text in some lines and a list in others"):
        listed_rows(source_at(tmp_path / "m.jsonl", **flags))


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark"]


def encoded(text: str, encoding: str) -> bytes:
    return b"\xff\xfe" + text.encode("utf-16-le") if "mark" in encoding else text.encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_of_any_spreadsheet(tmp_path, encoding, delimiter, end):
    lines = [["path", "text", "id"], ["é.png", '"two, or; more"', "007"], ["b.png", "Übung", "x"]]
    text = "".join(delimiter.join(line) + end for line in lines)
    (tmp_path / "t.csv").write_bytes(encoded(text, encoding))
    rows = listed_rows(source_at(tmp_path / "t.csv", id_column="id"))
    assert rows["image_id"].to_pylist() == ["007", "x"]
    assert rows["reference_captions"].to_pylist() == [["two, or; more"], ["Übung"]]
    assert rows["file"].to_pylist() == [str(tmp_path / name).encode() for name in ("é.png", "b.png")]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_lines_in_any_encoding_with_a_mark(tmp_path, encoding):
    text = "".join(json.dumps({"path": "é.png", "text": "Übung"}, ensure_ascii=False) + "\r\n" for _ in range(3))
    (tmp_path / "t.jsonl").write_bytes(encoded(text, encoding))
    assert listed_rows(source_at(tmp_path / "t.jsonl"))["reference_captions"].to_pylist() == [["Übung"]] * 3


@pytest.mark.parametrize("early", [{}, {"text": None}, {"other": 1}])
@pytest.mark.parametrize("late", ["a", ["a", "b"], ["a", 3, None]])
def test_captions_that_begin_after_thousands_of_lines_are_read(tmp_path, early, late):
    lines = [{"path": "a.png", **early}] * 5000 + [{"path": "b.png", "text": late}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [text for text in ([late] if isinstance(late, str) else late) if isinstance(text, str)]
    assert listed_rows(source_at(tmp_path / "t.jsonl"))["reference_captions"].to_pylist()[-1] == expected


@pytest.mark.parametrize("early", [7, 1.5, True, [1, 2], {"en": "x"}])
@pytest.mark.parametrize("late", ["a", ["a", "b"]])
@pytest.mark.parametrize("kind", ["metadata", "manifest", "asked for"])
def test_captions_after_thousands_of_lines_with_other_values_are_read(tmp_path, early, late, kind):
    key, column = "file_name" if kind == "metadata" else "path", "note" if kind == "asked for" else "text"
    lines = [{key: "a.png", column: early}] * 4096 + [{key: "b.png", column: late}]
    file = tmp_path / ("metadata.jsonl" if kind == "metadata" else "t.jsonl")
    file.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.png").touch()
    source = source_at(tmp_path if kind == "metadata" else file, reference_column=column if column == "note" else None)
    references = listed_rows(source)["reference_captions"].to_pylist()
    assert references[-1] == ([late] if isinstance(late, str) else late)
    assert kind == "metadata" or references[0] == (["7"] if early == 7 else None)


def test_numbers_in_a_column_of_captions_in_a_csv_are_text(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "a.png,7\n" * 5000 + "b.png,a cat\n")
    (tmp_path / "b.png").touch()
    assert listed_rows(source_at(tmp_path))["reference_captions"].to_pylist() == [["a cat"]]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize(
    ("name", "lines", "line"),
    [
        ("metadata.csv", ["file_name,text", "a.png,x", "b.png,Übung"], 3),
        ("metadata.csv", ["file_name,légende", "a.png,x"], 1),
        ("metadata.jsonl", ['{"file_name": "a.png", "text": "x"}', '{"file_name": "b.png", "text": "Übung"}'], 2),
        ("list.csv", ["path,text", *["a.png,x"] * 5000, "b.png,Übung"], 5002),
        ("list.jsonl", ['{"path": "a.png"}'] * 5000 + ['{"path": "é.png"}'], 5001),
    ],
)
def test_text_in_another_encoding_is_an_error_with_its_file_and_line(tmp_path, encoding, name, lines, line):
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(SourceError, match=rf"{name}: line {line} is not UTF-8 text; save it as UTF-8 .*iconv"):
        listed_rows(source_at(tmp_path if "metadata" in name else tmp_path / name))


@pytest.mark.parametrize("value", [{"en": "x"}, [["x"]], True, 1.5, [{"raw": "x"}]])
def test_what_is_no_caption_in_a_column_of_captions_is_none(tmp_path, value):
    lines = [{"path": "a.png", "text": value}, {"path": "b.png", "text": "y"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    references = listed_rows(source_at(tmp_path / "t.jsonl"))["reference_captions"].to_pylist()
    assert references[1] == ["y"]
    assert references[0] is None


@pytest.mark.parametrize("name", ["0.parquet", "zz.parquet"])
def test_a_table_of_something_else_among_tables_stops_no_other(tmp_path, name):
    parquet(tmp_path / "images.parquet", image=[b"a", b"b"])
    parquet(tmp_path / name, stats=[1])
    (tmp_path / "_delta_log").mkdir()
    parquet(tmp_path / "_delta_log" / "1.parquet", add=["x"])
    source = source_at(tmp_path)
    (note,) = [note for unit in source.units() for listing in source.list_unit(unit) for note in listing.notes]

    assert "no such column; it has: stats" in note
    rows = listed_rows(source)
    assert sorted(rows["image_id"].to_pylist()) == sorted(
        ["images.parquet#0", "images.parquet#1", f"{name}/[damaged from row 0]"]
    )
    assert {image.error_code for image in source.read(rows)} == {"", "damaged"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"image": [7]}, "b.parquet: column 'image' is int64; in another table it holds images"),
        ({"image": [[b"x"]]}, "b.parquet: column 'image' is list<element: binary>; in another table it holds images"),
        ({"id": [[1]]}, "b.parquet: column 'id' is list<element: int64>; ids are strings or integers"),
        ({"caption": [3]}, "b.parquet: column 'caption' is int64; captions are strings"),
        ({"label": ["dog"]}, "b.parquet: column 'label' is string, in another table int64: Failed to parse"),
        ({"label": [1.5]}, "b.parquet: column 'label' is double, in another table int64: Float value 1.5"),
    ],
)
def test_a_table_with_other_types_among_tables_stops_no_other(tmp_path, second, message):
    first = {"image": [b"x"], "id": ["a"], "caption": ["said"], "label": [1]}
    parquet(tmp_path / "a.parquet", **first)
    parquet(tmp_path / "b.parquet", **first | second)
    source = source_at(tmp_path, id_column="id", keep_columns=["label"])
    listings = [listing for unit in source.units() for listing in source.list_unit(unit)]
    assert [listing.notes[0].removeprefix(f"{tmp_path}/")[: len(message)] for listing in listings[1:]] == [message]
    images = source.read(pa.concat_tables(listing.rows for listing in listings))
    assert [image.error_code for image in images] == ["", "damaged"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"path": [1]}, r"b.parquet: column 'path' is int64; in another table it holds paths"),
        ({"path": [b"y.png"]}, r"b.parquet: column 'path' is binary; in another table it holds paths"),
        ({"label": ["dog"]}, r"b.parquet: column 'label' is string, in another table int64"),
    ],
)
def test_a_manifest_with_other_types_than_the_first_is_an_error_with_the_column(tmp_path, second, message):
    first = {"path": ["x.png"], "label": [1]}
    parquet(tmp_path / "a.parquet", **first)
    parquet(tmp_path / "b.parquet", **first | second)
    with pytest.raises(SourceError, match=message):
        listed_rows(source_at(tmp_path, keep_columns=["label"]))


def test_columns_without_values_have_the_type_of_the_first_table_that_has_some(tmp_path):
    null = pa.nulls(1)
    values = {"image_id": "b", "caption": "said", "note": "seen"}
    parquet(tmp_path / "a.parquet", image=[b"x"], **dict.fromkeys(values, null))
    parquet(tmp_path / "b.parquet", image=[b"x"], **{name: [value] for name, value in values.items()})
    parquet(tmp_path / "c.parquet", image=null, **dict.fromkeys(values, null))
    source = source_at(tmp_path, keep_columns=["note"])
    rows = listed_rows(source)
    assert rows["image_id"].to_pylist() == ["a.parquet#0", "b", "c.parquet#0"]
    assert rows["reference_captions"].to_pylist() == [None, ["said"], None]
    assert rows["note"].to_pylist() == [None, "seen", None]
    assert [field.type for field in source.kept_fields()] == [pa.string()]
    assert [image.error_code for image in source.read(rows)] == ["", "", "not_found"]


def test_a_sha256_that_is_no_text_is_not_compared(tmp_path):
    parquet(tmp_path / "a.parquet", path=["x.png"], sha256=["0" * 64])
    parquet(tmp_path / "b.parquet", path=["y.png"], sha256=[bytes(32)])
    assert listed_rows(source_at(tmp_path))["known_sha256"].to_pylist() == ["0" * 64, None]


def test_text_in_views_is_kept_as_text(tmp_path):
    note = pa.array(["seen"], pa.string_view())
    source = source_at(parquet(tmp_path / "t.parquet", image=[b"x"], note=note), keep_columns=["note"])
    assert [field.type for field in source.kept_fields()] == [pa.string()]
    assert listed_rows(source)["note"].to_pylist() == ["seen"]


def test_categories_and_uuids_are_ids_and_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(b"data")
    paths = pa.array(["a.png", None]).dictionary_encode()
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16), None], pa.binary(16)))
    for ids, first in ((pa.array(["x", None]).dictionary_encode(), "x"), (uuids, str(uuid.UUID(int=0)))):
        source = source_at(parquet(tmp_path / "t.parquet", path=paths, image_id=ids))
        rows = listed_rows(source)
        assert rows["image_id"].to_pylist() == [first, "t.parquet#1"]
        assert [image.data for image in source.read(rows)] == [b"data", None]


def test_ids_that_are_no_ids_are_refused_also_where_nobody_asked_for_the_column(tmp_path):
    parquet(tmp_path / "t.parquet", path=["a.png", "b.png"], image_id=[1.0, None])
    with pytest.raises(SourceError, match=r"'image_id' is double; ids are strings or integers"):
        source_at(tmp_path / "t.parquet")


@pytest.mark.parametrize("name", ["path", "image_id", "caption"])
def test_two_columns_of_one_name_are_an_error_that_says_so(tmp_path, name):
    (tmp_path / "m.csv").write_text(f"path,image_id,caption,{name}\na.png,x,said,y\n")
    with pytest.raises(SourceError, match=f"several columns are called '{name}'; rename all but one"):
        source_at(tmp_path / "m.csv")


def test_metadata_with_two_columns_of_file_names_is_an_error_that_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "metadata.csv").write_text("file_name,file_name,text\na.png,b.png,said\n")
    with pytest.raises(SourceError, match="several columns are called 'file_name'"):
        listed_rows(source_at(tmp_path))


@pytest.mark.parametrize("name", ["t.parquet", "t.tar"])
def test_a_pointer_of_git_lfs_says_how_to_fetch_it(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        listed_rows(source_at(tmp_path / name))


class CountingFile(io.FileIO):
    """A file that counts the bytes that are read of it and of others."""

    num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        CountingFile.num_bytes += len(data)
        return data


@pytest.fixture(scope="module")
def one_group(tmp_path_factory):
    """A table of 400 images in one row group, and its size in bytes."""
    path = tmp_path_factory.mktemp("group") / "t.parquet"
    data = [bytes([n % 251]) + random.Random(n).randbytes(5000) for n in range(400)]
    pq.write_table(pa.table({"image": data}), path, data_page_size=1 << 16)
    return source_at(path), data, path.stat().st_size


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_row_group_is_read_once_and_not_once_for_each_chunk(one_group, monkeypatch, num_workers):
    source, data, size = one_group
    rows = listed_rows(source)
    monkeypatch.setattr(Root, "open", lambda root, file: CountingFile(root.join(file)))
    CountingFile.num_bytes = 0
    if num_workers == 1:
        images = [image for start in range(0, 400, 25) for image in source.read(rows.slice(start, 25))]
    else:  # two processes, or threads, that take chunks in turn
        readers = [source.read(rows.slice(start, 25)) for start in (0, 200)]
        for start in range(25, 200, 25):
            for reader, first in zip(readers, (start, 200 + start), strict=True):
                reader += source.read(rows.slice(first, 25))
        images = [image for reader in readers for image in reader]

    assert [image.data for image in images] == data
    footers = 16 * (128 << 10)  # each chunk reads the end of the file once more
    assert CountingFile.num_bytes < num_workers * size + footers


@given(st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=30), max_size=6))
@settings(max_examples=20, deadline=None)
def test_rows_are_read_in_any_order(one_group, orders):
    source, data, _ = one_group
    rows = listed_rows(source)
    for order in orders:
        assert [image.data for image in source.read(rows.take(order))] == [data[row] for row in order]
