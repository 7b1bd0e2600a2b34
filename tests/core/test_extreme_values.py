"""Whatever an image, a header, a name or a text says: a row, or a row with a reason; and its neighbours are fine."""

from __future__ import annotations

import io
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import pipeline
from captioner.config import CaptionConfig, ModelConfig, SourceConfig
from captioner.console.trying import try_images
from captioner.data import CAPTIONS_SCHEMA, ERROR_CODES, Captions, DecodedImage, PixelSpec, RawImage
from captioner.errors import OK, SourceError, UsageError
from captioner.imaging import IMAGE_SCHEMA, decode_images
from captioner.imaging.pillow import one_line
from captioner.sources import open_source
from captioner.sources.reading import read_images
from captioner.steps import Caption, caption_or_reasons
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import FakeCaptioner, make_folder

SPEC = PixelSpec(height=8, width=8)
PIXELS = np.zeros((8, 8, 3), np.uint8)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


HUGE = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**30]


def headers_that_claim(size: int) -> dict[str, bytes]:
    """Files of formats whose headers hold a width of text, of 32 and of 64 bits."""
    low = size % 2**32
    return {
        "ppm": f"P6\n{size} 1\n255\n".encode(),
        "pgm": f"P5\n1 {size}\n255\n".encode(),
        "png": png()[:16] + struct.pack(">II", low, 1) + png()[24:],
        "bmp": b"BM" + struct.pack("<IHHIIIiHHIIIIII", 58, 0, 0, 54, 40, low, 1, 1, 24, 0, 4, 0, 0, 0, 0)[:-2],
        "tif": b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHIII", 256, 4, 1, low, 257, 4, 1, 1, 0),
        "gif": b"GIF89a" + struct.pack("<HH", low % 2**16, 1) + b"\0\0\0,",
        "xpm": f'/* XPM */\nstatic char *x[] = {{"{size} 1 1 1",\n"a c #000000",\n"a"}};'.encode(),
        "xbm": f"#define x_width {size}\n#define x_height 1\nstatic char x_bits[] = {{0}};".encode(),
        "qoi": b"qoif" + struct.pack(">IIBB", low, 1, 3, 0),
        "psd": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 1, low, 8, 3) + bytes(12),
        "dds": b"DDS " + struct.pack("<IIII", 124, 0x1007, 1, low) + bytes(108),
        "sun": struct.pack(">IIIIIIII", 0x59A66A95, low, 1, 24, 3, 1, 0, 0),
        "fits": f"SIMPLE  =                    T{'':50}NAXIS1  = {size:>20}{'':50}".encode().ljust(2880),
        "im": f"Image type: Grayscale image\r\nImage size (x*y): {size}.5*1e400\r\n".encode().ljust(511, b"\0")
        + b"\x1a",
    }


@pytest.mark.parametrize("size", HUGE)
def test_a_header_may_claim_any_size(size: int) -> None:
    files = headers_that_claim(size)
    raws = [RawImage(f"x.{name}", f"x.{name}", data) for name, data in {**files, "good": png()}.items()]

    rows = decode_images(raws, SPEC, 300_000_000).rows.to_pylist()

    assert [row["image_id"] for row in rows] == [raw.image_id for raw in raws]
    assert all(row["error_code"] in ERROR_CODES and row["error_message"] for row in rows[:-1])
    assert (rows[-1]["error_code"], rows[-1]["width"]) == ("", 8)


numbers = st.one_of(st.integers(), st.sampled_from(HUGE), st.floats(), st.none())
texts = st.one_of(st.text(), st.text(st.characters()), st.just("\ud800"), st.just("\0" * 3))
decoded_images = st.builds(
    DecodedImage,
    pixels=st.sampled_from([None, PIXELS, PIXELS[:3]]),
    width=numbers,
    height=numbers,
    format=texts,
    error_code=st.sampled_from(["", "decode_error"]),
    error_message=texts,
)


