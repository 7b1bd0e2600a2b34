"""The layout of OUT, and the table in it.

    OUT/
      table.json                    which table this is: id, source, kept columns, fingerprint, and every model in it
      run.json, runs/RUN_ID.json    the latest start, and each start
      plan/gNNN/part-PPPPP.parquet  the planned images; one row group for each chunk
      plan/gNNN/plan.json           written last: the listing is complete
      plan/gNNN/published.json      written last: the generation is in captions/
      chunks/TABLE_ID/CHUNK_ID.parquet   the committed rows of a generation that is not published yet
      captions/part-PPPPP.parquet   the published table: rows in plan order, exactly the current row of each image
      history/gNNN/part-PPPPP.parquet    rows that generation NNN superseded

A plan part, its chunks and its published file hold the same images in the same order, so comparing two files shows what
is finished and what is missing.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from captioner.data import CAPTIONS_SCHEMA, Chunk
from captioner.errors import OutputError
from captioner.store.directory import Directory

SCHEMA_VERSION = 1
TABLE_FILE = "table.json"
_OVERWRITE_FILE = "overwrite.json"
# The decisions of reviewers (reviews/) are not among them: no flag deletes those.
_OWN_FOLDERS = ("plan", "chunks", "captions", "history", "runs", "checks", "report", "alt_text")


@dataclass(frozen=True, slots=True)
class Recaption:
    """The selection and the model of a generation of kind "recaption", which may change a table's fingerprint.

    `only`: the selector of its rows, see `captioner.run.selector`. `logprob_below`: the limit to which a share of the
    captions came. `model`: as in table.json.
    """

    only: str
    fingerprint: str
    model: dict[str, Any]
    logprob_below: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A generation's frozen list. `parts`: rows of each part, by part number.

    `kind`: "archive" (the first listing), "extend" (images added later), "retry" (failed images again) or
    "recaption" (weak captions again, with another model). The rows of the last two have `part_row`, their index in
    the published part.
    """

    generation: int
    kind: str
    rows_per_chunk: int
    parts: dict[int, int]
    num_ignored: int = 0
    ignored_examples: list[str] = field(default_factory=list)
    recaption: Recaption | None = None

    @property
    def num_rows(self) -> int:
        return sum(self.parts.values())

    @property
    def adds_parts(self) -> bool:
        """Whether it adds new parts to the table, and not rows that replace others."""
        return self.kind in ("archive", "extend")

    def part_chunks(self, part: int) -> list[Chunk]:
        """The chunks of one part, in row order."""
        rows, size = self.parts[part], self.rows_per_chunk
        return [
            Chunk(self.generation, part, index, min(size, rows - first))
            for index, first in enumerate(range(0, rows, size))
        ]

    def chunks(self) -> Iterator[Chunk]:
        for part in sorted(self.parts):
            yield from self.part_chunks(part)

    @property
    def num_chunks(self) -> int:
        return sum(-(-rows // self.rows_per_chunk) for rows in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "rows_per_chunk": self.rows_per_chunk,
            "parts": {str(part): rows for part, rows in sorted(self.parts.items())},
            "num_rows": self.num_rows,
            "num_ignored": self.num_ignored,
            "ignored_examples": self.ignored_examples,
            "recaption": self.recaption and asdict(self.recaption),
        }


@dataclass(frozen=True)
class CaptionsTable:
    """One captions table. Picklable, so that workers can commit to it.

    `info`: the content of table.json when the table was opened.
    """

    directory: Directory
    info: dict[str, Any]

    @property
    def table_id(self) -> str:
        return str(self.info["table_id"])

    @property
    def kept_fields(self) -> list[pa.Field]:
        serialised = bytes.fromhex(self.info["kept_schema"])
        return list(pa.ipc.read_schema(pa.py_buffer(serialised)))

    @property
    def schema(self) -> pa.Schema:
        """CAPTIONS_SCHEMA and the source's kept columns."""
        return pa.schema([*CAPTIONS_SCHEMA, *self.kept_fields])

    def plans(self) -> list[Plan]:
        """Return the complete generations, in order; without a listing that was interrupted."""
        plans = []
        for folder in self.directory.list_folders("plan"):
            name = f"plan/{folder}/plan.json"
            if self.directory.exists(name):
                plans.append(_plan_from_json(int(folder.removeprefix("g")), self.directory.read_json(name)))
        return plans

    def is_published(self, generation: int) -> bool:
        return self.directory.exists(published_name(generation))

    def open_plans(self) -> list[Plan]:
        """Return the generations whose rows are not all in captions/ yet."""
        return [plan for plan in self.plans() if not self.is_published(plan.generation)]

    def committed_chunks(self, generation: int) -> set[str]:
        """Return the ids of the chunks of a generation that are committed and not merged into captions/ yet."""
        names = self.directory.list_names(self.chunk_folder)
        prefix = f"g{generation:03d}-"
        return {name.removesuffix(".parquet") for name in names if name.startswith(prefix)}

    def published_parts(self) -> set[int]:
        names = self.directory.list_names("captions")
        return {int(name.removeprefix("part-").removesuffix(".parquet")) for name in names}

    @property
    def chunk_folder(self) -> str:
        return f"chunks/{self.table_id}"

    def chunk_name(self, chunk_id: str) -> str:
        return f"{self.chunk_folder}/{chunk_id}.parquet"

    def check_current(self) -> None:
        """Raise OutputError where another run has overwritten the table since it was opened."""
        table_id = self.directory.read_json(TABLE_FILE)["table_id"] if self.directory.exists(TABLE_FILE) else None
        if table_id != self.table_id:
            raise OutputError(f"{self.directory.location} was overwritten by another run; this one stops")

    def update(self, **changes: Any) -> CaptionsTable:
        """Write changed values to table.json, and return the table with them."""
        info = {**self.info, **changes}
        self.directory.write_json(TABLE_FILE, info)
        return CaptionsTable(self.directory, info)


def plan_folder(generation: int) -> str:
    return f"plan/g{generation:03d}"


def plan_part_name(generation: int, part: int) -> str:
    return f"{plan_folder(generation)}/part-{part:05d}.parquet"


def published_name(generation: int) -> str:
    return f"{plan_folder(generation)}/published.json"


def captions_name(part: int) -> str:
    return f"captions/part-{part:05d}.parquet"


def history_name(generation: int, part: int) -> str:
    return f"history/g{generation:03d}/part-{part:05d}.parquet"


def open_table(location: str) -> CaptionsTable:
    """Open the table at `location`. Raises OutputError where there is none."""
    directory = Directory(location)
    try:
        if not directory.exists(TABLE_FILE):
            raise OutputError(f"{location} holds no captions table (no {TABLE_FILE}); give the OUT of a caption run")
        info = directory.read_json(TABLE_FILE)
    except OSError as error:
        raise OutputError(f"{location} cannot be read: {error}") from error
    except ValueError as error:
        raise OutputError(f"{location}/{TABLE_FILE} is damaged: {error}") from error
    if info.get("schema_version") != SCHEMA_VERSION:
        version = info.get("schema_version")
        raise OutputError(
            f"{location} has table version {version}, this program reads {SCHEMA_VERSION}; use another OUT"
        )
    return CaptionsTable(directory, info)


def create_table(
    location: str, source: dict[str, Any], kept_fields: list[pa.Field], overwrite: bool = False
) -> CaptionsTable:
    """Create an empty table.

    With `overwrite` the content of the old table is deleted first; if that is interrupted, the next run completes it.
    Raises OutputError where OUT holds something else.
    """
    directory = Directory(location)
    overwriting = directory.exists(_OVERWRITE_FILE)
    if overwrite or overwriting:
        if not overwriting and not directory.exists(TABLE_FILE) and not directory.is_empty():
            raise OutputError(f"{location} is not a captions table; --overwrite will not delete it, give another OUT")
        directory.write_json(_OVERWRITE_FILE, {"overwriting": True})
        directory.delete(TABLE_FILE)
        for folder in _OWN_FOLDERS:
            directory.delete_folder(folder)
    elif not directory.is_empty():
        raise OutputError(f"{location} is not empty and holds no captions table; give another OUT")
    info = {
        "schema_version": SCHEMA_VERSION,
        # Chunks are written below this id: a writer of an overwritten table cannot reach the new one.
        "table_id": uuid.uuid4().hex[:12],
        "source": source,
        "kept_schema": pa.schema(kept_fields).serialize().to_pybytes().hex(),
        "fingerprint": None,
        "model": None,
        "models": {},
    }
    directory.write_json(TABLE_FILE, info)
    directory.delete(_OVERWRITE_FILE)
    return CaptionsTable(directory, info)


def table_exists(location: str) -> bool:
    """Return whether OUT holds a table; after an overwrite that was interrupted it does not.

    Raises OutputError where OUT cannot be read.
    """
    directory = Directory(location)
    try:
        return directory.exists(TABLE_FILE) and not directory.exists(_OVERWRITE_FILE)
    except OSError as error:
        raise OutputError(f"{location} cannot be read: {error}") from error


def _plan_from_json(generation: int, value: dict[str, Any]) -> Plan:
    recaption = value.get("recaption")
    return Plan(
        generation=generation,
        kind=value["kind"],
        rows_per_chunk=value["rows_per_chunk"],
        parts={int(part): rows for part, rows in value["parts"].items()},
        num_ignored=value["num_ignored"],
        ignored_examples=value["ignored_examples"],
        recaption=recaption and Recaption(**recaption),
    )
