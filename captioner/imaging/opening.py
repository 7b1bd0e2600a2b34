"""Open the bytes of a file as an upright RGB image, or raise ImageError. Transparent parts are over white.

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
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, ImageOps

from captioner.imaging.formats import Reduced, identify, open_reduced
from captioner.imaging.pillow import ImageError, code_of, decoding, one_line

_EXIF_ORIENTATION = 0x0112
_UPRIGHT, _TURNED = 1, (5, 6, 7, 8)  # turned: width and height are swapped
_RIGHT_TO_LEFT, _BOTTOM_TO_TOP = (2, 3, 6, 7), (3, 4, 7, 8)  # where a stored image's right and bottom edges end up
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_PNG = b"\x89PNG"
# What a PNG may be decoded without where Pillow refuses it: texts and a colour profile that are too long, and an
# animation with damage, of which the specification says that the still image is shown instead.
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG_ANIMATION = (b"acTL", b"fcTL", b"fdAT")

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True, slots=True)
class UprightImage:
    """An upright RGB image.

    `width`, `height`: of the image in the file. `rgb` is smaller where the model needs no more; the image then fills
    the part `box` of it, which need not end on a whole pixel. Else `box` is all of `rgb`.
    """

    rgb: Image.Image
    box: Box
    width: int
    height: int
    format: str


def open_image(data: bytes, max_pixels: int, needed_side: int = 0) -> UprightImage:
    """Return the first frame or page of a file, with EXIF orientation applied and transparency over white.

    `max_pixels` is compared with the header before the image is allocated. With `needed_side` some formats are decoded
    at a smaller size, each side still >= needed_side, which saves most of the time, and `max_pixels` is then compared
    with the pixels held for that (see `captioner.imaging.formats`). Raises ImageError for every fault of the file.
    """
    if not data:
        raise ImageError("empty_file", "the file has no bytes")
    with decoding(max_pixels):
        try:
            return _open(data, max_pixels, needed_side)
        except ImageError as error:
            unneeded = _PNG_TEXTS if "MAX_TEXT_" in error.message else _PNG_ANIMATION
            simpler = _png_without(unneeded, data) if data.startswith(_PNG) else data
            if len(simpler) == len(data):
                raise
        return _open(simpler, max_pixels, needed_side)


def _open(data: bytes, max_pixels: int, needed_side: int) -> UprightImage:
    file = identify(data)
    format = (file.format or "").lower()
    width, height = file.size
    if file.format == "PNG":
        _scale_transparent_colour(file, data)
    try:
        reduced = _load_reduced(file, data, max_pixels, needed_side) if needed_side else None
        if reduced:
            file = reduced.file
        else:
            _check_pixels(width, height, max_pixels)
            _load_first(file)
            if file.format == "PNG":
                _check_pixels_of_png(data)
            width, height = file.size  # ICO and TIFF know their size only when loaded
            _check_pixels(width, height, max_pixels)
        orientation = _make_upright(file)
        if orientation in _TURNED:
            width, height = height, width
        image = to_rgb(file)
        extent = reduced.extent if reduced else None
        box = _upright_box(extent, orientation, image) if extent else (0, 0, *image.size)
        return UprightImage(image, box, width, height, format)
    except ImageError as error:
        raise ImageError(error.code, error.message, width, height, format) from None
    except Exception as error:
        raise ImageError(code_of(error, data), one_line(error), width, height, format) from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        message = f"{width} x {height} pixels are more than the limit of {max_pixels} (max_pixels)"
        raise ImageError("too_many_pixels", message)


def _load_reduced(file: ImageFile.ImageFile, data: bytes, max_pixels: int, needed_side: int) -> Reduced | None:
    """Decode at a smaller size; return None where the file does not allow it or is too large even so."""
    reduced = open_reduced(file, data, needed_side)
    if reduced is None or reduced.in_memory > max_pixels:
        return None
    try:
        reduced.file.load()
    except Exception:
        if reduced.file is file:
            raise
        return None  # the whole image may still be decodable
    return reduced


def _load_first(file: ImageFile.ImageFile) -> None:
    """Decode the first frame."""
    if getattr(file, "default_image", False) and getattr(file, "n_frames", 1) > 1:
        file.seek(1)  # APNG: frame 0 is for viewers that cannot animate
    file.load()


def _scale_transparent_colour(file: ImageFile.ImageFile, data: bytes) -> None:
    """Bring the transparent colour of a PNG to 8 bits, as its pixels are; Pillow takes it as the file has it.

    Of 16 bits the upper 8 count, as in the pixels. Bits that the file's depth does not have are ignored, says the
    specification. Pillow itself scales 1 bit, and keeps 16 bits of grey.
    """
    if data[12:16] != b"IHDR" or len(data) < 26:
        return
    bits, colour = data[24], file.info.get("transparency")
    mask = (1 << bits) - 1
    if file.mode == "L" and isinstance(colour, int):
        file.info["transparency"] = (colour & mask) * (255 // mask)
    elif file.mode == "RGB" and isinstance(colour, tuple):
        file.info["transparency"] = tuple((value & mask) >> max(0, bits - 8) for value in colour)


def _make_upright(file: ImageFile.ImageFile) -> int:
    """Apply the orientation in EXIF or XMP and return it; malformed EXIF counts as none."""
    try:
        orientation: int = file.getexif().get(_EXIF_ORIENTATION, _UPRIGHT)
        ImageOps.exif_transpose(file, in_place=True)
    except Exception:
        return _UPRIGHT
    return orientation


def _upright_box(extent: tuple[float, float], orientation: int, image: Image.Image) -> Box:
    """Return the part of `image` that is filled: a fraction of the last stored column and row may be empty."""
    width, height = reversed(extent) if orientation in _TURNED else extent
    left, right = (image.width - width, image.width) if orientation in _RIGHT_TO_LEFT else (0, width)
    top, bottom = (image.height - height, image.height) if orientation in _BOTTOM_TO_TOP else (0, height)
    return left, top, right, bottom


def _png_without(kinds: Collection[bytes], data: bytes) -> bytes:
    """Return a PNG without chunks of these kinds."""
    return data[:8] + b"".join(data[start:end] for kind, start, end in _png_chunks(data) if kind not in kinds)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind, start and end of each chunk of a PNG; the last one may end after the file does."""
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, start + length + 12
        start += length + 12


def _check_pixels_of_png(data: bytes) -> None:
    """Raise ImageError where the pixels of a PNG are not those that were written: Pillow decodes them all the same."""
    for kind, start, end in _png_chunks(data):
        checksum = int.from_bytes(data[end - 4 : end], "big")
        if kind == b"IDAT" and end <= len(data) and zlib.crc32(memoryview(data)[start + 4 : end - 4]) != checksum:
            raise ImageError("decode_error", "its pixels are damaged: they do not match the checksum in the file")


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
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags and tags.get(_TIFF_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        values = values.view(np.uint32)  # Pillow takes it for signed
    highest = _full_scale(image)
    grey = _scale_by_range(values) if highest is None else _scale_full(values, highest)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
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
