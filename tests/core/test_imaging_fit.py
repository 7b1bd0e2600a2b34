"""Resizing and cropping: what transformers' image processors give, without the whole image in memory."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from captioner.data import PixelSpec
from captioner.imaging import decode, open_image

NO_LIMIT = 300_000_000


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@functools.cache
def scenery(width: int, height: int) -> Image.Image:
    """Gradients, soft noise and hard edges, as photos have them."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    image = Image.fromarray((values * 0.7 + random.integers(0, 77, values.shape)).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(1))
    for _ in range(12):
        left, top = int(random.integers(0, width)), int(random.integers(0, height))
        image.paste(tuple(random.integers(0, 256, 3).tolist()), (left, top, left + width // 9, top + height // 9))
    return image


OPTIONS = {"JPEG": {"quality": 92}, "PNG": {"compress_level": 1}}
AS_BYTES = {"do_normalize": False, "do_rescale": False}
SIZES = [(640, 480), (481, 641), (300, 300), (225, 224), (97, 61), (1000, 180), (2500, 1700)]


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["clip", "clip padded", "vit", "blip"])
def test_pixels_are_those_of_transformers(kind, size, format):
    if kind.startswith("clip"):
        from transformers import CLIPImageProcessorPil

        edge, height, width = (224, 224, 224) if kind == "clip" else (100, 151, 120)
        crop = {"height": height, "width": width}
        processor = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=crop, **AS_BYTES)
        spec = PixelSpec(height, width, "shortest_edge", edge)
    elif kind == "vit":
        from transformers import ViTImageProcessorPil

        processor, spec = ViTImageProcessorPil(**AS_BYTES), PixelSpec(224, 224, resample="bilinear")
    else:
        from transformers import BlipImageProcessorPil

        processor, spec = BlipImageProcessorPil(**AS_BYTES), PixelSpec(384, 384)
    data = encode(scenery(*size), format, **OPTIONS[format])
    with Image.open(io.BytesIO(data)) as image:
        expected = processor(images=image.convert("RGB"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)

    pixels = decode(data, spec, NO_LIMIT).pixels

    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(float) - expected).mean() <= 1


@pytest.mark.parametrize("size", [(584, 256), (585, 257), (257, 585)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_scaled_down_while_decoded_looks_the_same(size, orientation):
    """Odd sizes leave a fraction of the last column and row empty, on whichever side the orientation puts them."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encode(scenery(*size), "JPEG", quality=92, exif=tags)
    spec = PixelSpec(16, 16, "shortest_edge", 16)
    whole = open_image(data, NO_LIMIT)

    decoded = decode(data, spec, NO_LIMIT)

    expected = decode(encode(whole.rgb, "PNG", compress_level=1), spec, NO_LIMIT)
    assert (decoded.width, decoded.height) == (expected.width, expected.height) == whole.rgb.size
    assert np.abs(decoded.pixels.astype(float) - expected.pixels).mean() <= 0.5


def test_only_a_needed_side_makes_a_jpeg_smaller_and_never_below_it():
    data = encode(scenery(1603, 1201), "JPEG")

    whole, smaller = open_image(data, NO_LIMIT), open_image(data, NO_LIMIT, needed_side=300)

    assert whole.rgb.size == (1603, 1201)
    assert whole.box == (0, 0, 1603, 1201)
    assert smaller.rgb.size == (401, 301)
    assert smaller.box == (0, 0, 400.75, 300.25)
    assert (smaller.width, smaller.height) == (1603, 1201)


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (1, 1), (2, 3), (100_000, 3)])
@pytest.mark.parametrize("spec", [PixelSpec(224, 224, "shortest_edge", 224), PixelSpec(32, 48)])
def test_extreme_shapes_fit(size, spec):
    """Scaled whole, a strip of 10000 x 1 would be 224 x 2240000 pixels."""
    decoded = decode(encode(Image.new("RGB", size, (10, 200, 30)), "PNG"), spec, NO_LIMIT)

    assert (decoded.width, decoded.height) == size
    assert (decoded.pixels == (10, 200, 30)).all()


def test_the_centre_of_a_strip_is_what_is_seen():
    strip = Image.new("RGB", (3001, 10), "blue")
    strip.paste("red", (1495, 0, 1506, 10))

    pixels = decode(encode(strip, "PNG"), PixelSpec(64, 64, "shortest_edge", 64), NO_LIMIT).pixels

    assert (pixels[:, 2:-2] == (255, 0, 0)).all()


def test_what_a_crop_does_not_reach_is_black_on_both_sides():
    spec = PixelSpec(11, 20, "shortest_edge", 8)

    pixels = decode(encode(Image.new("RGB", (30, 30), "white"), "PNG"), spec, NO_LIMIT).pixels

    expected = np.zeros((11, 20, 3), np.uint8)
    expected[2:10, 6:14] = 255
    assert (pixels == expected).all()
