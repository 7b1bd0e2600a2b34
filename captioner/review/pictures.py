"""Pictures of the archive as small JPEGs, read where the plan says they are and kept in memory only."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

import pyarrow as pa

from captioner.config import SourceConfig
from captioner.data import Chunk, Source
from captioner.errors import CaptionerError
from captioner.imaging.guarded import GuardedPreviewer
from captioner.imaging.preview import Preview
from captioner.review.rows import Row
from captioner.sources import open_source
from captioner.store.plan import read_planned
from captioner.store.table import CaptionsTable

Size = Literal["large", "small"]
SIDES: dict[Size, int] = {"large": 1600, "small": 240}  # pixels, of the longer side
_KEPT = 64


class Pictures:
    """Gives previews; safe for several threads. A decoder that a picture crashes or stops is a child process."""

    def __init__(self, table: CaptionsTable) -> None:
        self._table = table
        self._config = SourceConfig.model_validate(table.info["source"])
        self._source: Source | None = None
        self._makers = {
            size: _Maker(GuardedPreviewer(side, self._config.max_pixels, self._config.decode_timeout))
            for size, side in SIDES.items()
        }
        self._lock = threading.Lock()

    def preview(self, row: Row, size: Size) -> Preview:
        """The picture, or why there is none: it has gone, its archive has, or it cannot be decoded."""
        return self._makers[size].preview(row.image_id, lambda: self._read(row))

    def close(self) -> None:
        for maker in self._makers.values():
            maker.close()

    def _read(self, row: Row) -> bytes | Preview:
        try:
            with self._lock:
                if self._source is None:
                    self._source = open_source(self._config)
            planned = read_planned(self._table, _chunk(row.chunk_id)).take(pa.array([row.chunk_row]))
            (raw,) = self._source.read(planned)
        except (CaptionerError, OSError) as error:
            return Preview(None, error_code="not_found", error_message=f"the archive cannot be read: {error}")
        if raw.data is None:
            return Preview(None, error_code=raw.error_code, error_message=raw.error_message)
        return raw.data


class _Maker:
    """Makes previews of one size, one at a time, and keeps the last ones."""

    def __init__(self, previewer: GuardedPreviewer) -> None:
        self._previewer = previewer
        self._kept: OrderedDict[str, Preview] = OrderedDict()
        self._lock = threading.Lock()

    def preview(self, image_id: str, read: Callable[[], bytes | Preview]) -> Preview:
        with self._lock:
            if image_id in self._kept:
                return self._kept[image_id]
            data = read()
            made = data if isinstance(data, Preview) else self._previewer(data)
            if not made.error_code:
                self._kept[image_id] = made
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return made

    def close(self) -> None:
        with self._lock:
            self._previewer.close()


def _chunk(chunk_id: str) -> Chunk:
    generation, part, index = (int(text) for text in chunk_id.removeprefix("g").split("-"))
    return Chunk(generation, part, index, num_rows=0)
