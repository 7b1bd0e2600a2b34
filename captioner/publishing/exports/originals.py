"""The pictures of texts, read from the archive that the table was planned from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import SourceConfig
from captioner.data import RawImage, Source
from captioner.errors import SourceError
from captioner.sources import open_source
from captioner.store.table import CaptionsTable, plan_part_name

_READ_AT_ONCE = 32  # pictures in memory


@dataclass
class Pictures:
    """Reads pictures back, in the order of the table. Memory holds a part's places and 32 pictures."""

    table: CaptionsTable

    @cached_property
    def _source(self) -> Source:
        return open_source(SourceConfig.model_validate(self.table.info["source"]))

    def read(self, texts: pa.Table) -> Iterator[tuple[dict[str, Any], RawImage]]:
        """Each row of one part's texts with its picture. A picture that cannot be read has its reason; where none can
        be, SourceError is raised."""
        if not texts.num_rows:
            return
        planned = self._planned(texts["image_id"])
        rows = texts.to_pylist()
        for first in range(0, len(rows), _READ_AT_ONCE):
            raws = self._source.read(planned.slice(first, _READ_AT_ONCE))
            yield from zip(rows[first : first + _READ_AT_ONCE], raws, strict=True)

    def _planned(self, ids: pa.ChunkedArray) -> pa.Table:
        """The plan's rows of these ids, which lie in one part, in their order. Parts come in order too."""
        while self._waiting:
            name = self._waiting[0]
            here = self.table.directory.read_table(name, ["image_id"])["image_id"]
            places = pc.index_in(ids, here)
            if places.null_count == 0:
                return self.table.directory.read_table(name).take(places)
            self._waiting.pop(0)
        raise SourceError(f"{self.table.directory.location}: its plan does not hold {ids[0].as_py()!r}")

    @cached_property
    def _waiting(self) -> list[str]:
        plans = [plan for plan in self.table.plans() if plan.founds_parts]
        return [plan_part_name(plan.generation, part) for plan in plans for part in sorted(plan.parts)]
