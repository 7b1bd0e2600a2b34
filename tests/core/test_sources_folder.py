"""What a folder lists and reads."""

from __future__ import annotations

import json
import os
import pickle
import socket
from dataclasses import replace

import pytest
from helpers import caption_config, listed, listed_rows, rows_of, source_at

from captioner import pipeline
from captioner.data import PLAN_SCHEMA
from captioner.errors import SourceError, UsageError
from captioner.sources import describe
from captioner.sources.plan_rows import BATCH_ROWS
from captioner.sources.root import Root, file_of_unit, is_ignored, readable, unit_of_file
from captioner.testing import make_folder, make_parquet, make_tar


def fill(root, *names, data=b"image"):
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def ids(source):
    return listed(source)[0]["image_id"].to_pylist()


def test_every_file_is_a_row_but_documents_and_hidden_files(tmp_path):
    images = ["a.jpg", "no_suffix", "odd.xyz", "sub/b.PNG", "sub/deep/c.webp"]
    others = [
        "x.caption",
        "a.npz",
        "desktop.ini",
        "x.safetensors",
        "notes.TXT",
        "x.json",
        "x.xmp",
        "x.pdf",
        "x.html",
        "x.md",
        ".hidden.jpg",
        "._a.jpg",
        "sub/Thumbs.db",
    ]
    fill(tmp_path, *images, *others, "@eaDir/a.jpg", "sub/.cache/b.jpg")
    rows, ignored = listed(source_at(tmp_path))
    assert rows["image_id"].to_pylist() == images
    assert sorted(ignored) == sorted([*others, "@eaDir/a.jpg", "sub/.cache/b.jpg"])
    assert rows.schema.equals(PLAN_SCHEMA)


def test_units_are_the_root_and_each_first_folder(tmp_path):
    fill(tmp_path, "z.jpg", "b/1.jpg", "a/x/2.jpg", "100%/3.jpg", b"\xff/4.jpg")
    source = source_at(tmp_path)
    assert [file_of_unit(unit) for unit in source.units()] == [b"", b"100%", b"a", b"b", b"\xff"]
    assert ids(source) == ["z.jpg", "100%/3.jpg", "a/x/2.jpg", "b/1.jpg", "%FF/4.jpg"]


def test_order_is_that_of_bytes_and_the_same_each_time(tmp_path):
    fill(tmp_path, "é.jpg", "Z.jpg", "a.jpg", "10.jpg", "9.jpg")
    assert ids(source_at(tmp_path)) == ids(source_at(tmp_path)) == ["10.jpg", "9.jpg", "Z.jpg", "a.jpg", "é.jpg"]


def test_names_that_are_not_utf8_are_escaped_and_still_read(tmp_path):
    fill(tmp_path, b"caf\xe9.jpg", "e\u0301.jpg", "\u00e9.jpg")
    source = source_at(tmp_path)
    rows, _ = listed(source)
    assert rows["image_id"].to_pylist() == ["caf%E9.jpg", "e\u0301.jpg", "\u00e9.jpg"]
    images = source.read(rows)
    assert [image.data for image in images] == [b"image"] * 3
    assert images[0].uri == f"{tmp_path}/caf%E9.jpg"


def test_batches_are_bounded(tmp_path):
    fill(tmp_path, *(f"{n}.jpg" for n in range(BATCH_ROWS + 10)), *(f"sub/{n % 7}/{n}.jpg" for n in range(50)))
    sizes = [len(listing.rows) for unit in ("", "sub") for listing in source_at(tmp_path).list_unit(unit)]
    assert sizes == [BATCH_ROWS, 10, 50]


def test_symlinks_are_followed_and_loops_end(tmp_path):
    fill(tmp_path, "sub/a.jpg")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "sub" / "a.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    source = source_at(tmp_path)
    rows, ignored = listed(source)
    assert rows["image_id"].to_pylist() == ["gone.jpg", "link.jpg", "self.jpg", "sub/a.jpg"]
    assert ignored == ["loop/", "sub/up/"]
    assert [image.error_code for image in source.read(rows)] == ["not_found", "", "not_found", ""]


