"""What tars list and read."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest
from helpers import listed, source_at

from captioner.errors import SourceError, UsageError


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
    said = json.dumps({"captions": ["first", "second"], "text": "unused", "alt": "other"}).encode()
    members = [("1.txt", b" a cat \n"), ("1.jpg", b"x"), ("2.jpg", b"x"), ("2.json", said), ("2.txt", b"second")]
    members += [("3.jpg", b"x"), ("3.cls", b"7"), ("4.txt", b"alone"), ("5.json", b"{broken"), ("5.jpg", b"x")]
    tar = write_tar(tmp_path / "x.tar", *members)
    rows, ignored = listed(source_at(tar))
    assert rows["reference_captions"].to_pylist() == [["a cat"], ["first", "second"], None, None]
    assert ignored == ["x.tar/3.cls", "x.tar/4.txt", "x.tar/5.json"]
    asked, _ = listed(source_at(tar, reference_column="alt"))
    assert asked["reference_captions"].to_pylist() == [None, ["other"], None, None]


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
        assert rows.equals(listed(source_at(tar))[0])
        assert [image.data for image in source.read(rows)] == [data for _, data in members]
