"""Every Pillow mode comes out as the colours a person sees: scaled, not clipped; transparency over white."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from captioner.data import PixelSpec
from captioner.imaging import decode, open_image
from captioner.imaging.opening import to_rgb

NO_LIMIT = 1_000_000
WHITE, RED, PINK = (255, 255, 255), (255, 0, 0), (255, 127, 127)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def opened(image: Image.Image, format: str, **options) -> np.ndarray:
    return np.asarray(open_image(encode(image, format, **options), NO_LIMIT).rgb).astype(int)


def ramp() -> Image.Image:
    """A smooth image that uses all three channels."""
    y, x = np.mgrid[0:64, 0:96]
    return Image.fromarray(np.stack([x * 255 // 95, y * 255 // 63, 255 - x * 255 // 95], axis=-1).astype(np.uint8))


def to_lab(image: Image.Image) -> Image.Image:
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        "RGB",
        "LAB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    return ImageCms.applyTransform(image, transform)


# --- modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGBX", "TIFF", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("P", "GIF", {}),
        ("P", "TIFF", {}),
        ("CMYK", "TIFF", {}),
        ("CMYK", "JPEG", {"quality": 95, "subsampling": 0}),
        ("YCbCr", "TIFF", {"compression": "tiff_lzw"}),
        ("YCbCr", "JPEG", {"quality": 95, "subsampling": 0}),
        ("LAB", "TIFF", {}),
    ],
)
def test_colour_modes_come_back_as_they_were(mode, format, options):
    image = to_lab(ramp()) if mode == "LAB" else ramp().convert(mode)
    expected = image.convert("RGB") if mode == "P" else ramp()

    difference = np.abs(opened(image, format, **options) - np.asarray(expected))

    assert difference.mean() <= 2
    assert difference.max() <= 40


@pytest.mark.parametrize(
    ("mode", "format"), [("1", "PNG"), ("1", "TIFF"), ("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("LA", "TIFF")]
)
def test_grey_modes_come_back_as_they_were(mode, format):
    image = ramp().convert(mode)

    difference = np.abs(opened(image, format) - np.asarray(ramp().convert(mode).convert("RGB")))

    assert difference.mean() <= 1


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_pillow_converts(mode):
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA")}.get(mode, (mode,))
    image = ramp()
    for step in steps:
        image = image.convert(step)

    converted = to_rgb(image)

    assert converted.mode == "RGB"
    grey = mode in ("1", "L", "LA", "La")
    expected = ramp().convert("L").convert("RGB") if grey else ramp()
    assert np.abs(np.asarray(converted).mean((0, 1)) - np.asarray(expected).mean((0, 1))).max() <= 20


# --- transparency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_half_transparent_is_half_white(mode):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "PA":
        image = Image.merge("PA", (image.convert("RGB").convert("P"), image.getchannel("A")))
    elif mode in ("LA", "La"):
        image = image.convert("LA").convert(mode)
    elif mode == "RGBa":
        image = image.convert(mode)

    half, none = np.asarray(to_rgb(image)).astype(int)[0]

    expected = (165, 165, 165) if mode in ("LA", "La") else PINK  # luminance of red is 76
    assert np.abs(half - expected).max() <= 2
    assert none.tolist() == [255, 255, 255]


def test_black_under_full_transparency_is_white_in_the_models_pixels():
    data = encode(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG")

    assert (decode(data, PixelSpec(16, 16), NO_LIMIT).pixels == 255).all()


@pytest.mark.parametrize(("format", "transparency"), [("PNG", 1), ("PNG", bytes([255, 0])), ("GIF", 1)])
def test_a_transparent_palette_entry_is_white(format, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)

    assert opened(image, format, transparency=transparency).tolist() == [[list(RED), list(WHITE)]]


@pytest.mark.parametrize(
    ("mode", "shown", "hidden"),
    [("RGB", RED, (0, 0, 255)), ("L", 77, 12), ("1", 255, 0), ("I;16", 257 * 77, 257 * 12)],
)
def test_a_transparent_colour_is_white(mode, shown, hidden):
    image = Image.new(mode, (2, 1), shown)
    image.putpixel((1, 0), hidden)
    grey = {"RGB": RED, "1": WHITE}.get(mode, (77, 77, 77))

    assert opened(image, "PNG", transparency=hidden).tolist() == [[list(grey), list(WHITE)]]


def png(bits: int, colour: int, row: bytes, width: int, transparent: bytes) -> bytes:
    """A PNG of one row with a transparent colour, in a depth that Pillow does not write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)),
        (b"tRNS", transparent),
        (b"IDAT", zlib.compress(b"\0" + row)),
        (b"IEND", b""),
    ]
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (png(1, 0, bytes([0b10000000]), 2, b"\0\0"), [255, 255]),
        (png(2, 0, bytes([0b01100000]), 2, b"\0\1"), [255, 170]),
        (png(4, 0, bytes([0x57]), 2, b"\0\7"), [85, 255]),
        (png(4, 0, bytes([0x57]), 2, b"\1\7"), [85, 255]),  # of which 4 bits count
        (png(8, 0, bytes([100, 101]), 2, b"\0\x64"), [255, 101]),
        (png(16, 0, b"\x12\x34\x12\x36", 2, b"\x12\x34"), [255, 18]),
        (png(8, 2, b"\x10\x20\x30\x10\x20\x31", 2, b"\0\x10\0\x20\0\x30"), [255, 16]),
        (png(16, 2, b"\x10\x11\x20\x21\x30\x31\x10\x11\x20\x21\x31\x31", 2, b"\x10\x11\x20\x21\x30\x31"), [255, 16]),
    ],
)
def test_the_transparent_colour_of_a_png_is_white_in_every_depth(data, shown):
    assert np.asarray(open_image(data, NO_LIMIT).rgb)[0, :, 0].tolist() == shown


