"""Tars, names and tables made to confuse: rows, or one error that says where; never a crash or a file outside."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import listed_rows, source_at

from captioner.console.text import printable
from captioner.data import ERROR_CODES
from captioner.errors import SourceError
from captioner.store.creating import create_table
from captioner.store.plan import make_plan

CASES = 300
NAMES = [
    "line\nbreak.jpg",
    "tab\tand\x1b[31mcolour.jpg",
    "right\u202eto left gpj.exe.jpg",
    "emoji 🦊🏳️‍🌈.jpg",
    "combining e\u0301.jpg",
    "precomposed \u00e9.jpg",
    "عربى.jpg",
    "=cmd|' C calc'!A0.jpg",
    " leading and trailing .jpg",
    "-rf.jpg",
    "100%25.jpg",
    "<script>alert(1)<script>.jpg",
]


def write_tar(path, names):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            header = tarfile.TarInfo(name)
            data = f"data {number}".encode()
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_any_name_is_an_id_and_is_read_back(tmp_path, kind):
    (tmp_path / "a").mkdir()
    if kind == "folder":
        for number, name in enumerate(NAMES):
            (tmp_path / "a" / name).write_bytes(f"data {number}".encode())
        source = source_at(tmp_path / "a")
    else:
        source = source_at(write_tar(tmp_path / "a/x.tar", NAMES))

    rows = listed_rows(source)
    images = source.read(rows)

    assert {i.removeprefix("x.tar/") for i in rows["image_id"].to_pylist()} == set(NAMES)
    by_name = {image.image_id.removeprefix("x.tar/"): image.data for image in images}
    assert by_name == {name: f"data {number}".encode() for number, name in enumerate(NAMES)}
    for image in images:
        assert printable(image.image_id).isprintable() or "\u200d" in image.image_id  # the joiner of emoji


def test_a_name_of_10000_characters_in_a_tar_is_read_and_in_a_manifest_a_row(tmp_path):
    name = "d/" * 4000 + "n" * 2000 + ".jpg"
    source = source_at(write_tar(tmp_path / "x.tar", [name]))
    rows = listed_rows(source)
    assert rows["image_id"].to_pylist() == [f"x.tar/{name}"]
    assert source.read(rows)[0].data == b"data 0"

    (tmp_path / "there.jpg").write_bytes(b"x")
    (tmp_path / "list.csv").write_text(f"path\n{'n' * 10_000}.jpg\nthere.jpg\n")
    manifest = source_at(tmp_path / "list.csv")
    images = manifest.read(listed_rows(manifest))
    assert [image.error_code for image in images] == ["not_found", ""]


def put_in_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


DEEP = b'{"caption": ' + b"[" * 100_000


def test_hostile_text_beside_the_images_of_a_tar_stops_no_listing(tmp_path):
    texts = [b'{"caption": "half \\ud83d smile"}', '{"caption": "half \\ud83d"}'.encode("utf-16"), DEEP]
    texts += [b'{"caption": "\xed\xa0\xbd"}', b'{"caption": "good"}']  # a half of a pair that is no UTF-8
    members = {f"{n}.{kind}": data for n, text in enumerate(texts) for kind, data in (("jpg", b"x"), ("json", text))}
    rows = listed_rows(source_at(put_in_tar(tmp_path / "x.tar", members)))
    captions = [["half &#55357; smile"], ["half &#55357;"], None, None, ["good"]]
    assert rows["reference_captions"].to_pylist() == captions


@pytest.mark.parametrize("name", ["list.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize(
    "text",
    [DEEP, b'{"file_name": "\xed\xa0\xbd"}', b"\xff\xfe" + '{"file_name": "a.jpg"}'.encode("utf-16-le") + b"\0\xd8"],
)
def test_hostile_json_lines_are_one_error_with_the_file(tmp_path, name, text):
    good = b'{"file_name": "a.jpg"}\n'
    lines = text if text.startswith(b"\xff") else good * 5000 + text  # after the lines that are read first
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / name).write_bytes(lines)
    source = tmp_path / name if name == "list.jsonl" else tmp_path
    with pytest.raises(SourceError, match=rf"{name}: (line \d+|it)? ?is not (JSON|UTF-8)") as error:
        listed_rows(source_at(source))
    assert "\n" not in str(error.value)


def test_a_null_byte_in_a_folder_of_metadata_is_a_name_without_an_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    lines = [{"file_name": "a.jpg", "text": "said"}, {"file_name": "d\0/b.jpg", "text": "lost"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = source_at(tmp_path)
    listings = [listing for unit in source.units() for listing in source.list_unit(unit)]
    assert pa.concat_tables(listing.rows for listing in listings)["reference_captions"].to_pylist() == [["said"]]
    assert "1 of its 2 names match no image" in " ".join(note for listing in listings for note in listing.notes)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_tiff_that_claims_more_than_there_is_takes_no_memory(tmp_path, big, kind):
    count, number, entry = ("<Q", 1 << 45, "<HHQQ") if big else ("<H", (1 << 32) - 1, "<HHII")
    header = b"II" + (struct.pack("<HHHQ", 43, 8, 0, 16) if big else struct.pack("<HI", 42, 8))
    entries = [struct.pack(entry, tag, 4, 1, 8) for tag in (256, 257)] + [struct.pack(entry, 330, 16, number, 16)]
    data = header + struct.pack(count, len(entries)) + b"".join(entries) + bytes(8)
    if kind == "tar":
        path = put_in_tar(tmp_path / "x.tar", {"a.tif": data})
    else:
        path = tmp_path
        (tmp_path / "a.tif").write_bytes(data)
    tracemalloc.start()
    rows = listed_rows(source_at(path, pages="all"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 1
    assert peak < 64 << 20


def test_ids_that_occur_twice_in_a_table_are_an_error_that_names_them(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b", "a"], "image": [b"1", b"2", b"3"]}), tmp_path / "t.parquet")
    source = source_at(tmp_path / "t.parquet", id_column="id")
    table = create_table(str(tmp_path / "out"), {}, [])

    with pytest.raises(SourceError, match="'a'"):
        make_plan(table, source, 16, 100)


def test_nulls_in_a_table_are_rows(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [None, {"bytes": None, "path": None}, {"bytes": b"", "path": "x.jpg"}, {"bytes": b"data", "path": None}]
    pq.write_table(pa.table({"image": pa.array(values, struct), "id": [None, "", "2", "3"]}), tmp_path / "t.parquet")
    source = source_at(tmp_path / "t.parquet", id_column="id")
    rows = listed_rows(source)

    images = source.read(rows)

    assert len(images) == len(set(rows["image_id"].to_pylist())) == 4
    assert [bool(image.data) for image in images] == [False, False, False, True]
    assert all(image.error_code in ERROR_CODES for image in images[:3])


@pytest.mark.parametrize("type_", [pa.int64(), pa.float32(), pa.list_(pa.binary()), pa.bool_(), pa.date32()])
def test_an_image_column_of_a_wrong_type_is_an_error_that_names_it(tmp_path, type_):
    pq.write_table(pa.table({"image": pa.nulls(3, type_)}), tmp_path / "t.parquet")

    with pytest.raises(SourceError, match="'image'"):
        source_at(tmp_path / "t.parquet", image_column="image")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_damaged_containers_are_rows_or_an_error_of_the_source(tmp_path, kind):
    """Bytes flipped, cut out and cut off, from a seed."""
    if kind == "tar":
        whole = write_tar(tmp_path / "x.tar", [f"{number}.jpg" for number in range(8)]).read_bytes()
    else:
        pq.write_table(pa.table({"image": [bytes([n]) * 300 for n in range(8)]}), tmp_path / "x.parquet")
        whole = (tmp_path / "x.parquet").read_bytes()
    outcomes = set()
    for case in range(CASES):
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / f"x.{kind}").write_bytes(damaged(random.Random(case), whole))
        try:
            source = source_at(folder / f"x.{kind}")
            rows = listed_rows(source)
            for image in source.read(rows):
                assert image.data or image.error_code in ERROR_CODES, case
            outcomes.add("rows")
        except SourceError as error:
            outcomes.add("error" if "\n" not in str(error) else f"more than one line: {error}")
        assert sorted(path.name for path in folder.iterdir()) == [f"x.{kind}"]
    assert outcomes == {"rows", "error"}


def damaged(rng, whole):
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        offset = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(600, len(data)))
        offset = offset if rng.random() < 0.5 else len(data) - 1 - offset
        kind = rng.randrange(3)
        if kind == 0:
            data[offset] = rng.randrange(256)
        elif kind == 1:
            del data[offset : offset + rng.randint(1, 700)]
        else:
            del data[max(offset, 1) :]
        data = data or bytearray(b"\0")
    return bytes(data)
