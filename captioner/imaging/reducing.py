"""Opening an image at a smaller size than it has, where its format lets a part of the file give all of the image.

    JPEG        2, 4 or 8 times smaller, from the first coefficients of each block
    JPEG 2000   2, 4, 8 ... times smaller: its lower resolution levels
    TIFF        the copies that pyramids and cloud-optimised files hold

Memory and most of the time are then those of the small image, so `max_pixels` is held against that. But a
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
    """As small as can be with both sides >= needed_side; `None` where the file only loads whole.

    Of a JPEG it is `file` itself; else another, and `file` is as before.
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
    held = whole if file.info.get("progressive") else file.size
    return Reduced(file, drafted[1][2:], math.prod(held))


def _open_jpeg2000(data: bytes, needed_side: int) -> Reduced | None:
    file = identify(data)
    width, height = file.size
    halvings = min(_resolution_levels(data), int(math.log2(max(1.0, min(file.size) / needed_side))))
    if not halvings:
        return None
    power = 1 << halvings
    size = -(-width // power), -(-height // power)
    # The standard rounds up, Pillow to the nearest: as it is told a size that both round alike, it finds the same.
    file._size = size[0] * power, size[1] * power
    file.reduce = halvings  # type: ignore[method-assign, assignment]
    return Reduced(file, (width / power, height / power), math.prod(size))


def _resolution_levels(data: bytes) -> int:
    """How often a JPEG 2000 image can be halved: of its main header (ISO 15444-1, A.6.1)."""
    place = data.find(_CODESTREAM, 0, 1 << 20) + 2
    while place >= 2 and place + 10 <= len(data) and data[place] == 0xFF:
        if data[place + 1] == _CODING_STYLE:
            return data[place + 9]
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0


def _open_tiff(data: bytes, needed_side: int) -> Reduced | None:
    overview = find_overview(data, needed_side)
    if overview is None:
        return None
    try:
        file = identify(extract(data, overview.offset, like_first=True))
    except (ImageError, ValueError):
        return None  # the page itself may be fine
    return Reduced(file, None, math.prod(file.size))
