"""The layout of OUT, and the table in it.

    OUT/
      table.json                    which table this is: id, source, kept columns, fingerprint, and every model in it
      run.json, runs/RUN_ID.json    the latest start, and each start
      references.json               the latest --references
      plan/gNNN/part-PPPPP.parquet  the planned images; one row group for each chunk
      plan/gNNN/plan.json           written last: the listing is complete
      plan/gNNN/notes.txt           every note about the source, where plan.json has only the first ones
      plan/gNNN/publishing.json     which parts of a generation are in captions/ while others are captioned
      plan/gNNN/published.json      written last: the generation is in captions/
      chunks/ID/CHUNK_ID.arrow      the committed rows of a generation that is not published yet (Arrow IPC); ID is the
                                    table's, or chunks_id of table.json
      captions/part-PPPPP.parquet   the published table: rows in plan order, exactly the current row of each image
      history/gNNN/part-PPPPP.parquet    rows that generation NNN superseded
      overwrite/, overwrite.json    the new table of an --overwrite: see `captioner.store.creating`

A plan part, its chunks and its published file hold the same images in the same order, so comparing two files shows what
is finished and what is missing.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from captioner.config import SourceConfig
from captioner.data import CAPTIONS_SCHEMA, SAMPLES_FIELD, Chunk, error_column
from captioner.errors import DamagedFileError, OutputError
from captioner.files import did_you_mean, is_uri, local_path
from captioner.store.checksum import ARROW_SUFFIX
from captioner.store.counts import COUNTED
from captioner.store.directory import Directory

SCHEMA_VERSION = 1
TABLE_FILE, RUN_FILE, REFERENCES_FILE = "table.json", "run.json", "references.json"
_TABLE_ID = re.compile(r"[0-9a-f]+")
_PLAN_FOLDER = re.compile(r"g(\d{3,})")
_PART = re.compile(r"part-(\d{5,})\.parquet")
_CHUNK = re.compile(r"(g(\d{3,})-\d{5,}-\d{4,})(\.arrow|\.parquet)")
# Of a published file. Of tables of earlier versions there are no counts (see `captioner.store.counts`).
_FILE_FACTS = ("sha256", "num_bytes")
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)  # of JSON that lacks what it should hold
# Schema metadata of the last plan part of a listing, and of each one that captions rows again: the plan as JSON. In
# earlier versions only the second kind has it, with "kind" and "recaption".
PLAN_FACTS = b"captioner.plan"
PLAN_PART = b"captioner.part"  # schema metadata of a plan part: table id and name
_KINDS = ("archive", "extend", "retry", "recaption")


@dataclass(frozen=True, slots=True)
class Recaption:
    """The selection and the model of a generation of kind "recaption", which may change a table's fingerprint.

    `only`: the selector of its rows, see `captioner.run.selector`. `logprob_below`, `lift_below`: the limits to which
    shares of the captions came. `model`: as in table.json.
    """

    only: str
    fingerprint: str
    model: dict[str, Any]
    logprob_below: float | None = None
    lift_below: float | None = None


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
    notes: list[str] = field(default_factory=list)  # what a person should know of the source, as it was listed
    num_bytes: dict[int, int] = field(default_factory=dict)  # of the file of each part; {} in earlier versions
    ignored_kinds: dict[str, int] = field(default_factory=dict)  # number of ignored files by suffix, or name
    # It was made again from parts of which the last ones may be lost: the source is to be listed again.
    may_lack_images: bool = False

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
            "generation": self.generation,
            "kind": self.kind,
            "rows_per_chunk": self.rows_per_chunk,
            "parts": {str(part): rows for part, rows in sorted(self.parts.items())},
            "num_rows": self.num_rows,
            "num_ignored": self.num_ignored,
            "ignored_examples": self.ignored_examples,
            "recaption": self.recaption and asdict(self.recaption),
            "notes": self.notes,
            "num_bytes": {str(part): size for part, size in sorted(self.num_bytes.items())},
            "ignored_kinds": self.ignored_kinds,
            "may_lack_images": self.may_lack_images,
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
    def answer_fields(self) -> list[pa.Field]:
        """The columns that questions besides the caption fill; none before the table is bound to a model."""
        serialised = self.info.get("answer_schema")
        return list(pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(serialised)))) if serialised else []

    @property
    def answer_columns(self) -> dict[str, list[str]]:
        """The columns with the answers to each question besides the caption, by name of the question."""
        return dict(self.info.get("answer_columns") or {})

    @property
    def counted_columns(self) -> list[str]:
        """The columns by which rows are counted (see `captioner.store.counts`)."""
        beside = ([*columns, error_column(name)] for name, columns in self.answer_columns.items())
        return [*COUNTED, *dict.fromkeys(name for names in beside for name in names)]

    @cached_property
    def schema(self) -> pa.Schema:
        """CAPTIONS_SCHEMA, `captions` where several were asked for, the source's kept columns, and the answers."""
        return pa.schema([*CAPTIONS_SCHEMA, *self._sample_fields, *self.kept_fields, *self.answer_fields])

    @property
    def _sample_fields(self) -> list[pa.Field]:
        return [SAMPLES_FIELD] if (self.info["model"] or {}).get("num_captions", 1) > 1 else []

    def plans(self) -> list[Plan]:
        """Return the complete generations, in order; without a listing that was interrupted.

        Raises DamagedFileError where a plan.json is damaged, or has gone.
        """
        generations = self.generations()
        complete = [generation for generation in generations if self.directory.exists(plan_name(generation))]
        return [self.read_plan(number) for number in generations if number in complete or self.was_complete(number)]

    def was_complete(self, generation: int) -> bool:
        """Return whether there is something that is written only once the plan of a generation is complete."""
        if generation < max(self.generations()) or self.is_published(generation) or self.committed_chunks(generation):
            return True
        older = {part for number in self.generations() if number < generation for part in self.parts_in_folder(number)}
        return not self.published_parts().isdisjoint(set(self.parts_in_folder(generation)) - older)

    def parts_in_folder(self, generation: int) -> list[int]:
        """Return the numbers of the plan parts of a generation that are there, whatever its plan.json says."""
        return sorted(part_numbers(self.directory.list_names(plan_folder(generation))))

    def generations(self) -> list[int]:
        """Return the numbers of the folders in plan/, also those of a listing that was interrupted."""
        matches = (_PLAN_FOLDER.fullmatch(folder) for folder in self.directory.list_folders("plan"))
        return [int(match[1]) for match in matches if match]

    def read_plan(self, generation: int) -> Plan:
        """Return the plan of a generation. Raises DamagedFileError."""
        name = plan_name(generation)
        value = self.directory.read_json(name)
        try:
            if unknown := set(value.get("recaption") or {}) - {field.name for field in fields(Recaption)}:
                raise self.directory.newer(name, f"recaption.{min(unknown)}")
            return plan_from_json(generation, value)
        except _MALFORMED as error:
            raise self.directory.damage(name, f"is damaged: {error!r}") from error

    def read_plan_part(self, plan: Plan, part: int, columns: list[str] | None = None) -> pa.Table:
        """Return the rows of a plan part: these columns, or all.

        Raises DamagedFileError where its file is damaged, missing, or that of another part.
        """
        name = plan_part_name(plan.generation, part)
        rows = self.directory.read_table(name, columns)
        if rows.num_rows != plan.parts[part] or is_marked_otherwise(self, name, rows.schema.metadata or {}):
            raise self.directory.damage(name, "is damaged: it holds another part of a plan")
        return rows

    def write_plan(self, plan: Plan) -> None:
        """Write plan.json, with the sizes of the plan's files: from then on the list is complete."""
        files = self.directory.list_files(plan_folder(plan.generation))
        names = {part: posixpath.basename(plan_part_name(plan.generation, part)) for part in plan.parts}
        plan = replace(plan, num_bytes={part: files[name].num_bytes for part, name in names.items() if name in files})
        self.directory.write_json(plan_name(plan.generation), plan.to_json(), checksum=True)

    def is_published(self, generation: int) -> bool:
        return self.directory.exists(published_name(generation))

    def published_files(self, generation: int) -> dict[int, dict[str, Any]]:
        """Return "sha256", "num_bytes" and "counts" of each part that a generation wrote, from its published.json.

        Raises DamagedFileError.
        """
        name = published_name(generation)
        try:
            return _files_of(self.directory.read_json(name))
        except _MALFORMED as error:
            raise self.directory.damage(name, f"is damaged: {error!r}") from error

    def write_published(self, generation: int, files: dict[int, dict[str, Any]]) -> None:
        """Write published.json of a generation: from then on its rows are in captions/."""
        self.directory.write_json(published_name(generation), _record_of(files), checksum=True)
        self.directory.delete(publishing_name(generation))

    def files_so_far(self, generation: int) -> dict[int, dict[str, Any]]:
        """Return the same of a generation that is not published yet, from its publishing.json; {} without one."""
        name = publishing_name(generation)
        try:
            return _files_of(self.directory.read_json(name)) if self.directory.exists(name) else {}
        except (DamagedFileError, *_MALFORMED):  # its parts are then read
            return {}

    def write_files_so_far(self, generation: int, files: dict[int, dict[str, Any]]) -> None:
        """Write publishing.json of a generation, after the parts that it names."""
        self.directory.write_json(publishing_name(generation), _record_of(files), checksum=True)

    def open_plans(self) -> list[Plan]:
        """Return the generations whose rows are not all in captions/ yet."""
        return [plan for plan in self.plans() if not self.is_published(plan.generation)]

    def committed_chunks(self, generation: int) -> set[str]:
        """Return the ids of the chunks of a generation that are committed and not merged into captions/ yet."""
        matches = map(_CHUNK.fullmatch, self.directory.list_names(self.chunk_folder))
        return {
            match[1] for match in matches if match and int(match[2]) == generation and match[3] == self._chunk_suffix
        }

    def has_captions(self) -> bool:
        """Return whether a chunk was committed or published."""
        return bool(self.published_parts()) or any(self.committed_chunks(plan.generation) for plan in self.plans())

    def published_parts(self) -> set[int]:
        """Return the numbers of the files in captions/; other files there are skipped."""
        return set(part_numbers(self.directory.list_names("captions")))

    def files_with_rows(self) -> Iterator[str]:
        """Yield the names of all files of this table that hold rows."""
        for folder in ("plan", "history"):
            for below in self.directory.list_folders(folder):
                yield from self._files_with_rows_in(f"{folder}/{below}")
        for folder in (self.chunk_folder, "captions", "alt_text", "checks", "checks/judge", "checks/objects"):
            yield from self._files_with_rows_in(folder)

    def _files_with_rows_in(self, folder: str) -> Iterator[str]:
        for name in self.directory.list_names(folder):
            if _PART.fullmatch(name) or _CHUNK.fullmatch(name):
                yield f"{folder}/{name}"

    @property
    def chunk_folder(self) -> str:
        return f"chunks/{self.info.get('chunks_id', self.table_id)}"

    def chunk_name(self, chunk_id: str) -> str:
        return f"{self.chunk_folder}/{chunk_id}{self._chunk_suffix}"

    @property
    def _chunk_suffix(self) -> str:
        """Of the format of chunks, which a table keeps: Parquet in tables of earlier versions."""
        return ARROW_SUFFIX if self.info.get("chunk_format") == "arrow" else ".parquet"

    def check_current(self) -> None:
        """Raise OutputError where another run has overwritten the table since it was opened."""
        info = self.directory.read_json(TABLE_FILE) if self.directory.exists(TABLE_FILE) else {}
        if any(info.get(name) != self.info.get(name) for name in ("table_id", "chunks_id")):
            raise OutputError(f"{self.directory.location} was overwritten by another run; this one stops")

    def update(self, **changes: Any) -> CaptionsTable:
        """Write changed values to table.json, and return the table with them."""
        info = {**self.info, **changes}
        self.directory.write_json(TABLE_FILE, info)
        return CaptionsTable(self.directory, info)