def test_a_pipe_or_socket_is_no_image_and_does_not_block(tmp_path, monkeypatch):
    fill(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        rows, ignored = listed(source_at(tmp_path))
    assert rows["image_id"].to_pylist() == ["a.jpg"]
    assert ignored == ["pipe.jpg", "socket.jpg"]


@pytest.mark.parametrize("key", ["captions", "caption", "text"])
def test_metadata_gives_references(tmp_path, key):
    fill(tmp_path, "train/a.jpg", "train/b.jpg", "c.jpg")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "train/a.jpg", key: "outer"}) + "\n")
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name,{key}\nb.jpg,inner\n")
    rows, ignored = listed(source_at(tmp_path))
    references = dict(zip(rows["image_id"].to_pylist(), rows["reference_captions"].to_pylist(), strict=True))
    assert references == {"c.jpg": None, "train/a.jpg": ["outer"], "train/b.jpg": ["inner"]}
    assert ignored == [], "a file whose captions are used is not skipped"


def test_metadata_may_mix_texts_and_lists_and_changes_are_seen(tmp_path):
    fill(tmp_path, "a.jpg", "b.jpg")
    lines = [{"file_name": "a.jpg", "said": "one"}, {"file_name": "b.jpg", "said": ["two", "", "three"]}]
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text("\n".join(map(json.dumps, lines)))
    assert listed(source_at(tmp_path, reference_column="said"))[0]["reference_captions"].to_pylist() == [
        ["one"],
        ["two", "three"],
    ]
    metadata.write_text(json.dumps({"file_name": "b.jpg", "said": "another"}))
    assert listed(source_at(tmp_path, reference_column="said"))[0]["reference_captions"].to_pylist() == [
        None,
        ["another"],
    ]


