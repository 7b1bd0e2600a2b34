"""File bytes -> the model's pixels, or the reason why not. Never an exception.

    formats.py   bytes -> a Pillow file, told by content
    opening.py   bytes -> an upright RGB picture
    colour.py    any Pillow mode -> RGB over white
    sizes.py     the size of a picture -> the size its model wants
    fitting.py   upright picture -> uint8 pixels of that size
    faults.py    what went wrong -> an error code
    settings.py  Pillow's process-wide settings meanwhile
    guarded.py   the same in a process of its own (child.py), which a picture may crash or stop

Nothing here loads torch before the first picture is resized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from captioner.data import CAPTIONS_SCHEMA, DecodedImage, ImageBatch, Pixels, PixelSpec, RawImage, object_array
from captioner.imaging.faults import PictureError, one_line
from captioner.imaging.fitting import fit, needed_side
from captioner.imaging.opening import Picture, open_picture
from captioner.imaging.settings import decoding

__all__ = ["IMAGE_SCHEMA", "Picture", "PictureError", "decode", "decode_images", "open_picture"]

_KNOWN_COLUMNS = ("image_id", "uri", "sha256", "width", "height", "format", "num_bytes")

# The columns of ImageBatch.rows: types as in CAPTIONS_SCHEMA; the error columns are "" where a picture is fine.
IMAGE_SCHEMA = pa.schema(
    [CAPTIONS_SCHEMA.field(name) for name in _KNOWN_COLUMNS]
    + [CAPTIONS_SCHEMA.field(name).with_nullable(False) for name in ("error_code", "error_message")]
)


def decode(data: bytes, spec: PixelSpec, max_pixels: int) -> DecodedImage:
    """One file's bytes as uint8 pixels (see `PixelSpec`), or an error code. Never raises."""
    try:
        with decoding(max_pixels):
            picture = open_picture(data, max_pixels, needed_side(spec))
            pixels = fit(picture, spec)
    except PictureError as error:
        return DecodedImage(None, error.width, error.height, error.format, error.code, error.message)
    except Exception as error:  # MemoryError too: one picture must not end the others
        return DecodedImage(None, error_code="decode_error", error_message=one_line(error))
    return DecodedImage(pixels, picture.width, picture.height, picture.format)


def decode_images(
    raws: Sequence[RawImage],
    spec: PixelSpec,
    max_pixels: int,
    decode_one: Callable[[bytes], DecodedImage] | None = None,
) -> ImageBatch:
    """Pictures of one chunk, one row each, in order. `rows` has IMAGE_SCHEMA. `decode_one`: `decode` in this process
    unless given.

    Holds one full-size picture at a time: each is shrunk as far as the model allows before the next is opened.
    """
    decode_one = decode_one or partial(decode, spec=spec, max_pixels=max_pixels)
    pixels = _no_pixels(len(raws), spec)
    rows = [_decode_into(pixels, place, raw, decode_one) for place, raw in enumerate(raws)]
    return ImageBatch(pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA), pixels)


def _no_pixels(count: int, spec: PixelSpec) -> Pixels:
    if not spec.own_sizes:
        return np.zeros((count, spec.height, spec.width, 3), np.uint8)
    return object_array([np.zeros((1, 1, 3), np.uint8)] * count)


def _decode_into(
    pixels: Pixels, place: int, raw: RawImage, decode_one: Callable[[bytes], DecodedImage]
) -> dict[str, str | int | None]:
    """Write one picture's pixels in place and return its row."""
    decoded = _decode_raw(raw, decode_one)
    if decoded.pixels is not None:
        pixels[place] = decoded.pixels
    return {
        "image_id": raw.image_id,
        "uri": raw.uri,
        "sha256": hashlib.sha256(raw.data).hexdigest() if raw.data else None,
        "width": decoded.width or None,
        "height": decoded.height or None,
        "format": decoded.format or None,
        "num_bytes": None if raw.data is None else len(raw.data),
        "error_code": decoded.error_code,
        "error_message": decoded.error_message,
    }


def _decode_raw(raw: RawImage, decode_one: Callable[[bytes], DecodedImage]) -> DecodedImage:
    if raw.error_code or raw.data is None:
        code, message = raw.error_code or "not_found", raw.error_message or "the source gave no bytes"
        return DecodedImage(None, error_code=code, error_message=one_line(message))
    return decode_one(raw.data)
