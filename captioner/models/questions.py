"""What a model is asked about each image: prompts that hold columns of its row, and several questions.

    --prompt "Describe the image in one sentence. Its title is {title}."
    --questions FILE.yaml       caption: {prompt: Describe the image.}
                                tags: {prompt: Name the objects., schema: {type: array, items: {type: string}}}

A name in braces is a column of the image's row: image_id, or a kept column of the source. `{{title}}` stands for
{title} itself. Other braces mean nothing, so that a prompt may hold JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from pydantic import Field, ValidationError

from captioner.config import ModelConfig, Settings, read_yaml
from captioner.data import CAPTION, Captions, Prompts, Question, Usage, error_column, prompt_column
from captioner.errors import ModelError, UsageError
from captioner.models.answers import check_schema, fields_of, instruction, misfit, values_of
from captioner.models.families import family_of
from captioner.models.ref import ModelRef

KEYS = "prompt, max_new_tokens, schema"
FILE_FORMAT = "give a name with a prompt for each question, one of them caption"
_BRACES = re.compile(r'\{\{([^{}"\n]+)\}\}|\{([^{}"\n]+)\}')
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKING_QUESTIONS = ("question", "prefix")  # values of Family.prompt


class _Entry(Settings):
    """A question as --questions describes it."""

    prompt: str = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1)
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


def read_questions(config: ModelConfig) -> tuple[ModelConfig, tuple[Question, ...]]:
    """Return the settings with the prompt and limit of the caption, and the questions, that of the caption first.

    Raises UsageError naming the file and the key at fault.
    """
    if not config.questions:
        return config, ()
    if config.prompt:
        raise UsageError("--prompt and --questions exclude each other; give the prompt of the caption in the file")
    entries = read_yaml(config.questions, "--questions")
    if CAPTION not in entries:
        raise UsageError(f"--questions {config.questions}: no question is named caption; {FILE_FORMAT}")
    questions = {name: _question(config, name, entry) for name, entry in entries.items()}
    caption = questions.pop(CAPTION)
    if caption.schema and config.num_captions > 1:
        raise UsageError(
            f"--questions {config.questions}: the schema of caption and --num-captions {config.num_captions} exclude "
            "each other; leave one of them out"
        )
    limits = {"prompt": caption.prompt, "max_new_tokens": caption.max_new_tokens}
    return config.model_copy(update=limits), (caption, *questions.values())


def _question(config: ModelConfig, name: object, entry: object) -> Question:
    where = f"--questions {config.questions}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{where}: {name!r} is not a column name; use letters, digits and _, a letter first")
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: {name} is {entry!r}, but must hold keys: {KEYS}")
    try:
        checked = _Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{where}: {'.'.join([name, *map(str, first['loc'])])}: {first['msg']}") from None
    schema = None if checked.json_schema is None else json.dumps(checked.json_schema, ensure_ascii=False, default=str)
    question = Question(name, checked.prompt, checked.max_new_tokens or config.max_new_tokens, schema)
    check_schema(f"{where}: {name}", question)
    return question


def with_questions(ref: ModelRef, config: ModelConfig, questions: tuple[Question, ...]) -> ModelRef:
    """Return the model with its further questions and --system. Raises ModelError where it takes none."""
    schema = questions[0].schema if questions else None
    ref = replace(ref, system=config.system or None, caption_schema=schema, more_questions=questions[1:])
    family = family_of(ref.family)
    if ref.endpoint or ref.family == "fake" or family.prompt == "question":
        return ref
    model = f"{ref.path} is a {ref.family} model"
    if ref.system:
        raise ModelError(f"--system: {model}, which takes none; use a chat model, or leave it out")
    if family.prompt not in _TAKING_QUESTIONS and questions:
        raise ModelError(f"--questions: {model}, which captions only; use a chat model, or leave it out")
    if family.prompt not in _TAKING_QUESTIONS and _BRACES.search(ref.prompt or ""):
        raise ModelError(
            f"--prompt {ref.prompt!r}: {model}, whose prompt is the same for all images; use a chat model, or leave "
            "out the braces"
        )
    return ref


def columns_in(prompt: str | None) -> list[str]:
    """Return the names of the columns that a prompt holds, each once."""
    return list(dict.fromkeys(name for _, name in _BRACES.findall(prompt or "") if name))


def prompt_columns(ref: ModelRef) -> list[str]:
    """Return the names of the columns that the prompts of a model hold, each once."""
    return list(dict.fromkeys(name for question in ref.questions for name in columns_in(question.prompt)))


def fill(prompt: str | None, values: Mapping[str, str]) -> str:
    """Return a prompt with the values of its columns; "" for a column without a value."""
    return _BRACES.sub(lambda match: f"{{{match[1]}}}" if match[1] else values.get(match[2], ""), prompt or "")


def filled_prompts(ref: ModelRef, values: Mapping[str, str]) -> tuple[str, ...]:
    """Return the prompts of an image with these values; with the schema, where the model learns it in no other way."""
    tells_schema = ref.endpoint is None or not ref.endpoint.response_format
    return tuple(
        fill(question.prompt, values) + (instruction(question) if tells_schema else "") for question in ref.questions
    )


def same_prompts(ref: ModelRef) -> tuple[str, ...]:
    """Return the prompts of a model whose prompts hold no columns; the others as for an image without values."""
    return filled_prompts(ref, {})


def prompts_of(ref: ModelRef, rows: pa.Table) -> list[Prompts] | None:
    """Return what each of N rows is asked, [N][questions]; None where that is the same for all."""
    names = prompt_columns(ref)
    if not names:
        return None
    columns = [[as_text(value) for value in rows[name].to_pylist()] for name in names]
    values = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    return [filled_prompts(ref, row) for row in values]


def asked_columns(ref: ModelRef, prompts: list[Prompts] | None, num_rows: int) -> dict[str, list[str | None]]:
    """Return the columns of the table with what each row is asked. `prompts`: from `prompts_of`."""
    names = [prompt_column(question.name) for question in ref.questions]
    prompts = prompts or [same_prompts(ref)] * num_rows
    return {
        name: [text or None for text in column] for name, column in zip(names, zip(*prompts, strict=True), strict=True)
    }


def as_text(value: Any) -> str:
    """Return a value of a column as it stands in a prompt: "" for null, a list with commas."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(as_text, value)))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def check_columns(ref: ModelRef, columns: Collection[str], advice: str) -> None:
    """Raise UsageError where a prompt holds a column that is not among those of the images' rows."""
    for name in prompt_columns(ref):
        if name not in columns:
            flag = "--questions" if ref.more_questions else "--prompt"
            raise UsageError(
                f"{flag}: {{{name}}} is not a column of the images; {advice}, or write {{{{{name}}}}} for the braces "
                "themselves"
            )


