"""Open an image at a smaller size, where its format allows to decode that from a part of the file.

    JPEG        2, 4 or 8 times smaller, from the first coefficients of each block
    JPEG 2000   2, 4, 8 ... times smaller: its lower resolution levels
    TIFF        the copies that pyramids and cloud-optimised files hold

Memory and most of the time are then those of the small image, so `max_pixels` is compared with its size. But a
progressive JPEG keeps all its coefficients until its end, whatever the size it is read at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import ImageFile

from captioner.imaging.error_codes import ImageError
from captioner.imaging.formats import identify
from captioner.imaging.tiff import extract, find_overview

_CODESTREAM, _CODING_STYLE = b"\xff\x4f\xff\x51", 0x52  # JPEG 2000: SOC and SIZ; COD


@dataclass(frozen=True, slots=True)
class Reduced:
    """A file that will load smaller.

    `extent`: width and height that the image then has, not rounded to whole pixels; `None`: all of the image.
    `in_memory`: how many pixels are held while it loads.
    """

    file: ImageFile.ImageFile
    extent: tuple[float, float] | None
    in_memory: int


def open_reduced(file: ImageFile.ImageFile, data: bytes, needed_side: int) -> Reduced | None:
    """Open the smallest size with both sides >= needed_side; return None where there is only the whole image.

    Of a JPEG the result holds `file` itself, changed; of other formats another file.
    """
    if file.format == "JPEG":
        return _open_jpeg(file, needed_side)
    if file.format == "JPEG2000":
        return _open_jpeg2000(data, needed_side)
    return _open_tiff(data, needed_side) if file.format == "TIFF" else None


def _open_jpeg(file: ImageFile.ImageFile, needed_side: int) -> Reduced | None:
    whole = file.size
    drafted = file.draft("RGB", (needed_side, needed_side))
    if not drafted or file.size == whole:
        return None
    held_size = whole if file.info.get("progressive") else file.size
    return Reduced(file, drafted[1][2:], math.prod(held_size))


def _open_jpeg2000(data: bytes, needed_side: int) -> Reduced | None:
    file = identify(data)
    width, height = file.size
    halvings = min(_resolution_levels(data), int(math.log2(max(1.0, min(file.size) / needed_side))))
    if not halvings:
        return None
    power = 1 << halvings
    size = -(-width // power), -(-height // power)
    # The standard rounds up, Pillow to the nearest: this size is rounded alike by both.
    file._size = size[0] * power, size[1] * power
    file.reduce = halvings  # type: ignore[method-assign, assignment]
    return Reduced(file, (width / power, height / power), math.prod(size))


def _resolution_levels(data: bytes) -> int:
    """Return how often a JPEG 2000 image can be halved, from its main header (ISO 15444-1, A.6.1)."""
    offset = data.find(_CODESTREAM, 0, 1 << 20) + 2
    while offset >= 2 and offset + 10 <= len(data) and data[offset] == 0xFF:
        if data[offset + 1] == _CODING_STYLE:
            return data[offset + 9]
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return 0


def _open_tiff(data: bytes, needed_side: int) -> Reduced | None:
    overview = find_overview(data, needed_side)
    if overview is None:
        return None
    try:
        file = identify(extract(data, overview.offset, like_first=True))
    except (ImageError, ValueError):
        return None  # the whole page may still be decodable
    return Reduced(file, None, math.prod(file.size))
