"""Open the bytes of a file as an upright RGB image, or raise ImageError."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from PIL import Image, ImageFile, ImageOps

from captioner.imaging.colour import to_rgb
from captioner.imaging.error_codes import ImageError, code_of, one_line
from captioner.imaging.formats import identify
from captioner.imaging.reducing import Reduced, open_reduced
from captioner.imaging.settings import decoding

_EXIF_ORIENTATION = 0x0112
_UPRIGHT, _TURNED = 1, (5, 6, 7, 8)  # turned: width and height are swapped
_RIGHT_TO_LEFT, _BOTTOM_TO_TOP = (2, 3, 6, 7), (3, 4, 7, 8)  # where a stored image's right and bottom edges end up

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
    with the pixels held for that (see `captioner.imaging.reducing`). Raises ImageError for every fault of the file.
    """
    if not data:
        raise ImageError("empty_file", "the file has no bytes")
    with decoding(max_pixels):
        try:
            return _open(data, max_pixels, needed_side)
        except ImageError as error:
            if "MAX_TEXT_" not in error.message:
                raise
        return _open(_without_png_text(data), max_pixels, needed_side)


def _open(data: bytes, max_pixels: int, needed_side: int) -> UprightImage:
    file = identify(data)
    format = (file.format or "").lower()
    width, height = file.size
    try:
        reduced = _load_reduced(file, data, max_pixels, needed_side) if needed_side else None
        if reduced:
            file = reduced.file
        else:
            _check_pixels(width, height, max_pixels)
            _load_first(file)
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


def _without_png_text(data: bytes) -> bytes:
    """Return a PNG without its texts and colour profile, which may be too long for Pillow while the image is fine."""
    kept, position = [data[:8]], 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + length + 12
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[position:end])
        position = end
    return b"".join(kept)