def answer_fields(ref: ModelRef) -> list[pa.Field]:
    """Return the columns of all answers but the caption.

    What the caption's schema has besides it; then for each other question those of its answer, of what was asked, and
    of why there is no whole answer.
    """
    fields = [field for field in fields_of(ref.questions[0]) if field.name != CAPTION]
    for question in ref.more_questions:
        beside = (pa.field(name, pa.string()) for name in (prompt_column(question.name), error_column(question.name)))
        fields += [*fields_of(question), *beside]
    return fields


def answer_columns(ref: ModelRef) -> dict[str, list[str]]:
    """Return the columns with the answers to each question besides the caption, by name of the question."""
    return {question.name: [field.name for field in fields_of(question)] for question in ref.more_questions}


def blank_columns(ref: ModelRef, rows: pa.Table) -> dict[str, int]:
    """Return how many rows have no value, by column of the prompt; without columns of which all have one."""
    counts = {name: sum(not as_text(value) for value in rows[name].to_pylist()) for name in prompt_columns(ref)}
    return {name: count for name, count in counts.items() if count}


def unanswered(ref: ModelRef, rows: pa.Table) -> dict[str, int]:
    """Return how many rows have a reason in the error column of a question, by question; without those of none."""
    errors = {question.name: rows[error_column(question.name)] for question in ref.more_questions}
    counts = {name: len(column) - column.null_count for name, column in errors.items()}
    return {name: count for name, count in counts.items() if count}


def with_answers(
    questions: Sequence[Question], replies: Sequence[Captions], prompts: Sequence[Prompts] | None = None
) -> Captions:
    """Return the captions, which are in the first of `replies`, with the answers to the other questions.

    `prompts`: what each image was asked. Where one is None, neither the reply nor its columns mean anything.
    """
    captions, others = replies[0], list(zip(questions[1:], replies[1:], strict=True))
    if not others and questions[0].schema is None:
        return captions
    prompts = prompts or [("",) * len(questions)] * len(captions.texts)
    of_caption = _answers(questions[0], captions, [image_prompts[0] for image_prompts in prompts])
    answers = [values for values, _ in of_caption]
    texts = [values.pop(CAPTION, None) or "" for values in answers]
    for index, (question, reply) in enumerate(others, start=1):
        of_question = _answers(question, reply, [image_prompts[index] for image_prompts in prompts])
        for answer, (values, error) in zip(answers, of_question, strict=True):
            answer |= {**values, error_column(question.name): error or None}
    usage = [Usage.total(usages) for usages in zip(*(reply.usage for reply in replies), strict=True)]
    return replace(captions, texts=texts, errors=[error for _, error in of_caption], answers=answers, usage=usage)


def _answers(question: Question, reply: Captions, prompts: Sequence[str | None]) -> list[tuple[dict[str, Any], str]]:
    """Return the values of the columns of a question for each image, and why there is no whole answer, or ""."""
    errors = reply.errors or [""] * len(reply.texts)
    columns = zip(prompts, reply.texts, reply.finished, errors, strict=True)
    return [
        ({}, "") if prompt is None else _answer(question, text, finished, error)
        for prompt, text, finished, error in columns
    ]


def _answer(question: Question, text: str, finished: bool, error: str) -> tuple[dict[str, Any], str]:
    """Return the columns of one answer, and why it is not whole, or "".

    A text that was cut is kept with the reason; a caption that was cut has a flag instead.
    """
    error = error or misfit(question, text, finished)
    if error:
        return {field.name: None for field in fields_of(question)}, error
    is_cut = not finished and question.name != CAPTION and question.schema is None
    reason = f"cut at {question.max_new_tokens} tokens; raise max_new_tokens of the question" if is_cut else ""
    return values_of(question, text), reason
