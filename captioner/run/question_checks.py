"""Check what a run asks about its images before it starts, and note what was not answered when it ends."""

from __future__ import annotations

from collections.abc import Iterator

from pyarrow import types

from captioner.config import SourceConfig
from captioner.console.text import counted
from captioner.data import CAPTIONS_SCHEMA, PLAN_SCHEMA, SAMPLES_FIELD
from captioner.errors import OutputError, SourceError, UsageError
from captioner.models import ModelRef
from captioner.models.questions import answer_fields, as_text, check_columns, prompt_columns
from captioner.store.table import CaptionsTable, plan_part_name

IMAGE_ID = "image_id"


def check_columns_of_questions(ref: ModelRef, source: SourceConfig) -> None:
    """Raise UsageError where a prompt names a column that is not kept, or the column of an answer exists already."""
    kept = ", ".join(source.keep_columns) or "none"
    check_columns(ref, [IMAGE_ID, *source.keep_columns], f"add it to --keep-columns (kept: {kept})")
    taken = {*CAPTIONS_SCHEMA.names, SAMPLES_FIELD.name, *PLAN_SCHEMA.names, *source.keep_columns}
    for field in answer_fields(ref):
        if field.name in taken:
            raise UsageError(f"--questions: the table already has a column {field.name!r}; rename the question")
        taken.add(field.name)


def check_prompt_columns(ref: ModelRef, table: CaptionsTable) -> None:
    """Raise SourceError where a column of the prompt is empty for all images. Reads the plan until it finds a value."""
    for name in prompt_columns(ref):
        if name == IMAGE_ID:
            continue
        kind = table.schema.field(name).type
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
            raise UsageError(f"--prompt: column {name!r} holds bytes; a prompt needs text or numbers")
        if not any(as_text(value).strip() for value in _values(table, name)):
            raise SourceError(f"--prompt: no image has a value in column {name!r}; leave it out, or name another one")


def _values(table: CaptionsTable, name: str) -> Iterator[object]:
    for plan in table.plans():
        for part in sorted(plan.parts):
            yield from table.directory.read_table(plan_part_name(plan.generation, part), [name])[name].to_pylist()


def check_same_answers(ref: ModelRef, table: CaptionsTable) -> None:
    """Raise OutputError where --only would fill other columns than the table has."""
    if answer_fields(ref) != table.answer_fields:
        columns = ", ".join(field.name for field in table.answer_fields) or "no answers besides the caption"
        raise OutputError(
            f"--only: {table.directory.location} has {columns}; give --questions of the same names, or another OUT"
        )


def question_notes(blank: dict[str, int], unanswered: dict[str, int]) -> list[str]:
    """Return a line for each column that was empty in prompts, and for each question without an answer."""
    return [
        *(f"prompt: column {name!r} was empty for {counted(count, 'image')}" for name, count in blank.items()),
        *(
            f"question {name!r}: no whole answer for {counted(count, 'image')}; reasons are in the column {name}_error"
            for name, count in unanswered.items()
        ),
    ]