def part_numbers(names: list[str]) -> list[int]:
    """Return the part numbers of those files that are named like parts."""
    return [int(match[1]) for match in map(_PART.fullmatch, names) if match]


def plan_folder(generation: int) -> str:
    return f"plan/g{generation:03d}"


def plan_name(generation: int) -> str:
    return f"{plan_folder(generation)}/plan.json"


def plan_notes_name(generation: int) -> str:
    return f"{plan_folder(generation)}/notes.txt"


def plan_part_mark(table: CaptionsTable, name: str) -> dict[bytes, bytes]:
    """Return the schema metadata by which a plan part is told from another part's, or another table's."""
    return {PLAN_PART: f"{table.table_id}/{name}".encode()}


def is_marked_otherwise(table: CaptionsTable, name: str, metadata: dict[bytes, bytes]) -> bool:
    """Return whether a plan part is another's. In tables of earlier versions parts have no mark."""
    mark = metadata.get(PLAN_PART)
    return mark != plan_part_mark(table, name)[PLAN_PART] if mark else bool(table.info.get("checksums"))


def plan_part_name(generation: int, part: int) -> str:
    return f"{plan_folder(generation)}/part-{part:05d}.parquet"


def published_name(generation: int) -> str:
    return f"{plan_folder(generation)}/published.json"


