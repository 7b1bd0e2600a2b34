"""Small JPEGs of the original images, read through the table's plan and kept in memory only."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
from PIL import Image

from captioner.config import SourceConfig
from captioner.data import Chunk, DecodedImage, RawImage, Source
from captioner.errors import CaptionerError
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.publishing.review.rows import Row
from captioner.sources import reopen_source
from captioner.sources.reading import read_images
from captioner.store.plan import read_planned
from captioner.store.table import CaptionsTable

Size = Literal["large", "small"]
SIDES: dict[Size, int] = {"large": 1440, "small": 240}  # pixels, of the longer side
_CACHE_SIZE = 64  # previews of each size
_JPEG_QUALITY = 88


@dataclass(frozen=True, slots=True)
class Preview:
    """An upright JPEG without the file's metadata, or the reason why there is none.

    `descriptions`: texts in the file's metadata, see `captioner.imaging.descriptions`.
    """

    jpeg: bytes | None
    error: str = ""
    descriptions: dict[str, str] = field(default_factory=dict)


class Previews:
    """Makes and caches previews; thread-safe. Images are decoded in a process of their own."""

    def __init__(self, table: CaptionsTable) -> None:
        config = SourceConfig.model_validate(table.info["source"])
        reader = _Reader(table)
        self._caches = {
            size: _PreviewCache(reader, GuardedDecoder(side, config.max_pixels, config.decode_timeout), side)
            for size, side in SIDES.items()
        }

    def preview(self, row: Row, size: Size) -> Preview:
        """Return the preview of an image; its error says when the image or its source is gone or cannot be decoded."""
        return self._caches[size].preview(row)

    def close(self) -> None:
        """Stop the decoding processes."""
        for cache in self._caches.values():
            cache.close()


class _Reader:
    """Reads the bytes of single images; opens the source with the first one."""

    def __init__(self, table: CaptionsTable) -> None:
        self._table = table
        self._source: Source | None = None
        self._lock = threading.Lock()

    def read(self, row: Row) -> RawImage:
        try:
            with self._lock:
                if self._source is None:
                    self._source = reopen_source(self._table.info["source"])
            planned = read_planned(self._table, Chunk.from_id(row.chunk_id)).take(pa.array([row.chunk_row]))
            (raw,) = read_images(self._source, planned)
            return raw
        except (CaptionerError, OSError) as error:
            return RawImage(row.image_id, row.uri, None, "not_found", f"the source cannot be read: {error}")


class _PreviewCache:
    """Makes previews of one size, one at a time, and keeps the latest ones."""

    def __init__(self, reader: _Reader, decoder: GuardedDecoder, side: int) -> None:
        self._reader, self._decoder, self._side = reader, decoder, side
        self._previews: OrderedDict[str, Preview] = OrderedDict()
        self._lock = threading.Lock()

    def preview(self, row: Row) -> Preview:
        with self._lock:
            if row.image_id not in self._previews:
                preview = self._make(row)
                if preview.jpeg is None:  # not cached: the next attempt may succeed
                    return preview
                self._previews[row.image_id] = preview
                while len(self._previews) > _CACHE_SIZE:
                    self._previews.popitem(last=False)
            return self._previews[row.image_id]

    def close(self) -> None:
        with self._lock:
            self._decoder.close()

    def _make(self, row: Row) -> Preview:
        raw = self._reader.read(row)
        if raw.data is None:
            return Preview(None, raw.error_message or raw.error_code)
        (decoded,) = self._decoder([raw.data])
        if decoded.error_code:
            return Preview(None, f"{decoded.error_code}: {decoded.error_message}")
        return Preview(_jpeg(decoded, self._side), descriptions=decoded.descriptions)


def _jpeg(decoded: DecodedImage, side: int) -> bytes:
    """Return the square pixels as a JPEG in the image's own aspect ratio."""
    scale = min(1.0, side / max(decoded.width, decoded.height))
    size = max(1, round(decoded.width * scale)), max(1, round(decoded.height * scale))
    stream = io.BytesIO()
    assert decoded.pixels is not None
    Image.fromarray(decoded.pixels).resize(size).save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
