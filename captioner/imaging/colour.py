"""Convert an image of any Pillow mode to RGB, with transparent parts over white.

Colours are taken as they are stored; embedded ICC profiles are not applied, as image processors do not apply
them either. Values that 8 bits cannot hold are scaled, never clipped (Pillow's own `convert` clips):

    16-bit                   full range: 65535 -> 255; a 12-bit TIFF: 4095 -> 255
    32-bit integer, float    NaN and infinity are black; then by the range of the values:
        0..1, float only     times 255
        0..255               as they are
        anything else        lowest -> 0, highest -> 255
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def to_rgb(image: Image.Image) -> Image.Image:
    """`image`, loaded, as mode RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _lab_to_srgb()) or image
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


@functools.cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


def _grey(image: Image.Image) -> npt.NDArray[np.uint8]:
    """An image of one wide channel as uint8 [H, W]."""
    values = np.asarray(image)
    highest = _full_scale(image)
    grey = _scale_by_range(values) if highest is None else _scale_full(values, highest)
    if getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey


def _full_scale(image: Image.Image) -> int | None:
    """The value of full white where the file's type says so."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS_PER_SAMPLE, (16,))
        return (1 << int(bits[0])) - 1
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled its maximum to 65535
        return 65535
    return None


def _scale_full(values: npt.NDArray[Any], highest: int) -> npt.NDArray[np.uint8]:
    scaled = values.astype(np.uint32)
    scaled *= 255
    scaled += highest // 2
    scaled //= highest
    return np.minimum(scaled, 255, out=scaled).astype(np.uint8)


def _scale_by_range(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    low, high = float(values[finite].min()), float(values[finite].max())
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    scaled = np.where(finite, values, low).astype(np.float64)
    scaled -= low
    scaled *= 255 / (high - low) if high > low else 0
    return np.where(finite, np.rint(scaled), 0).astype(np.uint8)
