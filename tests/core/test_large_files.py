"""Memory of reading is bounded in bytes: large files that are no images are not read, and chunks come in pieces."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from helpers import caption_config, contents, rows_of
from PIL import Image

from captioner import pipeline, steps
from captioner.config import ModelConfig
from captioner.console.trying import try_images
from captioner.imaging.sandbox.child import Slots
from captioner.sources.reading import SNIFF_ABOVE
from captioner.testing import make_folder, make_tar

HEADS = {
    "film.mp4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41",
    "film.mkv": b"\x1a\x45\xdf\xa3\xa3\x42\x86\x81",
    "film.avi": b"RIFF\xff\xff\xff\x00AVI LIST",
    "archive.zip": b"PK\3\4\x14\0\0\0",
    "disk.img": bytes(512),
    "named.jpg": bytes(4096),
    "table.sqlite": b"SQLite format 3\0",
    "program.bin": b"\x7fELF\2\1\1",
}


def write_sparse(path: Path, head: bytes, size: int) -> None:
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


def test_large_files_that_are_no_images_are_not_read(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 3)
    for name, head in HEADS.items():
        write_sparse(tmp_path / "images" / name, head, 900 << 20)
    write_sparse(tmp_path / "images/huge.jpg", b"\xff\xd8\xff\xe0", 10 << 30)

    assert pipeline.run(caption_config(tmp_path / "images", tmp_path / "out")) == 0

    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    assert {rows[name]["error_code"] for name in HEADS} == {"not_an_image"}
    assert rows["huge.jpg"]["error_code"] == "too_large"
    assert "--max-file-size" in rows["huge.jpg"]["error_message"]
    assert [rows[f"{number:06d}.png"]["status"] for number in range(3)] == ["ok"] * 3


def test_try_does_not_read_them_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sparse(tmp_path / "huge.jpg", b"", 10 << 30)

    assert try_images([str(tmp_path / "huge.jpg")], [ModelConfig(name="fake")]) == 2

    assert "huge.jpg: too_large" in capsys.readouterr().err


def test_large_images_are_images(tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (2500, 2400), os.urandom(2500 * 2400 * 3))
    (tmp_path / "images").mkdir()
    for format in ("TIFF", "BMP", "PNG", "PPM", "TGA"):
        noise.save(tmp_path / f"images/noise.{format.lower()}", format)
        assert (tmp_path / f"images/noise.{format.lower()}").stat().st_size > SNIFF_ABOVE

    assert pipeline.run(caption_config(tmp_path / "images", tmp_path / "out")) == 0

    assert [row["error_code"] for row in rows_of(tmp_path / "out")] == [None] * 5


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_the_limit_of_a_file_holds_wherever_it_is(tmp_path: Path, kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (100, 100)).save(data, "BMP")
    if kind == "folder":
        make_folder(tmp_path / "images", 3)
        (tmp_path / "images/large.bmp").write_bytes(data.getvalue())
    else:
        tar = make_tar(tmp_path / "images/x.tar", 3)
        with tarfile.open(tar, "a") as archive:
            member = tarfile.TarInfo("large.bmp")
            member.size = len(data.getvalue())
            archive.addfile(member, io.BytesIO(data.getvalue()))
    config = caption_config(tmp_path / "images", tmp_path / "out", source={"max_file_size": 20_000})

    assert pipeline.run(config) == 0

    codes = {row["image_id"].rpartition("/")[2]: row["error_code"] for row in rows_of(tmp_path / "out")}
    assert {name for name, code in codes.items() if code} == {"large.bmp"}
    assert codes["large.bmp"] == "too_large"


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("room", [1, 1500])
def test_a_chunk_is_read_in_pieces_that_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, room: int
) -> None:
    (make_folder(tmp_path / "images", 20) if kind == "folder" else make_tar(tmp_path / "images/x.tar", 20))
    assert pipeline.run(caption_config(tmp_path / "images", tmp_path / "whole")) == 0
    read, largest = steps.read_rows, []

    def watched(*arguments):
        raws = read(*arguments)
        largest.append(sum(len(raw.data or b"") for raw in raws))
        return raws

    monkeypatch.setattr(steps, "READ_BYTES", room)
    monkeypatch.setattr(steps, "read_rows", watched)

    assert pipeline.run(caption_config(tmp_path / "images", tmp_path / "pieces")) == 0

    same = ("caption", "image_id", "sha256", "status", "uri")
    whole, pieces = contents(tmp_path / "whole"), contents(tmp_path / "pieces")
    assert [[row[name] for name in same] for row in pieces] == [[row[name] for name in same] for row in whole]
    assert len(largest) > 2
    assert max(largest) <= max(room, *(row["num_bytes"] for row in whole))


def test_the_slot_of_a_file_gives_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the system gives 2 GiB at most; here it gives 1,000 bytes."""
    slots, data = Slots(16), os.urandom(5_500)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, start: pread(file, min(count, 1_000), start))
    slots.put(0, data)

    assert slots.get(0, len(data)) == data
    slots.close()
