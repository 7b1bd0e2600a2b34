"""Decode the bytes of an image file to the model's pixels, or to an error code. Never raises.

    formats.py   bytes -> a Pillow file, identified by content, at a smaller size where the format allows it
    tiff.py      pages and overviews of TIFFs
    opening.py   bytes -> an upright RGB image, whatever the mode, over white
    fitting.py   upright image -> uint8 pixels of the size that the model needs
    descriptions.py  descriptions that people wrote into the file
    pillow.py    Pillow's exceptions as error codes, its process-wide settings while an image is decoded
    sandbox/     decoding in a child process, which an image may crash or hang

Nothing here loads torch before the first image is resized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captioner.data import CAPTIONS_SCHEMA, DecodedImage, ImageBatch, Pixels, PixelSpec, RawImage, object_array
from captioner.imaging.descriptions import descriptions_of
from captioner.imaging.fitting import fit, fit_square, needed_side
from captioner.imaging.opening import UprightImage, open_image
from captioner.imaging.pillow import ImageError, decoding, one_line

__all__ = ["IMAGE_SCHEMA", "ImageError", "UprightImage", "decode", "decode_images", "open_image", "squeeze"]

Row = dict[str, str | int | None]  # by column

_MAX_SIDE = 2**31 - 1  # of int32, the type of the columns
_IMAGE_COLUMNS = ("image_id", "uri", "sha256", "width", "height", "format", "num_bytes")

# The columns of ImageBatch.rows: types as in CAPTIONS_SCHEMA; the error columns are "" where an image is fine.
IMAGE_SCHEMA = pa.schema(
    [CAPTIONS_SCHEMA.field(name) for name in _IMAGE_COLUMNS]
    + [CAPTIONS_SCHEMA.field(name).with_nullable(False) for name in ("error_code", "error_message")]
)


def decode(data: bytes, spec: PixelSpec, max_pixels: int) -> DecodedImage:
    """Decode one file to uint8 pixels (see `PixelSpec`), or to an error code. Never raises."""
    return _decoded(data, max_pixels, needed_side(spec), partial(fit, spec=spec))


def squeeze(data: bytes, side: int, max_pixels: int) -> DecodedImage:
    """Return one file's whole image as pixels uint8 [side, side, 3] and the descriptions in it, or an error code.

    The image fills the square whatever its aspect. Never raises, and does without torch: for a page, not for a model.
    """
    decoded = _decoded(data, max_pixels, side, partial(fit_square, side=side))
    return decoded if decoded.error_code else replace(decoded, descriptions=descriptions_of(data, max_pixels))


def _decoded(
    data: bytes, max_pixels: int, needed: int, fitted: Callable[[UprightImage], npt.NDArray[np.uint8]]
) -> DecodedImage:
    try:
        with decoding(max_pixels):
            upright = open_image(data, max_pixels, needed)
            pixels = fitted(upright)
    except ImageError as error:
        return DecodedImage(None, error.width, error.height, error.format, error.code, error.message)
    except Exception as error:  # MemoryError too: one image must not end the others
        return DecodedImage(None, error_code="decode_error", error_message=one_line(error))
    return DecodedImage(pixels, upright.width, upright.height, upright.format)


def decode_images(
    raws: Sequence[RawImage],
    spec: PixelSpec,
    max_pixels: int,
    decode_each: Callable[[Iterable[bytes]], Iterator[DecodedImage]] | None = None,
) -> ImageBatch:
    """Decode the images of one chunk to a batch with one row for each, in order.

    `rows` of the batch has IMAGE_SCHEMA. `decode_each`: by default `decode` in this process.

    Holds one full-size image at a time: each is shrunk as far as the model allows before the next is opened. Rows
    that share one bytes object are decoded once.
    """
    pixels = _no_pixels(len(raws), spec)
    decode_each = decode_each or partial(map, partial(decode, spec=spec, max_pixels=max_pixels))
    first: dict[int, int] = {}  # id of a bytes object -> index of the first row that holds it
    for index, raw in enumerate(raws):
        if raw.data is not None and not raw.error_code:
            first.setdefault(id(raw.data), index)
    decoded = _decode_all([raws[index].data or b"" for index in first.values()], decode_each)
    rows: list[Row] = []
    for index, raw in enumerate(raws):
        has_bytes = raw.data is not None and not raw.error_code
        first_index = first[id(raw.data)] if has_bytes else index
        if first_index < index:
            pixels[index] = pixels[first_index]
            rows.append(rows[first_index] | {"image_id": raw.image_id, "uri": raw.uri})
            continue
        image = next(decoded) if has_bytes else _without_bytes(raw)
        rows.append(_row(raw, _keep_pixels(pixels, index, image)))
    return ImageBatch(_rows_table(rows), pixels)


def _decode_all(
    images: Sequence[bytes], decode_each: Callable[[Iterable[bytes]], Iterator[DecodedImage]]
) -> Iterator[DecodedImage]:
    """Yield the result of `decode_each` for each image.

    Where it raises, the remaining images are decoded one at a time, so that only the image at fault fails. Raises
    RuntimeError where no image can be decoded.
    """
    num_decoded = 0
    try:
        for decoded in decode_each(images):
            yield decoded
            num_decoded += 1
    except RuntimeError:
        raise
    except Exception:
        for data in images[num_decoded:]:
            yield _decode_alone(data, decode_each)


def _decode_alone(data: bytes, decode_each: Callable[[Iterable[bytes]], Iterator[DecodedImage]]) -> DecodedImage:
    try:
        (decoded,) = decode_each([data])
    except RuntimeError:
        raise
    except Exception as error:
        return DecodedImage(None, error_code="decode_error", error_message=one_line(error))
    return decoded


def _keep_pixels(pixels: Pixels, index: int, decoded: DecodedImage) -> DecodedImage:
    """Put the pixels of an image at `index`; return the image, failed where they do not fit there."""
    try:
        if decoded.pixels is not None:
            pixels[index] = decoded.pixels
    except ValueError as error:
        return replace(decoded, pixels=None, error_code="decode_error", error_message=one_line(error))
    return decoded


def _rows_table(rows: list[Row]) -> pa.Table:
    """Return the rows as a table of IMAGE_SCHEMA. Rows with values that do not fit it are failed rows."""
    try:
        return pa.Table.from_pylist(rows, schema=IMAGE_SCHEMA)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        if len(rows) == 1:
            return pa.Table.from_pylist([_without_values(rows[0], error)], schema=IMAGE_SCHEMA)
    half = len(rows) // 2
    return pa.concat_tables([_rows_table(rows[:half]), _rows_table(rows[half:])])


def _without_values(row: Row, error: Exception) -> Row:
    """Return a failed row in place of one with values that are too large or of a wrong type for their columns."""
    message = f"the file's metadata does not fit the table: {one_line(error)}"
    id_columns = {name: row[name] for name in ("image_id", "uri", "sha256", "num_bytes")}
    return id_columns | {"error_code": "decode_error", "error_message": message}


def _no_pixels(count: int, spec: PixelSpec) -> Pixels:
    if not spec.variable_size:
        return np.zeros((count, spec.height, spec.width, 3), np.uint8)
    return object_array([np.zeros((1, 1, 3), np.uint8)] * count)


def _without_bytes(raw: RawImage) -> DecodedImage:
    code, message = raw.error_code or "not_found", raw.error_message or "the source gave no bytes"
    return DecodedImage(None, error_code=code, error_message=one_line(message))


def _row(raw: RawImage, decoded: DecodedImage) -> Row:
    return {
        "image_id": raw.image_id,
        "uri": raw.uri,
        "sha256": hashlib.sha256(raw.data).hexdigest() if raw.data else None,
        "width": _side(decoded.width),
        "height": _side(decoded.height),
        "format": decoded.format or None,
        "num_bytes": None if raw.data is None else len(raw.data),
        "error_code": decoded.error_code,
        "error_message": decoded.error_message,
    }


def _side(length: float) -> int | None:
    """Return a width or height as the table holds it; None for what no image has: 0, NaN, 2^31 and more."""
    is_number = isinstance(length, int | float)
    return int(length) if is_number and 1 <= length <= _MAX_SIDE else None
