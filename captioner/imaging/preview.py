"""File bytes -> a small upright JPEG for a person to look at, and what the file already says about the picture."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from PIL import Image

from captioner.imaging.descriptions import descriptions_of
from captioner.imaging.faults import PictureError, one_line
from captioner.imaging.formats import identify
from captioner.imaging.opening import open_picture
from captioner.imaging.settings import decoding

_QUALITY = 85


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture to look at, or the reason why not (`error_code`; "" = fine).

    `jpeg`: at most `side` pixels wide and high, EXIF orientation applied, without the file's metadata. `width`,
    `height`: of the picture in the file, 0 where unknown. `descriptions`: see `descriptions_of`.
    """

    jpeg: bytes | None
    width: int = 0
    height: int = 0
    format: str = ""
    error_code: str = ""
    error_message: str = ""
    descriptions: dict[str, str] = field(default_factory=dict)


def preview(data: bytes, side: int, max_pixels: int) -> Preview:
    """One file's bytes as a preview. Never raises."""
    try:
        with decoding(max_pixels):
            picture = open_picture(data, max_pixels, needed_side=side)
            found = _descriptions(data)
        image = picture.image
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        Image.frombytes("RGB", image.size, image.tobytes()).save(stream, "JPEG", quality=_QUALITY)
    except PictureError as error:
        return Preview(None, error.width, error.height, error.format, error.code, error.message)
    except Exception as error:
        return Preview(None, error_code="decode_error", error_message=one_line(error))
    return Preview(stream.getvalue(), picture.width, picture.height, picture.format, descriptions=found)


def _descriptions(data: bytes) -> dict[str, str]:
    """None where the picture is fine and its metadata is not."""
    try:
        return descriptions_of(identify(data))
    except PictureError:
        return {}
