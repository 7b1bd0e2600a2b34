"""Read the original images of exported texts from the table's source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import RawImage, Source
from captioner.errors import SourceError
from captioner.sources import reopen_source
from captioner.sources.reading import read_images
from captioner.store.replan import current_plan_rows
from captioner.store.table import CaptionsTable, Plan

_BATCH_SIZE = 32  # images in memory


@dataclass
class Originals:
    """Reads the original images in table order. Memory holds the plan rows of one part and 32 images."""

    table: CaptionsTable

    @cached_property
    def _source(self) -> Source:
        return reopen_source(self.table.info["source"])

    def read(self, texts: pa.Table) -> Iterator[tuple[dict[str, Any], RawImage]]:
        """Yield each row of one part's texts with its image.

        An image that cannot be read comes with an error code. Raises SourceError when the source itself cannot be
        opened or the plan does not hold the rows.
        """
        if not texts.num_rows:
            return
        planned = self._planned(texts["image_id"])
        rows = texts.to_pylist()
        for first in range(0, len(rows), _BATCH_SIZE):
            raws = read_images(self._source, planned.slice(first, _BATCH_SIZE))
            yield from zip(rows[first : first + _BATCH_SIZE], raws, strict=True)

    def _planned(self, ids: pa.ChunkedArray) -> pa.Table:
        """Return the plan rows of these ids, in their order. All ids are of one part, and parts come in table order."""
        while self._remaining_parts:
            plan, part = self._remaining_parts[0]
            part_ids = self.table.read_plan_part(plan, part, ["image_id"])["image_id"]
            indices = pc.index_in(ids, part_ids)
            if indices.null_count == 0:
                return current_plan_rows(self.table, part).take(indices)
            self._remaining_parts.pop(0)
        raise SourceError(f"{self.table.directory.location}: its plan does not hold {ids[0].as_py()!r}")

    @cached_property
    def _remaining_parts(self) -> list[tuple[Plan, int]]:
        return [(plan, part) for plan in self.table.plans() if plan.adds_parts for part in sorted(plan.parts)]