def publishing_name(generation: int) -> str:
    return f"{plan_folder(generation)}/publishing.json"


def captions_name(part: int) -> str:
    return f"captions/part-{part:05d}.parquet"


def history_name(generation: int, part: int) -> str:
    return f"history/g{generation:03d}/part-{part:05d}.parquet"


def open_table(location: str) -> CaptionsTable:
    """Open the table at `location`. Raises OutputError where there is none."""
    directory = Directory(location)
    if not directory.exists(TABLE_FILE):
        near = _table_above(location) or did_you_mean(location) or "; give the OUT of a caption run"
        raise OutputError(f"{location} holds no captions table (no {TABLE_FILE}){near}")
    info = directory.read_json(TABLE_FILE)
    if info.get("schema_version") != SCHEMA_VERSION:
        version = info.get("schema_version")
        raise OutputError(
            f"{location} has table version {version}, this program reads {SCHEMA_VERSION}; use another OUT"
        )
    table = CaptionsTable(directory, info)
    try:
        _check_info(table)
    except ValidationError as error:
        raise _wrong_settings(directory, error) from error
    except (pa.ArrowException, OSError, *_MALFORMED) as error:
        raise directory.damage(TABLE_FILE, f"is damaged: {error!r}") from error
    return table


def _wrong_settings(directory: Directory, error: ValidationError) -> OutputError:
    """Return the error for settings of the source in table.json that this version cannot take."""
    first, *others = error.errors()
    for unknown in (detail for detail in (first, *others) if detail["type"] == "extra_forbidden"):
        return directory.newer(TABLE_FILE, f"source.{unknown['loc'][0]}")
    setting = ".".join(map(str, ("source", *first["loc"])))
    return directory.damage(TABLE_FILE, f"is damaged: {setting}: {first['msg']}")