# --- more than 8 bits -------------------------------------------------------------------------------------------


def tiff(bits: int, pixels: bytes, width: int, photometric: int = 1) -> bytes:
    """A grey little-endian TIFF of one row, as no writer at hand makes it."""
    tags = [
        *((256, 3, 1, width), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric)),
        *((273, 4, 1, 8 + 2 + 9 * 12 + 4), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, len(pixels))),
    ]
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\x00" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + pixels


SIXTEEN = np.array([[0, 257, 32768, 65278, 65535]], np.uint16)
SIXTEEN_AS_EIGHT = [0, 1, 128, 254, 255]
SIXTEEN_BIT_FILES = {
    "png": encode(Image.fromarray(SIXTEEN), "PNG"),
    "tiff": encode(Image.fromarray(SIXTEEN), "TIFF"),
    "tiff, big-endian": encode(Image.frombytes("I;16B", (5, 1), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
    "pgm": b"P5 5 1 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "jpeg 2000": encode(Image.fromarray(SIXTEEN), "JPEG2000"),
}


@pytest.mark.parametrize("name", SIXTEEN_BIT_FILES)
def test_16_bits_are_scaled_not_clipped(name):
    image = open_image(SIXTEEN_BIT_FILES[name], NO_LIMIT).rgb

    assert np.asarray(image)[0, :, 0].tolist() == SIXTEEN_AS_EIGHT


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_16_bit_modes_of_every_byte_order(mode):
    order = ">u2" if mode == "I;16B" else "<u2"

    image = to_rgb(Image.frombytes(mode, (5, 1), SIXTEEN.astype(order).tobytes()))

    assert np.asarray(image)[0, :, 0].tolist() == SIXTEEN_AS_EIGHT


def test_12_bits_fill_their_own_range():
    image = open_image(tiff(12, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00]), 4), NO_LIMIT).rgb

    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255, 0]


def test_a_tiff_whose_zero_is_white_is_not_a_negative():
    image = open_image(tiff(16, SIXTEEN.astype("<u2").tobytes(), 5, photometric=0), NO_LIMIT).rgb

    assert np.asarray(image)[0, :, 0].tolist() == [255 - value for value in SIXTEEN_AS_EIGHT]


def test_unsigned_32_bits_are_not_negative():
    values = np.array([0, 2**31, 2**32 - 1], "<u4")

    image = open_image(tiff(32, values.tobytes(), 3), NO_LIMIT).rgb

    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255]


def test_a_pgm_with_an_odd_maximum_uses_it():
    image = open_image(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023), NO_LIMIT).rgb

    assert np.asarray(image)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([1000.0, 2000.0, 3000.0], [0, 128, 255]),
        ([float("nan"), 0.5, float("inf")], [0, 128, 0]),
        ([float("nan"), float("nan"), float("-inf")], [0, 0, 0]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([7000.0, 7000.0, 7000.0], [0, 0, 0]),
    ],
)
def test_float_values_are_scaled_by_their_range(values, expected):
    assert opened(Image.fromarray(np.array([values], np.float32)), "TIFF")[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 1], [0, 1, 1]),
        ([0, 100, 255], [0, 100, 255]),
        ([0, 500, 1000], [0, 128, 255]),
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),
    ],
)
def test_32_bit_integers_are_scaled_by_their_range(values, expected):
    assert opened(Image.fromarray(np.array([values], np.int32)), "TIFF")[0, :, 0].tolist() == expected