@settings(max_examples=200)
@given(st.lists(decoded_images, min_size=1, max_size=6))
def test_whatever_a_decoder_answers_there_is_a_row_for_each_image(answers: list[DecodedImage]) -> None:
    raws = [RawImage(str(index), "", bytes([index])) for index in range(len(answers))] + [RawImage("good", "", b"x")]
    good = DecodedImage(PIXELS, 8, 8, "png")

    batch = decode_images(raws, SPEC, 100, lambda images: iter([*answers, good]))

    batch.rows.validate(full=True)
    assert batch.rows.schema == IMAGE_SCHEMA
    assert batch.rows["image_id"].to_pylist() == [raw.image_id for raw in raws]
    assert batch.rows["error_code"].to_pylist()[-1] == ""
    assert len(batch.pixels) == len(raws)


def test_an_image_that_makes_the_decoder_raise_fails_alone() -> None:
    def decode_each(images):
        for data in images:
            if data == b"strange":
                raise OSError("no room for it")
            yield DecodedImage(PIXELS, 8, 8, "png")

    raws = [RawImage(str(index), "", data) for index, data in enumerate([b"1", b"strange", b"2", b"strange", b"3"])]
    codes = decode_images(raws, SPEC, 100, decode_each).rows["error_code"].to_pylist()

    assert codes == ["", "decode_error", "", "decode_error", ""]


ODD_ERRORS = [AssertionError(), KeyError(320), ValueError((3, 16)), IndexError("0x1f")]
ODD_ERRORS += [OverflowError("Python int too large to convert to C ssize_t"), struct.error("unpack requires a buffer")]


@pytest.mark.parametrize("error", ODD_ERRORS)
def test_a_reason_is_words(error: Exception) -> None:
    assert one_line(error).startswith("the file holds something that its decoder does not expect (")
    assert type(error).__name__ in one_line(error)
    assert one_line(OSError("broken data stream")) == "broken data stream"
    assert one_line(ValueError(b"Token too long in file header: 1000")) == "Token too long in file header: 1000"


def test_captions_that_do_not_fit_the_table_fail_alone() -> None:
    class Odd(FakeCaptioner):
        def caption(self, pixels: np.ndarray) -> Captions:
            strange = [int(image[0, 0, 0]) for image in pixels]
            texts = ["\ud800" if value == 1 else "fine" for value in strange]
            tokens = [2**31 if value == 2 else 3 for value in strange]
            texts = texts[:-1] if 3 in strange else texts
            return Captions(texts, tokens, [-0.5] * len(pixels), [True] * len(pixels))

    pixels = np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)

    results = caption_or_reasons(Odd(), pixels)

    assert [isinstance(result, Caption) for result in results] == [True, False, False, False, True, True, True, True]


@dataclass(frozen=True)
class Strange:
    """A source that raises where one of the rows is strange, and says how often it was asked."""

    strange: frozenset[int]
    calls: list[int]

    def read(self, rows: pa.Table) -> list[RawImage]:
        self.calls.append(rows.num_rows)
        ids = rows["image_id"].to_pylist()
        if self.strange.intersection(map(int, ids)):
            raise ValueError("embedded null byte")
        return [RawImage(image_id, image_id, b"data") for image_id in ids]


@given(st.sets(st.integers(0, 31), max_size=3))
def test_an_image_that_makes_reading_raise_fails_alone(strange: set[int]) -> None:
    source, rows = Strange(frozenset(strange), []), pa.table({"image_id": [str(number) for number in range(32)]})

    images = read_images(source, rows)

    assert [image.image_id for image in images] == rows["image_id"].to_pylist()
    assert {int(image.image_id) for image in images if image.error_code} == strange
    assert len(source.calls) <= 1 + 2 * 5 * len(strange)


def test_a_fault_of_the_whole_source_is_never_rows() -> None:
    class Gone:
        def read(self, rows: pa.Table) -> list[RawImage]:
            raise SourceError("gone")

    with pytest.raises(SourceError, match="gone"):
        read_images(Gone(), pa.table({"image_id": ["a", "b"]}))


