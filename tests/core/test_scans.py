"""Scans: a row for each page of a TIFF, and reading what is very large at a smaller size."""

import contextlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import caption_config, rows_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import pipeline
from captioner.config import SourceConfig
from captioner.errors import OutputError, UsageError
from captioner.imaging.opening import open_image
from captioner.imaging.pillow import ImageError
from captioner.imaging.tiff import extract, page_offsets
from captioner.sources import open_source
from captioner.starter.scenes import make_scenes
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_parquet

SCENE = next(make_scenes(1, seed=4)).render(803)


def pages(count: int) -> list[Image.Image]:
    return [scene.render(64 + number) for number, scene in enumerate(make_scenes(count, seed=1))]


def tiff(images: list[Image.Image], **options) -> bytes:
    stream = io.BytesIO()
    images[0].save(stream, "TIFF", save_all=True, append_images=images[1:], **options)
    return stream.getvalue()


def reduced_copy(image: Image.Image, times: int) -> Image.Image:
    """A smaller copy as pyramids hold it: NewSubfileType 1."""
    copy = image.resize((image.width // times, image.height // times))
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    return copy


def offsets(data: bytes) -> list[int]:
    return page_offsets(lambda start, size: data[start : start + size])


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A letter of three pages, a single page, an image, a damaged TIFF, and a pyramid."""
    root = tmp_path / "archive"
    root.mkdir()
    (root / "letter.TIF").write_bytes(tiff(pages(3), compression="tiff_lzw"))
    (root / "single.tif").write_bytes(tiff(pages(1)))
    (root / "photo.png").write_bytes(_encoded(pages(1)[0], "PNG"))
    (root / "damaged.tif").write_bytes(b"II*\0\xff\xff\xff\x7f")
    (root / "pyramid.tif").write_bytes(tiff([SCENE, reduced_copy(SCENE, 2), reduced_copy(SCENE, 4)]))
    return root


def _encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_every_page_has_exactly_one_row(tmp_path: Path, archive: Path) -> None:
    (archive / "metadata.jsonl").write_text('{"file_name": "letter.TIF", "text": "a letter"}\n')

    pipeline.run(caption_config(archive, tmp_path / "out", source={"pages": "all"}))

    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    letter = [f"letter.TIF#page={number}" for number in (1, 2, 3)]
    assert list(rows) == ["damaged.tif", *letter, "photo.png", "pyramid.tif", "single.tif"]
    assert [rows[name]["width"] for name in letter] == [64, 65, 66]
    assert len({rows[name]["caption"] for name in letter}) == len({rows[name]["sha256"] for name in letter}) == 3
    assert [rows[name]["reference_captions"] for name in letter] == [["a letter"], None, None]
    assert rows[letter[2]]["uri"] == f"{archive}/letter.TIF#page=3"
    assert rows["photo.png"]["caption"] == rows["single.tif"]["caption"] == rows[letter[0]]["caption"]
    assert rows["damaged.tif"]["status"] == "failed"
    assert verify(open_table(str(tmp_path / "out"))).proven


def test_by_default_a_tiff_is_its_first_page(tmp_path: Path, archive: Path) -> None:
    pipeline.run(caption_config(archive, tmp_path / "out", source={"pages": "first"}))

    rows = {row["image_id"]: row for row in rows_of(tmp_path / "out")}
    assert rows["letter.TIF"]["width"] == 64
    assert len(rows) == 5
    with pytest.raises(OutputError, match=r"was created with --pages 'first', not 'all'"):
        pipeline.run(caption_config(archive, tmp_path / "out", source={"pages": "all"}))


def test_globs_match_the_file_and_the_page(tmp_path: Path, archive: Path) -> None:
    pipeline.run(
        caption_config(
            archive, tmp_path / "out", source={"pages": "all", "include": ["*.TIF"], "exclude": ["*#page=2"]}
        )
    )

    assert [row["image_id"] for row in rows_of(tmp_path / "out")] == ["letter.TIF#page=1", "letter.TIF#page=3"]


def test_pages_in_tars_and_manifests(tmp_path: Path, archive: Path) -> None:
    with tarfile.open(tmp_path / "scans.tar", "w") as tar:
        tar.add(archive / "photo.png", "a.png")
        tar.add(archive / "letter.TIF", "b.tif")
    (tmp_path / "list.csv").write_text("path,image_id\narchive/letter.TIF,L7\n")

    sources = {
        name: open_source(SourceConfig(path=str(tmp_path / name), pages="all")) for name in ("scans.tar", "list.csv")
    }

    rows = {name: next(iter(source.list_unit(source.units()[0]))).rows for name, source in sources.items()}
    assert rows["scans.tar"]["image_id"].to_pylist() == [
        "scans.tar/a.png",
        *(f"scans.tar/b.tif#page={number}" for number in (1, 2, 3)),
    ]
    assert rows["list.csv"]["image_id"].to_pylist() == ["L7#page=1", "L7#page=2", "L7#page=3"]
    for name, source in sources.items():
        last = source.read(rows[name])[-1]
        assert Image.open(io.BytesIO(last.data)).size == (66, 66)
        assert last.uri.endswith("#page=3")
        assert last.uri.count("#page=") == 1


def test_rows_of_a_manifest_that_name_one_file_or_none_keep_their_ids(tmp_path: Path, archive: Path) -> None:
    ids = {name: "photo.png" if name in "ab" else "" for name in "abcd"}
    lines = [f"{name},{path and f'archive/{path}'}\n" for name, path in ids.items()]
    (tmp_path / "list.csv").write_text("image_id,path\n" + "".join(lines))
    source = open_source(SourceConfig(path=str(tmp_path / "list.csv"), pages="all"))

    images = source.read(next(iter(source.list_unit(source.units()[0]))).rows)

    assert [image.image_id for image in images] == list("abcd")
    assert [image.error_code for image in images] == ["", "", "not_found", "not_found"]


def test_pages_of_images_in_a_table_are_refused(tmp_path: Path) -> None:
    table = make_parquet(tmp_path / "table.parquet", 2)

    with pytest.raises(UsageError, match=r"--pages all: .* is a table of images"):
        open_source(SourceConfig(path=str(table), pages="all"))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg", "tiff_deflate", "group4"])
def test_a_page_alone_has_the_pixels_of_the_page(compression: str | None, big: bool) -> None:
    mode = "1" if compression == "group4" else "RGB"
    data = tiff([page.convert(mode) for page in pages(3)], compression=compression, big_tiff=big)

    for number, offset in enumerate(offsets(data)):
        whole = Image.open(io.BytesIO(data))
        whole.seek(number)
        alone = Image.open(io.BytesIO(extract(data, offset)))
        assert np.array_equal(np.asarray(alone), np.asarray(whole))
        assert getattr(alone, "n_frames", 1) == 1
    assert number == 2


def test_a_chain_that_leads_back_or_nowhere_ends() -> None:
    data = bytearray(tiff(pages(2)))
    first, second = offsets(bytes(data))
    (count,) = struct.unpack_from("<H", data, second)
    for leads_to, expected in ((first, [first, second]), (len(data) + 9, [first, second, len(data) + 9])):
        struct.pack_into("<I", data, second + 2 + 12 * count, leads_to)
        assert offsets(bytes(data)) == expected


@given(st.data())
def test_damaged_directories_are_pages_or_a_reason(data) -> None:
    broken = bytearray(_LETTER)
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(4, len(broken) - 1))] = data.draw(st.integers(0, 255))
    directory_offsets = offsets(bytes(broken[: data.draw(st.integers(0, len(broken)))]))

    for offset in directory_offsets[:5]:
        with contextlib.suppress(ValueError):
            assert offsets(extract(bytes(broken), offset))


_LETTER = tiff(pages(2), compression="tiff_lzw")
_LARGE = {
    "jpeg": _encoded(SCENE, "JPEG"),
    "jpeg2000": _encoded(SCENE, "JPEG2000"),
    "jpeg2000 in tiles": _encoded(SCENE, "JPEG2000", tile_size=(256, 256)),
    "jpeg2000 codestream": _encoded(SCENE, "JPEG2000", no_jp2=True),
    "tiff pyramid": tiff([SCENE, reduced_copy(SCENE, 2), reduced_copy(SCENE, 4)], compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", _LARGE)
def test_a_scan_above_the_limit_is_read_reduced(name: str) -> None:
    image = open_image(_LARGE[name], max_pixels=803 * 803 // 3, needed_side=100)

    assert (image.width, image.height) == (803, 803)
    assert 100 <= min(image.rgb.size) <= 201
    small = image.rgb.convert("RGB").resize((64, 64), Image.Resampling.BOX, image.box)
    gap = np.abs(np.asarray(small, int) - np.asarray(SCENE.convert("RGB").resize((64, 64), Image.Resampling.BOX), int))
    assert gap.mean() < 3


@pytest.mark.parametrize("name", _LARGE)
def test_read_whole_it_is_above_the_limit(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(_LARGE[name], max_pixels=803 * 803 - 1)

    assert (caught.value.code, caught.value.width, caught.value.height) == ("too_many_pixels", 803, 803)


@pytest.mark.parametrize("data", [_encoded(SCENE, "JPEG", progressive=True), _encoded(SCENE, "PNG"), tiff([SCENE])])
def test_what_takes_its_whole_memory_anyway_stays_above_the_limit(data: bytes) -> None:
    with pytest.raises(ImageError, match="803 x 803"):
        open_image(data, max_pixels=803 * 803 // 3, needed_side=100)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_pyramid_is_turned_as_its_page_is(orientation: int) -> None:
    image = SCENE.resize((800, 400))
    data = tiff([image, reduced_copy(image, 2)], tiffinfo={274: orientation})

    whole, small = open_image(data, 10**9), open_image(data, 10**9, needed_side=100)

    assert (small.width, small.height) == (whole.width, whole.height)
    assert small.rgb.size == (whole.width // 2, whole.height // 2)
    gap = np.asarray(small.rgb.convert("RGB").resize((50, 50)), int) - np.asarray(
        whole.rgb.convert("RGB").resize((50, 50)), int
    )
    assert np.abs(gap).mean() < 3


def test_a_jpeg_2000_whose_lower_resolutions_are_damaged_is_read_whole_or_fails() -> None:
    data = _LARGE["jpeg2000"]
    offset = data.find(b"\xff\x52") + 9
    levels = data[offset]

    more = data[:offset] + bytes([levels + 1]) + data[offset + 1 :]  # a level that is not there

    with pytest.raises(ImageError):
        open_image(more, 10**9, needed_side=2)