def _table_above(location: str) -> str:
    """Return "; did you mean OUT?" for a folder or file inside a table on this machine, else ""."""
    parents = [] if is_uri(location) else Path(local_path(location)).parents[:2]
    return next((f"; did you mean {parent}?" for parent in parents if (parent / TABLE_FILE).exists()), "")


def _check_info(table: CaptionsTable) -> None:
    """Raise an error where table.json, which people may edit, lacks what is read of it."""
    info = table.info
    for name in {"table_id", "chunks_id"} & {"table_id", *info}:
        if not _TABLE_ID.fullmatch(info[name]):
            raise ValueError(info[name])
    if len(set(table.schema.names)) != len(table.schema):
        raise ValueError("a column occurs twice")
    SourceConfig.model_validate(info["source"])
    str(info["fingerprint"])
    for model in [*info.get("models", {}).values(), *([info["model"]] if info["model"] else [])]:
        str(model["name"]), str(model["sha256"]), str(model["dtype"])


def as_hex(fields: list[pa.Field]) -> str:
    """Return columns as table.json holds them."""
    return str(pa.schema(fields).serialize().to_pybytes().hex())


def _record_of(files: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {"files": {str(part): file for part, file in sorted(files.items())}}


def _files_of(record: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the files of a record of what was published, by part. Raises one of _MALFORMED."""
    return {
        int(part): {key: file[key] for key in _FILE_FACTS} | {"counts": file.get("counts")}
        for part, file in record["files"].items()
    }


def plan_from_json(generation: int, value: dict[str, Any]) -> Plan:
    """Return the plan that `Plan.to_json` wrote. Raises one of _MALFORMED."""
    recaption = value.get("recaption")
    if value["kind"] not in _KINDS or value["rows_per_chunk"] < 1:
        raise ValueError(value["kind"])
    if value.get("generation", generation) != generation:  # plans of earlier versions do not say theirs
        raise ValueError(f"it is that of generation {value['generation']}")
    return Plan(
        generation=generation,
        kind=value["kind"],
        rows_per_chunk=value["rows_per_chunk"],
        parts={int(part): rows for part, rows in value["parts"].items()},
        num_ignored=value["num_ignored"],
        ignored_examples=value["ignored_examples"],
        recaption=recaption and Recaption(**recaption),
        notes=value.get("notes", []),
        num_bytes={int(part): size for part, size in value.get("num_bytes", {}).items()},
        ignored_kinds=value.get("ignored_kinds", {}),
        may_lack_images=bool(value.get("may_lack_images")),
    )