def test_names_and_texts_that_no_file_and_no_utf8_may_hold_are_rows(tmp_path) -> None:
    (tmp_path / "good.png").write_bytes(png())
    names = ["good.png", "null\0byte.png", "half\ud83dpair.png", "byte\udcff.png", "n" * 5000, "../" * 2000 + "x"]
    lines = [json.dumps({"path": name, "id": name, "caption": f"of {name[:20]}"}) for name in names]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig(path=str(tmp_path / "list.jsonl"), id_column="id"))

    (listing,) = source.list_unit(*source.units())
    images = read_images(source, listing.rows)

    assert [image.error_code for image in images] == ["", *["not_found"] * 5]
    assert len(set(listing.rows["image_id"].to_pylist())) == 6


def test_a_folder_whose_path_is_not_utf8_is_captioned_and_proven(tmp_path, capsys) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    config = caption_config(make_folder(folder, 4), tmp_path / "out")

    assert pipeline.run(config) == OK
    before = rows_of(tmp_path / "out")
    capsys.readouterr()
    assert pipeline.run(config) == OK

    assert "nothing to do" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == before
    assert [row["status"] for row in before] == ["ok"] * 4
    assert verify(open_table(str(tmp_path / "out"))).proven


def test_an_out_whose_path_is_not_utf8_is_refused_in_one_line(tmp_path) -> None:
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")

    with pytest.raises(UsageError, match=r"caf\\udce9': its name is not UTF-8; rename it") as refused:
        pipeline.run(caption_config(make_folder(tmp_path / "images", 2), out))

    assert "\n" not in str(refused.value)


def test_text_in_parquet_that_is_not_utf8_is_shown_with_escapes(tmp_path) -> None:
    def not_utf8(*values: bytes) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())

    captions = pa.ListArray.from_arrays([0, 1, 2], not_utf8(b"caf\xe9", b"fine"))
    table = pa.table(
        {"image": [png()] * 2, "id": not_utf8(b"\xff", b"b"), "captions": captions, "note": not_utf8(b"\xfe", b"c")}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(SourceConfig(path=str(tmp_path / "t.parquet"), id_column="id", keep_columns=["note"]))

    (listing,) = source.list_unit(*source.units())

    assert listing.rows["image_id"].to_pylist() == ["%FF", "b"]
    assert listing.rows["reference_captions"].to_pylist() == [["caf%E9"], ["fine"]]
    assert listing.rows["note"].to_pylist() == ["%FE", "c"]


def settings_of(root, **source) -> CaptionConfig:
    return CaptionConfig.model_validate(
        {
            "source": {"path": str(root / "images"), **source},
            "model": {"name": "fake"},
            "output": {"path": str(root / "out")},
        }
    )


def test_a_run_goes_on_past_headers_of_any_size(tmp_path) -> None:
    make_folder(tmp_path / "images", 20)
    for size in HUGE:
        for name, data in headers_that_claim(size).items():
            (tmp_path / "images" / f"zz-{size}.{name}").write_bytes(data)

    assert pipeline.run(settings_of(tmp_path)) == OK

    rows = pa.concat_tables(read_parts(open_table(str(tmp_path / "out"))))
    assert rows.schema == CAPTIONS_SCHEMA
    assert rows["status"].to_pylist() == ["ok"] * 20 + ["failed"] * (rows.num_rows - 20)


def test_try_captions_the_others(tmp_path, capsys) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "zz.ppm").write_bytes(headers_that_claim(2**32)["ppm"])

    assert try_images([str(tmp_path / "good.png"), str(tmp_path / "zz.ppm")], [ModelConfig(name="fake")]) == OK

    printed = capsys.readouterr()
    assert "good.png: picture" in printed.out
    assert "zz.ppm: too_many_pixels: 4294967296 x 1 pixels" in printed.err


def test_exclude_may_change_until_an_image_is_captioned(tmp_path, capsys) -> None:
    make_folder(tmp_path / "images", 4)
    config = settings_of(tmp_path)
    assert (
        pipeline.run(config.model_copy(update={"output": config.output.model_copy(update={"plan_only": True})})) == OK
    )

    assert pipeline.run(settings_of(tmp_path, exclude=["000003.png"])) == OK

    assert "planning again" in capsys.readouterr().err
    ids = pa.concat_tables(read_parts(open_table(str(tmp_path / "out")))).column("image_id").to_pylist()
    assert ids == ["000000.png", "000001.png", "000002.png"]
