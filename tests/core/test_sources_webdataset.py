"""What tars list and read."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers import listed, source_at
from hypothesis import given
from hypothesis import strategies as st

from captioner.data import PLAN_SCHEMA
from captioner.errors import SourceError, UsageError
from captioner.store.creating import create_table
from captioner.store.plan import make_plan


def write_tar(path, *members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def test_members_are_read_by_one_seek_and_nothing_is_extracted(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ("1.jpg", b"one"), ("../2.png", b"two"), ("/etc/3.webp", b"three"))
    source = source_at(tar)
    rows, _ = listed(source)
    assert rows["image_id"].to_pylist() == ["x.tar/1.jpg", "x.tar/../2.png", "x.tar//etc/3.webp"]
    images = source.read(rows)
    assert [image.data for image in images] == [b"one", b"two", b"three"]
    assert images[1].uri == f"{tar}/../2.png"
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_tar_format(tmp_path, format):
    name = "/".join(["d" * 60, "e" * 60, "f" * 50]) + ".jpg"
    rows, _ = listed(source_at(write_tar(tmp_path / "x.tar", (name, b"data"), format=format)))
    assert rows["image_id"].to_pylist() == [f"x.tar/{name}"]


def test_text_beside_an_image_is_its_reference(tmp_path):
    metadata = json.dumps({"captions": ["first", "second"], "text": "unused", "alt": "other"}).encode()
    members = [("1.txt", b" a cat \n"), ("1.jpg", b"x"), ("2.jpg", b"x"), ("2.json", metadata), ("2.txt", b"second")]
    members += [("3.jpg", b"x"), ("3.cls", b"7"), ("4.txt", b"alone"), ("5.json", b"{broken"), ("5.jpg", b"x")]
    members += [("6.caption", b"\xef\xbb\xbfa dog"), ("6.jpg", b"x")]
    tar = write_tar(tmp_path / "x.tar", *members)
    rows, ignored = listed(source_at(tar))
    assert rows["reference_captions"].to_pylist() == [["a cat"], ["first", "second"], None, None, ["a dog"]]
    assert ignored == ["x.tar/3.cls", "x.tar/4.txt", "x.tar/5.json"]
    asked, _ = listed(source_at(tar, reference_column="alt"))
    assert asked["reference_captions"].to_pylist() == [None, ["other"], None, None, None]


def test_texts_in_a_tar_follow_the_rules_of_those_in_a_folder(tmp_path):
    texts = {
        "latin": "ein café".encode("latin-1"),
        "boxes": b"0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.2 0.2\n",
        "utf16": "hello".encode("utf-16"),
        "lines": b"A harbour.\nBoats lie in it.\n",  # in a tar, one text is one caption
        "long": b"word " * 20_000,
    }
    members = [(f"{n}.{kind}", data) for n, text in texts.items() for kind, data in (("jpg", b"x"), ("txt", text))]
    source = source_at(write_tar(tmp_path / "x.tar", *members))
    (listing,) = source.list_unit(*source.units())
    captions = [None, None, ["hello"], ["A harbour.\nBoats lie in it."], None]
    assert listing.rows["reference_captions"].to_pylist() == captions
    assert listing.ignored == ["x.tar/latin.txt", "x.tar/boxes.txt", "x.tar/long.txt"]
    assert listing.notes == ["captions in 1 text file are not UTF-8 and not used, e.g. 'x.tar/latin.txt'"]


def test_several_images_of_a_sample_are_each_a_row(tmp_path):
    members = [("s/1.left.jpg", b"l"), ("s/1.right.jpg", b"r"), ("s/1.bin2", b"?"), ("s/1.txt", b"both")]
    rows, ignored = listed(source_at(write_tar(tmp_path / "x.tar", *members, ("t/1.odd", b"o"), ("bare", b"b"))))
    ids = ["x.tar/s/1.left.jpg", "x.tar/s/1.right.jpg", "x.tar/t/1.odd", "x.tar/bare"]
    assert rows["image_id"].to_pylist() == ids
    assert rows["reference_captions"].to_pylist() == [["both"], ["both"], None, None]
    assert ignored == ["x.tar/s/1.bin2"]


def test_hidden_members_do_not_part_a_sample(tmp_path):
    members = [("._1.jpg", b"apple"), ("1.jpg", b"x"), ("._1.txt", b"apple"), ("1.txt", b"said")]
    rows, ignored = listed(source_at(write_tar(tmp_path / "x.tar", *members)))
    assert rows["image_id"].to_pylist() == ["x.tar/1.jpg"]
    assert "said" in rows["reference_captions"].to_pylist()[0]
    assert "x.tar/._1.jpg" in ignored


def test_links_and_devices_are_never_followed(tmp_path):
    link, device = tarfile.TarInfo("1.jpg"), tarfile.TarInfo("2.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    rows, ignored = listed(source_at(write_tar(tmp_path / "x.tar", (link, b""), (device, b""), ("3.jpg", b"x"))))
    assert rows["image_id"].to_pylist() == ["x.tar/3.jpg"]
    assert ignored == ["x.tar/1.jpg", "x.tar/2.jpg"]


def test_a_tar_that_is_cut_gives_the_rows_whose_header_is_there(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ("1.jpg", b"a" * 600), ("2.jpg", b"b" * 600), ("3.jpg", b"c" * 600))
    tar.write_bytes(tar.read_bytes()[: 1536 + 512 + 100])
    source = source_at(tar)
    rows, ignored = listed(source)
    assert rows["image_id"].to_pylist() == ["x.tar/1.jpg", "x.tar/2.jpg"]
    assert [image.error_code for image in source.read(rows)] == ["", "truncated"]
    assert len(ignored) == 1
    assert "damaged at byte" in ignored[0]


IMAGES = [(f"{number}.jpg", bytes([number]) * (700 + 300 * number)) for number in range(1, 7)]


def read_back(*paths):
    """What is read of each planned row: bytes or an error code, by id; and the notes of the listing."""
    source = source_at(*paths)
    listings = [listing for unit in source.units() for listing in source.list_unit(unit)]
    images = [image for listing in listings for image in source.read(listing.rows)]
    assert [image.image_id for image in images] == [
        i for listing in listings for i in listing.rows["image_id"].to_pylist()
    ]
    return {image.image_id: image.data or image.error_code for image in images}, [
        n for listing in listings for n in listing.notes
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "folder/é/" + "long" * 40 + "/"])
@pytest.mark.parametrize("kind", ["overwritten", "removed", "first", "inserted"])
def test_past_a_damaged_header_every_other_image_is_found(tmp_path, format, prefix, kind):
    if format == tarfile.USTAR_FORMAT and prefix:
        prefix = "folder/" * 15
    members = [(prefix + name, data) for name, data in IMAGES]
    tar = write_tar(tmp_path / "x.tar", *members, format=format)
    with tarfile.open(tar) as archive:
        headers = [(member.offset, member.offset_data) for member in archive]
    lost = 0 if kind == "first" else 3
    start, end = headers[lost]
    data = bytearray(tar.read_bytes())
    if kind == "removed":
        del data[end - 300 : end + 100]
    elif kind == "inserted":
        data[start:start] = b"?" * 333
    else:
        data[start:end] = b"?" * (end - start)
    tar.write_bytes(data)

    contents, notes = read_back(tar)

    expected = {f"x.tar/{name}": content for name, content in members}
    if kind != "inserted":
        del expected[f"x.tar/{members[lost][0]}"]
    damage = {name: code for name, code in contents.items() if "[damaged" in name}
    assert {name: content for name, content in contents.items() if name not in damage} == expected
    assert list(damage.values()) == ["damaged"]
    assert len(notes) == 1
    assert "x.tar: damaged from byte" in notes[0]


def test_bytes_that_are_missing_inside_an_image_cost_no_other(tmp_path):
    tar = write_tar(tmp_path / "x.tar", *IMAGES)
    with tarfile.open(tar) as archive:
        start = archive.getmembers()[2].offset_data
    data = bytearray(tar.read_bytes())
    del data[start + 100 : start + 900]
    tar.write_bytes(data)

    contents, _ = read_back(tar)

    assert {f"x.tar/{name}" for name, _ in IMAGES} <= set(contents)
    assert "damaged" in contents.values()
    assert all(contents[f"x.tar/{name}"] == data for name, data in IMAGES if name != "3.jpg")


@pytest.mark.parametrize("num_bytes", [1000, 512, 1024, 2048])
def test_bytes_that_are_missing_just_before_the_last_image_do_not_hide_it(tmp_path, num_bytes):
    tar = write_tar(tmp_path / "x.tar", ("1.jpg", b"a" * 3000), ("2.jpg", b"b"))
    data = bytearray(tar.read_bytes())
    del data[600 : 600 + num_bytes]
    tar.write_bytes(data)

    contents, notes = read_back(tar)

    assert contents == {"x.tar/1.jpg": "damaged", "x.tar/2.jpg": b"b"}
    assert "damaged from byte 512" in notes[0]


def test_a_tar_inside_a_tar_without_whole_records_is_a_member(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", *IMAGES).read_bytes()
    tar = write_tar(tmp_path / "x.tar", ("1.jpg", b"x"), ("2.tar", inner))
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1]
    tar.write_bytes(tar.read_bytes()[: last.offset_data + len(inner) + 1024])

    assert list(read_back(tar)[0]) == ["x.tar/1.jpg", "x.tar/2.tar"]
    assert read_back(tar)[1] == []


@pytest.mark.parametrize("padding", [0, 512, 10_240, 3 << 20])
def test_tars_that_were_joined_are_one(tmp_path, padding):
    first = write_tar(tmp_path / "1/x.tar", *IMAGES[:3]).read_bytes()
    second = write_tar(tmp_path / "2/x.tar", *IMAGES[3:]).read_bytes()
    (tmp_path / "x.tar").write_bytes(first + bytes(padding) + second + bytes(padding))

    contents, notes = read_back(tmp_path / "x.tar")

    assert contents == {f"x.tar/{name}": data for name, data in IMAGES}
    assert [note for note in notes if "unless tars were joined there" not in note] == []
    assert len(notes) == (padding % tarfile.RECORDSIZE > 0)


def test_members_of_which_only_zeros_are_left_are_said(tmp_path):
    """An end mark is zeros, too."""
    tar = write_tar(tmp_path / "x.tar", *[(f"{number}.jpg", b"pixels") for number in range(6)])
    data = bytearray(tar.read_bytes())
    data[2 * 1024 : 4 * 1024] = bytes(2 * 1024)
    tar.write_bytes(data)

    contents, notes = read_back(tar)

    assert list(contents) == ["x.tar/0.jpg", "x.tar/1.jpg", "x.tar/4.jpg", "x.tar/5.jpg"]
    assert notes == [
        "x.tar: zeros from byte 2,048 to 4,096, and members after them; unless tars were joined there, what images "
        "were there is lost"
    ]


def append(tar, *members):
    """Add members as `tar -r` does: at the end, whatever is there already."""
    with tarfile.open(tar, "a") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))


versions = st.lists(st.tuples(st.sampled_from(["a.jpg", "a.txt", "b.jpg", "c.jpg"]), st.binary(min_size=1, max_size=9)))


@given(versions)
def test_of_members_with_the_same_name_the_last_one_is_read_as_tar_unpacks_it(members):
    with TemporaryDirectory() as folder:
        tar = write_tar(Path(folder, "x.tar"), *members[:1])
        append(tar, *members[1:])
        contents, notes = read_back(tar)
        images = {name: data for name, data in members if name.endswith(".jpg")}
        assert contents == {f"x.tar/{name}": data for name, data in images.items()}
        num_older = len(members) - len(dict(members))
        counts = [note.split()[1] for note in notes if "superseded" in note]
        assert counts == ([str(num_older)] if num_older else [])


def test_a_newer_version_stays_in_the_sample_of_the_older_one(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ("a.jpg", b"1"), ("a.txt", b"old"), ("b.jpg", b"2"), ("b.txt", b"same"))
    append(tar, ("b.jpg", b"3"), ("c.jpg", b"4"), ("a.txt", b"new"))
    rows, ignored = listed(source_at(tar))
    assert rows["image_id"].to_pylist() == ["x.tar/a.jpg", "x.tar/b.jpg", "x.tar/c.jpg"]
    assert rows["reference_captions"].to_pylist() == [["new"], ["same"], None]
    assert ignored == []
    note = "x.tar: 2 older members are superseded by a later one of the same name, as when tar unpacks it, e.g. "
    assert read_back(tar)[1] == [f"{note}'b.jpg', 'a.txt'"]


def test_the_same_name_in_two_tars_is_two_images(tmp_path):
    for name in ("1", "2"):
        write_tar(tmp_path / f"{name}.tar", ("a.jpg", name.encode()))
    append(tmp_path / "2.tar", ("a.jpg", b"newer"))
    assert read_back(tmp_path)[0] == {"1.tar/a.jpg": b"1", "2.tar/a.jpg": b"newer"}


def test_a_file_that_was_added_twice_and_is_a_link_to_itself_is_there(tmp_path):
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
    contents, notes = read_back(write_tar(tmp_path / "x.tar", ("a.jpg", b"1"), (link, b"")))
    assert contents == {"x.tar/a.jpg": b"1"}
    assert notes == []


def test_a_newer_version_that_is_damaged_fails(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ("a.jpg", b"1"), ("a.jpg", b"2" * 3000), *IMAGES)
    data = bytearray(tar.read_bytes())
    del data[2000:3000]
    tar.write_bytes(data)
    contents, notes = read_back(tar)
    assert contents == {"x.tar/a.jpg": "damaged"} | {f"x.tar/{name}": data for name, data in IMAGES}
    assert any("superseded" in note for note in notes)


def test_in_a_tar_of_very_many_members_the_same_name_twice_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.sources.webdataset.HELD_LISTINGS", 1)
    monkeypatch.setattr("captioner.sources.webdataset.BATCH_ROWS", 2)
    source = source_at(write_tar(tmp_path / "x.tar", ("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3")))
    with pytest.raises(SourceError, match=r"'x.tar/a.jpg'; .* a tar: write it anew without the older members"):
        make_plan(create_table(str(tmp_path / "out"), {}, []), source, 16, 100)


def test_damage_far_into_a_tar_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("captioner.sources.webdataset.HELD_LISTINGS", 1)
    monkeypatch.setattr("captioner.sources.webdataset.BATCH_ROWS", 2)
    tar = write_tar(tmp_path / "x.tar", *IMAGES)
    with tarfile.open(tar) as archive:
        start = archive.getmembers()[4].offset
    data = bytearray(tar.read_bytes())
    data[start : start + 512] = b"?" * 512
    tar.write_bytes(data)
    (note,) = [note for listing in source_at(tar).list_unit("x.tar") for note in tuple(listing.notes)]
    assert "damaged from byte" in note


def test_a_tar_that_ends_between_members_is_said_to_have_no_end_mark(tmp_path):
    tar = write_tar(tmp_path / "x.tar", *IMAGES)
    with tarfile.open(tar) as archive:
        end = archive.getmembers()[3].offset
    tar.write_bytes(tar.read_bytes()[:end])

    contents, notes = read_back(tar)

    assert list(contents) == ["x.tar/1.jpg", "x.tar/2.jpg", "x.tar/3.jpg"]
    assert "no end mark" in notes[0]


def test_a_tar_that_ends_within_a_text_is_a_row_that_fails(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ("1.jpg", b"x"), ("1.txt", b"long" * 500), ("2.jpg", b"y"))
    tar.write_bytes(tar.read_bytes()[: 512 * 3 + 100])

    contents, _ = read_back(tar)

    assert contents == {"x.tar/1.jpg": b"x", "x.tar/[damaged from byte 1636]": "damaged"}


def test_an_empty_tar_and_one_that_is_none_are_told_and_stop_no_others(tmp_path):
    write_tar(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", ("1.jpg", b"x"))
    (tmp_path / "c.tar").write_bytes(b"")
    (tmp_path / "d.tar").write_bytes(b"<html>404</html>" * 100)

    contents, notes = read_back(tmp_path)

    assert contents == {
        "b.tar/1.jpg": b"x",
        "c.tar/[damaged from byte 0]": "damaged",
        "d.tar/[damaged from byte 0]": "damaged",
    }
    assert [note.rpartition("/")[2].partition(":")[0] for note in notes] == ["a.tar", "c.tar", "d.tar"]


def test_empty_members_and_names_that_are_not_utf8(tmp_path):
    tar = write_tar(tmp_path / "x.tar", ("caf\udce9.jpg", b"x"), ("e.jpg", b""), format=tarfile.GNU_FORMAT)
    source = source_at(tar)
    rows, _ = listed(source)
    assert rows["image_id"].to_pylist() == ["x.tar/caf%E9.jpg", "x.tar/e.jpg"]
    images = source.read(rows)
    assert [image.error_code for image in images] == ["", "empty_file"]
    assert images[0].uri == f"{tar}/caf%E9.jpg"


def test_a_tar_that_is_gone_is_no_fault_of_its_images(tmp_path):
    write_tar(tmp_path / "a.tar", ("1.jpg", b"x"))
    write_tar(tmp_path / "b.tar", ("1.jpg", b"x"))
    source = source_at(tmp_path)
    rows, _ = listed(source)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(SourceError, match="the source is missing"):
        source.read(rows.slice(0, 1))
    assert [image.error_code for image in source.read(rows)] == ["not_found", ""]


def test_a_folder_and_a_glob_of_tars(tmp_path):
    write_tar(tmp_path / "b" / "1.tar", ("1.jpg", b"x"))
    write_tar(tmp_path / "a" / "0.tar", ("1.jpg", b"x"))
    (tmp_path / "stats.json").write_text("{}")
    for source in (source_at(tmp_path), source_at(tmp_path / "*" / "*.tar")):
        assert source.units() == ["a/0.tar", "b/1.tar"]
        assert listed(source)[0]["image_id"].to_pylist() == ["a/0.tar/1.jpg", "b/1.tar/1.jpg"]


def test_a_folder_with_tars_and_images_is_a_folder(tmp_path):
    write_tar(tmp_path / "1.tar", ("1.jpg", b"x"))
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert listed(source_at(tmp_path))[0]["image_id"].to_pylist() == ["1.tar", "a.jpg"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar"])
def test_compressed_tars_are_refused(tmp_path, name):
    tar = write_tar(tmp_path / "plain.tar", ("1.jpg", b"x"))
    (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(SourceError, match="decompress it first"):
        listed(source_at(tmp_path / name))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar"])
def test_a_compressed_tar_among_others_is_a_row(tmp_path, name):
    tar = write_tar(tmp_path / "plain.tar", ("1.jpg", b"x"))
    (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
    source = source_at(tmp_path)
    rows, _ = listed(source)
    assert rows["image_id"].to_pylist() == ["plain.tar/1.jpg", f"{name}/[damaged from byte 0]"]
    assert [image.error_code for image in source.read(rows)] == ["", "damaged"]
    tar.rename(tmp_path / "other.tar.gz")
    if name == "x.tar.gz":  # all of them
        with pytest.raises(SourceError, match="decompress it first"):
            listed(source_at(tmp_path))


def test_what_is_no_tar_is_an_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(SourceError, match="not a tar"):
        listed(source_at(tmp_path))
    with pytest.raises(UsageError, match="has no columns"):
        source_at(tmp_path, keep_columns=["a"])


def test_tars_in_a_store(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    members = [(f"{n}.jpg", bytes([n]) * 5000) for n in range(20)]
    tar = write_tar(tmp_path / "x.tar", *members)
    fsspec.filesystem("memory").pipe("/tar-test/x.tar", tar.read_bytes())
    for path in ("memory://tar-test", "memory://tar-test/x.tar", "memory://tar-test/*.tar"):
        source = source_at(path)
        rows, _ = listed(source)
        assert rows.select(PLAN_SCHEMA.names).equals(listed(source_at(tar))[0].select(PLAN_SCHEMA.names))
        assert [image.data for image in source.read(rows)] == [data for _, data in members]
