"""Bytes -> pixels or a reason: orientation, first frames, damage, bombs, foreign files, batches."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, PngImagePlugin, features

from captioner.data import CAPTIONS_SCHEMA, ERROR_CODES, PixelSpec, RawImage
from captioner.imaging import ImageError, decode, decode_images, formats, open_image

SPEC = PixelSpec(height=32, width=48)
NO_LIMIT = 300_000_000
RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Four colours, so that every turn and flip shows."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(YELLOW, (width // 2, height // 2, width, height))
    return image


def noise(mode: str = "RGB", width: int = 60, height: int = 50, seed: int = 0) -> Image.Image:
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values)


def assert_close(pixels, expected, mean: float) -> None:
    difference = np.abs(np.asarray(pixels, float) - np.asarray(expected, float))
    assert difference.mean() <= mean, f"mean difference {difference.mean():.2f} of 255"


# --- orientation ------------------------------------------------------------------------------------------------

STORED_FROM_UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    method = STORED_FROM_UPRIGHT[orientation]
    return upright if method is None else upright.transpose(method)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_image_is_upright(orientation, format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    data = encode(stored(quadrants(), orientation), format, exif=exif(orientation), quality=95)

    decoded = decode(data, SPEC, NO_LIMIT)

    assert (decoded.width, decoded.height, decoded.format) == (48, 32, format.lower())
    assert_close(decoded.pixels, quadrants(), mean=12)  # another quadrant's colour is 85 or more away


def test_orientation_in_xmp_counts():
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="3"/>')

    image = open_image(encode(stored(quadrants(), 3), "PNG", pnginfo=xmp), NO_LIMIT)

    assert_close(image.rgb, quadrants(), mean=0)


@pytest.mark.parametrize(
    "damaged", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\x7f", exif(6).tobytes()[:-9]]
)
def test_malformed_exif_is_ignored(damaged):
    decoded = decode(encode(quadrants(), "JPEG", exif=damaged), SPEC, NO_LIMIT)

    assert decoded.error_code == ""
    assert decoded.pixels is not None


# --- first frame or page ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_frame_counts(format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    frames = [Image.new("RGB", (48, 32), colour) for colour in (RED, GREEN, BLUE)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])

    decoded = decode(data, SPEC, NO_LIMIT)

    assert decoded.format == format.lower()
    assert_close(decoded.pixels, frames[0], mean=3)


def test_an_animated_png_is_its_first_frame_and_not_the_stand_in():
    frames = [Image.new("RGB", (48, 32), colour) for colour in (GREEN, RED, BLUE)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)

    assert_close(decode(data, SPEC, NO_LIMIT).pixels, frames[1], mean=0)


@pytest.mark.parametrize("stand_in", [False, True])
@pytest.mark.parametrize("damage", ["dropped", "empty", "zeros", "twice", "checksum", "cut"])
def test_an_animated_png_with_damage_in_later_frames_is_an_image(stand_in, damage):
    frames = [Image.new("RGB", (48, 32), colour) for colour in (GREEN, RED, BLUE)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=stand_in)
    starts = [match.start() - 4 for match in re.finditer(b"fcTL|fdAT", data)]
    for start in starts[2 if stand_in else 1 :]:  # after the first frame
        length = int.from_bytes(data[start : start + 4], "big")
        body, end = start + 8, start + 12 + length
        damaged = {
            "dropped": data[:start] + data[end:],
            "empty": data[:start] + bytes(4) + data[start + 4 : body] + data[end - 4 :],
            "zeros": data[:body] + bytes(length) + data[end - 4 :],
            "twice": data[:end] + data[start:],
            "checksum": data[: end - 4] + b"????" + data[end:],
            "cut": data[: body + length // 2],
        }[damage]

        pixels = decode(damaged, SPEC, NO_LIMIT).pixels

        # Where the animation is refused as a whole, the stand-in is shown.
        assert pixels is not None
        assert pixels[0, 0].tolist() in ([list(RED), list(GREEN)] if stand_in else [list(GREEN)])


# --- damage -----------------------------------------------------------------------------------------------------

FILES = {
    "JPEG": encode(noise(), "JPEG"),
    "PNG": encode(noise(), "PNG"),
    "GIF": encode(noise(), "GIF"),
    "WEBP": encode(noise(), "WEBP"),
    "TIFF": encode(noise(), "TIFF"),
    "TIFF, compressed": encode(noise(), "TIFF", compression="tiff_lzw"),
    "BMP": encode(noise(), "BMP"),
    "PPM": encode(noise(), "PPM"),
    "TGA": encode(noise(), "TGA"),
    "ICO": encode(noise(), "ICO", sizes=[(60, 50)]),
    "JPEG2000": encode(noise(), "JPEG2000"),
}


def assert_well_formed(decoded) -> None:
    """Either pixels of the right shape or a code of the closed list with one line of explanation."""
    if decoded.error_code:
        assert decoded.pixels is None
        assert decoded.error_code in ERROR_CODES
        assert decoded.error_message.isprintable()
        assert 0 < len(decoded.error_message) <= 200
    else:
        assert decoded.pixels.shape == (SPEC.height, SPEC.width, 3)
        assert decoded.pixels.dtype == np.uint8
        assert decoded.width > 0
        assert decoded.height > 0
        assert decoded.format


@pytest.mark.parametrize("name", FILES)
def test_whole_files_decode(name):
    decoded = decode(FILES[name], SPEC, NO_LIMIT)

    assert decoded.error_code == ""
    assert (decoded.width, decoded.height) == (60, 50)
    assert_well_formed(decoded)


@given(name=st.sampled_from(sorted(FILES)), cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=300, deadline=None)
def test_any_prefix_of_a_file_gives_pixels_or_a_code(name, cut):
    data = FILES[name]

    assert_well_formed(decode(data[: int(len(data) * cut)], SPEC, NO_LIMIT))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_a_file_cut_off_in_its_pixels_is_truncated_not_half_grey(name, kept):
    data = FILES[name]

    decoded = decode(data[: int(len(data) * kept)], SPEC, NO_LIMIT)

    assert decoded.error_code == "truncated"
    assert decoded.format == name.lower()


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP"])
def test_a_file_cut_off_in_its_header_is_truncated_not_unknown(name):
    decoded = decode(FILES[name][:18], SPEC, NO_LIMIT)

    assert decoded.error_code == "truncated"
    assert decoded.format == name.lower()


def test_size_and_format_of_a_truncated_image_are_kept():
    decoded = decode(FILES["PNG"][:2000], SPEC, NO_LIMIT)

    assert (decoded.error_code, decoded.width, decoded.height, decoded.format) == ("truncated", 60, 50, "png")


@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_changed_bytes_give_pixels_or_a_code(name, changes):
    data = bytearray(FILES[name])
    for fraction, value in changes:
        data[int(len(data) * fraction**3)] = value  # mostly in the header, where it hurts

    assert_well_formed(decode(bytes(data), SPEC, 10_000_000))


SIGNATURES = [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"II*\0", b"MM\0*", b"BM"]
SIGNATURES += [b"P6 ", b"8BPS", b"DDS ", b"\0\0\1\0", b"qoif", b"\0\0\0\x20ftypavif", b"icns", b"BLP2", b"SIMPLE"]


@given(start=st.sampled_from(SIGNATURES), rest=st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_bytes_give_pixels_or_a_code(start, rest):
    assert_well_formed(decode(start + rest, SPEC, 1_000_000))


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), struct.error("short"), SyntaxError("bad"), TypeError("x\x00\ny")]
)
def test_nothing_a_plugin_raises_comes_out(monkeypatch, error):
    def factory(file, name):
        raise error

    monkeypatch.setitem(Image.OPEN, "PNG", (factory, lambda prefix: prefix.startswith(b"\x89PNG")))

    decoded = decode(FILES["PNG"], SPEC, NO_LIMIT)

    assert decoded.error_code in ("decode_error", "truncated")
    assert_well_formed(decoded)


def test_ctrl_c_comes_out(monkeypatch):
    def factory(file, name):
        raise KeyboardInterrupt

    monkeypatch.setitem(Image.OPEN, "PNG", (factory, lambda prefix: prefix.startswith(b"\x89PNG")))

    with pytest.raises(KeyboardInterrupt):
        decode(FILES["PNG"], SPEC, NO_LIMIT)


def test_a_png_with_one_wrong_bit_in_its_pixels_is_never_decoded():
    data = FILES["PNG"]
    first, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for position in range(first, end, (end - first) // 50):
        damaged = bytearray(data)
        damaged[position] ^= 1
        decoded = decode(bytes(damaged), SPEC, NO_LIMIT)
        assert decoded.error_code in ("decode_error", "truncated"), position
        assert_well_formed(decoded)


# --- too large --------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, data) for kind, data in chunks)


def gif_claiming(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + FILES["GIF"][13:]


def test_a_pixel_bomb_is_refused_by_its_header():
    decoded = decode(png_claiming(100_000, 100_000), SPEC, NO_LIMIT)

    assert (decoded.error_code, decoded.width, decoded.height) == ("too_many_pixels", 100_000, 100_000)
    assert "100000 x 100000" in decoded.error_message
    assert "300000000" in decoded.error_message


def test_a_bomb_that_pillow_refuses_while_opening_has_the_same_code():
    assert decode(gif_claiming(65_535, 65_535), SPEC, NO_LIMIT).error_code == "too_many_pixels"


@pytest.mark.parametrize("name", FILES)
def test_the_limit_is_exact(name):
    assert decode(FILES[name], SPEC, 60 * 50).error_code == ""
    assert decode(FILES[name], SPEC, 60 * 50 - 1).error_code == "too_many_pixels"


def test_an_image_inside_an_icon_counts():
    inside = encode(noise(width=200, height=200), "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)

    assert decode(struct.pack("<HHH", 0, 1, 1) + entry + inside, SPEC, 1_000).error_code == "too_many_pixels"


@pytest.mark.parametrize("name", ["TIFF", "WEBP", "PNG"])
def test_pillows_own_limit_is_set_aside_and_put_back(monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)

    assert decode(FILES[name], SPEC, NO_LIMIT).error_code == ""
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt"])
def test_a_png_with_an_oversized_text_or_profile_decodes_without_it(kind):
    whole = encode(quadrants(), "PNG")
    bomb = png_chunk(kind, b"name\x00\x00" + zlib.compress(bytes(50_000_000)))

    decoded = decode(whole[:33] + bomb + whole[33:], SPEC, NO_LIMIT)

    assert_close(decoded.pixels, quadrants(), mean=0)


# --- not images, or not ours ----------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
UNSUPPORTED = {
    "eps": EPS,
    "eps with preview": b"\xc5\xd0\xd3\xc6" + bytes(40) + EPS,
    "wmf": b"\xd7\xcd\xc6\x9a" + struct.pack("<HhhhhHIH", 0, 0, 0, 100, 100, 96, 0, 0) + b"\x01\x00\x09\x00\x00\x03",
    "emf": b"\x01\x00\x00\x00" + bytes(36) + b" EMF" + bytes(60),
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "svg": b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "jpeg xl": b"\xff\x0a\x00\x10" + bytes(30),
}
NO_IMAGES = {
    "html": b"<!DOCTYPE html><html><body><svg></svg>404 Not Found</body></html>",
    "text": b"a plain sentence, nothing more\n" * 5,
    "json": b'{"error": "no such key"}',
    "zip": b"PK\x03\x04" + bytes(60),
    "mp4": b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00isomiso2avc1mp41",
    "zeros": bytes(500),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_formats_of_outside_programs_are_never_opened(monkeypatch, name):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))

    decoded = decode(UNSUPPORTED[name], SPEC, NO_LIMIT)

    assert decoded.error_code == "unsupported_format"
    assert name.split()[0] in decoded.error_message.lower()
    assert started == []


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_said_to_be_none(name):
    assert decode(NO_IMAGES[name], SPEC, NO_LIMIT).error_code == "not_an_image"


def test_an_empty_file_is_said_to_be_empty():
    assert decode(b"", SPEC, NO_LIMIT).error_code == "empty_file"


def test_heif_without_its_extra_names_the_extra(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.available_formats.cache_clear()

    decoded = decode(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(50), SPEC, NO_LIMIT)

    formats.available_formats.cache_clear()
    assert decoded.error_code == "unsupported_format"
    assert "pip install 'captioner[heif]'" in decoded.error_message


@pytest.mark.parametrize("orientation", [1, 6])
def test_heif_with_its_extra_decodes_upright(orientation):
    pytest.importorskip("pillow_heif", reason="the extra heif is not installed").register_heif_opener()
    data = encode(stored(quadrants(), orientation), "HEIF", exif=exif(orientation).tobytes(), quality=95)

    decoded = decode(data, SPEC, NO_LIMIT)

    assert (decoded.width, decoded.height, decoded.format) == (48, 32, "heif")
    assert_close(decoded.pixels, quadrants(), mean=12)


def test_formats_are_told_by_content_not_by_name():
    [row] = decode_images([RawImage("a.jpg", "/a.jpg", FILES["PNG"])], SPEC, NO_LIMIT).rows.to_pylist()

    assert row["format"] == "png"


def test_open_image_raises_what_decode_reports():
    with pytest.raises(ImageError) as raised:
        open_image(b"text", NO_LIMIT)

    assert raised.value.code == "not_an_image"


# --- manners ----------------------------------------------------------------------------------------------------


def test_warnings_stay_inside_in_every_thread():
    warns = encode(quadrants(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
        with ThreadPoolExecutor(8) as threads:
            decoded = list(threads.map(lambda _: decode(warns, SPEC, NO_LIMIT), range(200)))
        after = list(warnings.filters), Image.MAX_IMAGE_PIXELS

    assert {each.error_code for each in decoded} == {""}
    assert caught == []
    assert after == before


def test_importing_loads_nothing_heavy():
    code = "import captioner.imaging, sys; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- batches ----------------------------------------------------------------------------------------------------


def test_a_batch_has_one_row_for_each_image_in_order():
    raws = [
        RawImage("a", "/a", FILES["JPEG"]),
        RawImage("b", "/b", b""),
        RawImage("c", "/c", FILES["PNG"][:1000]),
        RawImage("d", "/d", None, "not_found", "no such\nfile"),
        RawImage("e", "/e", FILES["PNG"]),
    ]

    batch = decode_images(raws, SPEC, NO_LIMIT)

    rows = batch.rows.to_pylist()
    assert [row["image_id"] for row in rows] == ["a", "b", "c", "d", "e"]
    assert [row["uri"] for row in rows] == ["/a", "/b", "/c", "/d", "/e"]
    assert [row["error_code"] for row in rows] == ["", "empty_file", "truncated", "not_found", ""]
    assert [row["num_bytes"] for row in rows] == [len(FILES["JPEG"]), 0, 1000, None, len(FILES["PNG"])]
    assert [row["width"] for row in rows] == [60, None, 60, None, 60]
    assert [row["format"] for row in rows] == ["jpeg", None, "png", None, "png"]
    assert rows[0]["sha256"] == hashlib.sha256(FILES["JPEG"]).hexdigest()
    assert rows[1]["sha256"] is rows[3]["sha256"] is None
    assert rows[0]["error_message"] == ""
    assert rows[3]["error_message"] == "no such file"
    assert batch.pixels.shape == (5, 32, 48, 3)
    assert batch.pixels.dtype == np.uint8
    assert not batch.pixels[1:4].any()


def test_a_bad_neighbour_changes_nothing():
    good = [RawImage(name, name, data) for name, data in FILES.items()]
    bad = RawImage("bad", "bad", FILES["JPEG"][:500])
    mixed = [raw for each in good for raw in (bad, each)]

    alone, beside = decode_images(good, SPEC, NO_LIMIT), decode_images(mixed, SPEC, NO_LIMIT)

    assert (beside.pixels[1::2] == alone.pixels).all()
    assert beside.rows.take(list(range(1, len(mixed), 2))).equals(alone.rows)
    assert alone.pixels.reshape(len(good), -1).any(axis=1).all()


@pytest.mark.parametrize("raws", [[], [RawImage("a", "a", FILES["PNG"])]])
def test_columns_have_the_types_of_the_captions_table(raws):
    batch = decode_images(raws, SPEC, NO_LIMIT)

    assert batch.rows.num_rows == batch.pixels.shape[0] == len(raws)
    for field in batch.rows.schema:
        assert field.type == CAPTIONS_SCHEMA.field(field.name).type
    assert not batch.rows.schema.field("error_code").nullable
    assert not batch.rows.schema.field("error_message").nullable