def test_metadata_that_is_broken_is_an_error_with_its_line(tmp_path):
    fill(tmp_path, "a.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n{"file_name":')
    with pytest.raises(SourceError, match="line 2 is not JSON"):
        listed(source_at(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"name": "a.jpg"}\n')  # of something else
    assert listed(source_at(tmp_path))[1] == ["metadata.jsonl"]


def test_include_and_exclude_are_globs_over_ids(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/2.png", "b/3.jpg")
    assert ids(source_at(tmp_path, include=["*.jpg"])) == ["a/1.jpg", "b/3.jpg"]
    assert ids(source_at(tmp_path, exclude=["b/*", "*.png"])) == ["a/1.jpg"]
    assert ids(source_at(tmp_path, include=["a/*"], exclude=["*1*"])) == ["a/2.png"]


def test_sources_are_picklable_and_read_alike(tmp_path):
    fill(tmp_path, "a.jpg")
    source = source_at(tmp_path, include=["*"])
    copy = pickle.loads(pickle.dumps(source))
    rows, _ = listed(source)
    assert copy.read(rows) == source.read(rows)


def test_an_empty_file_and_a_missing_one_are_rows(tmp_path):
    fill(tmp_path, "empty.jpg", data=b"")
    fill(tmp_path, "fine.jpg", "gone.jpg")
    source = source_at(tmp_path)
    rows, _ = listed(source)
    (tmp_path / "gone.jpg").unlink()
    assert [image.error_code for image in source.read(rows)] == ["empty_file", "", "not_found"]


def test_a_root_that_is_gone_or_unmounted_is_an_error(tmp_path):
    root = tmp_path / "root"
    fill(root, "a.jpg", "b.jpg")
    source = source_at(root)
    rows, _ = listed(source)
    for name in ("a.jpg", "b.jpg"):
        (root / name).unlink()
    with pytest.raises(SourceError, match="the source is missing"):
        source.read(rows)
    fill(root, "another.jpg")
    assert {image.error_code for image in source.read(rows)} == {"not_found"}


def failing(monkeypatch, errors):
    """`Root.read` raises these in turn, then works."""
    real, waited = Root.read, []

    def read(self, file, offset=None, size=None):
        if errors:
            raise errors.pop(0)
        return real(self, file, offset, size)

    monkeypatch.setattr(Root, "read", read)
    monkeypatch.setattr(Root, "retry", replace(Root.retry, sleep=waited.append))
    return waited


def test_what_may_pass_is_tried_again(tmp_path, monkeypatch):
    fill(tmp_path, "a.jpg")
    source = source_at(tmp_path)
    rows, _ = listed(source)
    waited = failing(monkeypatch, [OSError(5, "Input/output error"), TimeoutError("timed out")])
    assert source.read(rows)[0].data == b"image"
    assert waited == [0.2, 0.8]


def test_one_refused_image_is_a_row_and_all_of_them_an_error(tmp_path, monkeypatch):
    fill(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    source = source_at(tmp_path)
    rows, _ = listed(source)
    waited = failing(monkeypatch, [PermissionError(13, "Permission denied")])
    assert sorted(image.error_code for image in source.read(rows)) == ["", "", "permission"]
    failing(monkeypatch, [OSError("AWS Error ExpiredToken during GetObject")] * 3)
    with pytest.raises(SourceError, match=r"every one of 3 reads was refused.*ExpiredToken"):
        source.read(rows)
    assert waited == []


def test_an_unreachable_store_is_an_error_after_the_retries(tmp_path, monkeypatch):
    fill(tmp_path, "a.jpg", "b.jpg")
    source = source_at(tmp_path)
    rows, _ = listed(source)
    waited = failing(monkeypatch, [OSError(107, "Transport endpoint is not connected")] * 100)
    with pytest.raises(SourceError, match="Transport endpoint"):
        source.read(rows)
    assert sorted(waited) == sorted([0.2, 0.8, 3.2] * 2)


@pytest.mark.parametrize("setting", [{"id_column": "a"}, {"image_column": "a"}, {"keep_columns": ["a"]}])
def test_a_folder_has_no_columns(tmp_path, setting):
    fill(tmp_path, "a.jpg")
    with pytest.raises(UsageError, match="has no columns"):
        source_at(tmp_path, **setting)


def test_a_folder_in_a_store_reads_like_a_local_one(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    names = ["100%.jpg", "a b?.jpg", "sub/é#1.jpg", "sub/notes.txt"]
    for name in names:
        fill(tmp_path, name)
        store.pipe(f"/folder-test/{name}", b"image")
    local, remote = source_at(tmp_path), source_at("memory://folder-test")
    rows, ignored = listed(remote)
    assert rows.equals(listed(local)[0])
    assert ignored == ["sub/notes.txt"]
    images = remote.read(rows)
    assert [image.data for image in images] == [b"image"] * 3
    assert images[2].uri == "memory://folder-test/sub/é#1.jpg"


def test_what_is_not_there_or_not_ours_to_fetch_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="/nowhere/at/all: no such file"):
        source_at("/nowhere/at/all")
    with pytest.raises(SourceError, match="img2dataset"):
        source_at("https://example.org/images/")
    with pytest.raises(SourceError, match="no file matches"):
        source_at(tmp_path / "*.tar")
    with pytest.raises(UsageError, match="no source"):
        source_at("")


def test_credentials_and_options_stay_out_of_the_table():
    root = Root.at("s3://key:secret@bucket/images/?region=eu-west-1")
    assert root.uri(b"a.jpg") == "s3://bucket/images/a.jpg"


def test_readable_names_and_units():
    assert readable(b"a\xff\xc3\xa9") == "a%FFé"
    for name in (b"100%", b"%41", b"\xff%FF", "é".encode(), b"plain"):
        assert file_of_unit(unit_of_file(name)) == name
    assert is_ignored(b"x.JSONL")
    assert not is_ignored(b"x.jpg.tmp")


def test_the_table_of_a_run_inside_the_source_is_not_listed(tmp_path, capsys):
    images = make_folder(tmp_path / "images", 20)
    for out in (images / "out", images / "deep" / "out"):
        pipeline.run(caption_config(images, out))
        pipeline.run(caption_config(images, out, extend=True))
        assert len(rows_of(out)) == 20
    assert "'out/ (the OUT of a run)'" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
def test_a_table_inside_a_folder_of_shards_leaves_them_shards(tmp_path, suffix):
    make = make_tar if suffix == ".tar" else make_parquet
    make(tmp_path / "shards" / f"0{suffix}", 20)
    out = tmp_path / "shards" / "out"
    for settings in ({}, {"extend": True}):
        pipeline.run(caption_config(tmp_path / "shards", out, **settings))

    assert len(rows_of(out)) == 20


def test_a_name_in_metadata_finds_its_image_however_it_is_written(tmp_path):
    names = ["a.png", "b.png", "sub/c.png", "caf\u00e9.png", "nai\u0308ve.png", "real\\backslash.png", "none.png"]
    fill(tmp_path, *names)
    lines = {
        "a.png": ["first", "second"],  # one line each
        "./b.png": ["dot"],
        "sub\\c.png": ["backslash"],
        "cafe\u0301.png": ["decomposed"],
        "na\u00efve.png": ["composed"],
        "real\\backslash.png": ["as it stands"],
        "gone.png": ["no such image"],
    }
    rows = [{"file_name": name, "text": text} for name, texts in lines.items() for text in texts]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    listing = listed(source_at(tmp_path))[0]
    references = dict(zip(listing["image_id"].to_pylist(), listing["reference_captions"].to_pylist(), strict=True))
    assert references == dict(zip(names, [*list(lines.values())[:6], None], strict=True))


def test_names_of_one_image_that_are_written_in_several_ways_all_match(tmp_path):
    fill(tmp_path, "b.png", "sub/c.png")
    names = ["b.png", "./b.png", ".\\b.png", "sub/c.png", "sub\\c.png", "x/../sub/c.png"]
    rows = [{"file_name": name, "text": name} for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    assert references_of(source_at(tmp_path)) == {"b.png": names[:3], "sub/c.png": names[3:]}
    assert notes_of(source_at(tmp_path)) == []


@pytest.mark.parametrize("early", ["text", None, ["list"]])
@pytest.mark.parametrize("late", ["text", None, ["a", "list"]])
def test_captions_may_become_lists_and_other_columns_anything(tmp_path, early, late):
    fill(tmp_path, "a.png", "z.png")
    lines = [{"file_name": "a.png", "text": early, "id": 1}]
    lines += [{"file_name": f"{number}.png", "text": early, "id": number} for number in range(BATCH_ROWS)]
    lines += [{"file_name": "z.png", "text": late, "id": "b1", "more": {"x": 1}}]
    lines += [{"file_name": "y.png", "id": [2], "more": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))

    references = listed(source_at(tmp_path))[0]["reference_captions"].to_pylist()
    assert references == [[value] if isinstance(value, str) else value for value in (early, late)]


def references_of(source):
    rows = listed_rows(source)
    return dict(zip(rows["image_id"].to_pylist(), rows["reference_captions"].to_pylist(), strict=True))


def notes_of(source):
    return [note for unit in source.units() for listing in source.list_unit(unit) for note in listing.notes]


TEXTS = {
    "a.txt": b"one\n\n two \r\n",
    "b.caption": b"\xef\xbb\xbfwith a mark",
    "b.txt": b"tags, and words",
    "sub/c.png.txt": "Übung".encode("utf-16"),
    "boxes.txt": b"0 0.5 0.5 0.25 0.75\n",
    "long.txt": b"word " * 20_000,
    "latin.txt": "Übung".encode("latin-1"),
    "metadata.jsonl": b'{"file_name": "d.jpg", "text": "of metadata"}\n{"file_name": "a.jpg"}\n',
    "d.txt": b"not used",
}


def test_captions_in_text_files_beside_images_are_references(tmp_path):
    images = ["a.jpg", "a.png", "b.jpg", "boxes.jpg", "d.jpg", "latin.jpg", "long.jpg", "sub/c.png"]
    fill(tmp_path, *images)
    for name, data in TEXTS.items():
        fill(tmp_path, name, data=data)
    source = source_at(tmp_path)

    assert references_of(source) == dict.fromkeys(images) | {
        "a.jpg": ["one", "two"],
        "a.png": ["one", "two"],
        "b.jpg": ["with a mark", "tags, and words"],
        "d.jpg": ["of metadata"],
        "sub/c.png": ["Übung"],
    }
    assert listed(source)[1] == ["boxes.txt", "d.txt", "latin.txt", "long.txt"]
    (note,) = notes_of(source)
    assert note == "captions in 1 text file are not UTF-8 and not used, e.g. 'latin.txt'"
    assert references_of(source_at(tmp_path, reference_column="text"))["a.jpg"] is None
    assert references_of(source_at(tmp_path, exclude=["b.caption"]))["b.jpg"] == ["tags, and words"]


def test_a_text_file_of_an_image_in_another_batch_counts_as_used(tmp_path):
    names = [f"{number:05d}" for number in range(BATCH_ROWS + 1)]
    fill(tmp_path, *(f"{name}.png" for name in names))
    fill(tmp_path, f"{names[-1]}.txt", f"{names[0]}.caption", data=b"a caption")

    references = references_of(source_at(tmp_path))

    assert [name for name, captions in references.items() if captions] == [f"{names[0]}.png", f"{names[-1]}.png"]
    assert listed(source_at(tmp_path))[1] == []


@pytest.mark.parametrize("where", ["", "sub/"])
@pytest.mark.parametrize(
    "name", ["gone.png", "no/such/folder.png", "../outside.png", "/a.jpg", "notes.txt", ".a.png", ""]
)
def test_names_in_metadata_that_match_no_image_are_counted_and_named(tmp_path, where, name):
    fill(tmp_path, *(where + file for file in ("a.jpg", "deeper/b.jpg", "e\u0301.jpg", "notes.txt", ".a.png")))
    lines = [
        {"file_name": file, "text": "x"} for file in ("./a.jpg", "deeper\\b.jpg", "\u00e9.jpg", name, name, "x/y.png")
    ]
    fill(tmp_path, f"{where}metadata.jsonl", data="\n".join(map(json.dumps, lines)).encode())
    fill(tmp_path, "outside.png", "folder/c.jpg")

    (note,) = notes_of(source_at(tmp_path))

    assert note.startswith(f"{where}metadata.jsonl: 2 of its 5 names match no image, e.g. ")
    assert repr(os.path.normpath(name.replace("\\", "/"))) in note
    assert "'x/y.png'" in note
    assert notes_of(source_at(tmp_path, exclude=[f"{where}x/*", f"*{os.path.normpath(name)}"])) == []


@pytest.mark.parametrize("name", ["photo.png", "PHOTO.JPG", "no_suffix", "odd.xyz"])
def test_one_image_is_a_source(tmp_path, name):
    make_folder(tmp_path, 3)
    (tmp_path / "000001.png").rename(tmp_path / name)
    fill(tmp_path, f"{os.path.splitext(name)[0]}.txt", data=b"a caption beside it")
    source = source_at(tmp_path / name)

    assert source.units() == [""]
    assert references_of(source) == {name: ["a caption beside it"]}
    assert describe(source) == "taken for one image"
    assert source.read(listed_rows(source))[0].data == (tmp_path / name).read_bytes()
    assert references_of(source_at(tmp_path / "000002.png"))["000002.png"]  # of the metadata


NO_SOURCE = "neither an image, a tar nor a table"
NO_TAR = "an archive that is not read; unpack it and give the folder"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("notes.txt", NO_SOURCE), ("x.pdf", NO_SOURCE), ("empty", NO_SOURCE), ("x.zip", NO_TAR), ("X.7z", NO_TAR)],
)
def test_one_file_of_something_else_is_an_error(tmp_path, name, reason):
    fill(tmp_path, name, data=b"" if name == "empty" else b"words, and nothing else")
    with pytest.raises(SourceError, match=reason):
        source_at(tmp_path / name)
