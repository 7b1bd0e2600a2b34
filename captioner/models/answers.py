"""Answers that a JSON Schema describes: checked, asked for once more where they do not fit, and made columns.

Each property of the schema is a column of the table, of its type; a schema of something else than an object is one
column. What a column cannot type, such as a choice of two types, is JSON in a column of text.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyarrow import types

from captioner.data import CAPTION, NO_USAGE, Captions, Question
from captioner.errors import UsageError

MAX_REASON = 200  # characters
_FENCE = re.compile(r"```\w*\s*\n(.*)\n\s*```", re.DOTALL)  # around the JSON of many models
_TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
_LARGEST = 1 << 63


class MisfitError(ValueError):
    """Raised where an answer does not fit its schema, or the columns of its question."""


def check_schema(where: str, question: Question) -> None:
    """Raise UsageError where a schema cannot be used. `where`: the beginning of the message."""
    from jsonschema.exceptions import SchemaError

    if question.schema is None:
        return
    try:
        _validator(question.schema)
    except SchemaError as error:
        raise UsageError(f"{where}: schema: {_line(error.message)}") from None
    if any(not reference.startswith("#") for reference in _references(json.loads(question.schema))):
        raise UsageError(f"{where}: schema: $ref must begin with #; nothing is fetched")
    if question.name == CAPTION and not any(field.equals(_CAPTION_FIELD) for field in fields_of(question)):
        raise UsageError(f"{where}: schema: needs a property caption of type string, the caption")


def fields_of(question: Question) -> list[pa.Field]:
    """Return the columns that the answers to a question fill."""
    if question.schema is None:
        return [pa.field(question.name, pa.string())]
    kind = _kind_of(question.schema)
    return list(kind) if types.is_struct(kind) else [pa.field(question.name, kind)]


_CAPTION_FIELD = pa.field(CAPTION, pa.string())


def values_of(question: Question, text: str) -> dict[str, Any]:
    """Return an answer as the values of its columns. Raises MisfitError that says what does not fit."""
    if question.schema is None:
        return {question.name: text}
    answer = _text_in(text) if json.loads(question.schema).get("type") == "string" else _parse(text)
    from jsonschema.exceptions import best_match

    error = best_match(_validator(question.schema).iter_errors(answer))
    if error is not None:
        raise MisfitError(f"does not fit the schema: {error.json_path}: {_line(error.message)}")
    kind = _kind_of(question.schema)
    if types.is_struct(kind) and answer is None:
        raise MisfitError("is null")
    values = _as_type(answer, kind)
    values = values if types.is_struct(kind) else {question.name: values}
    if question.name == CAPTION and not (values[CAPTION] or "").strip():
        raise MisfitError("has an empty caption")
    return dict(values)


def misfit(question: Question, text: str, finished: bool) -> str:
    """Return why an answer does not fit its question, or "". `finished`: whether it ends within the limit."""
    try:
        values_of(question, text)
    except MisfitError as error:
        cut = "" if finished else f"; cut at {question.max_new_tokens} tokens"
        return f"{error}{cut}"[:MAX_REASON]
    return ""


def instruction(question: Question) -> str:
    """Return what follows the prompt of a question where nothing else tells the model the schema."""
    return f"\n\nAnswer with JSON alone. It must fit this JSON Schema: {question.schema}" if question.schema else ""


def asked_again(question: Question, prompt: str, reason: str) -> str:
    """Return the prompt of the second and last time, after an answer that did not fit."""
    schema = "" if instruction(question) in prompt else instruction(question)
    return f"{prompt}{schema}\n\nAn earlier answer was wrong: {reason}"


def replaced(captions: Captions, indices: Sequence[int], newer: Captions) -> Captions:
    """Return captions with those at `indices` replaced."""
    changes = {}
    for name in ("texts", "num_tokens", "logprob_mean", "finished", "errors", "samples"):
        values = list(getattr(captions, name))
        for index, value in zip(indices, getattr(newer, name), strict=False):  # the last two may be empty
            values[index] = value
        changes[name] = values
    return replace(captions, **changes)


NO_CAPTIONS = Captions([], [], [], [])


def with_gaps(captions: Captions, indices: Sequence[int], count: int) -> Captions:
    """Return the captions of `count` images, of which those at `indices` were asked; empty ones of the others."""
    none = [None] * count
    samples: list[Sequence[str]] = [()] * count if captions.samples else []
    usage = captions.usage or [NO_USAGE]
    errors = [""] * count if captions.errors else []
    blank = Captions([""] * count, none, none, [True] * count, errors, usage, samples)
    return replaced(blank, indices, captions)


@lru_cache(64)
def _validator(schema: str) -> Any:
    """Return the validator of a schema, which fetches nothing. Raises jsonschema's SchemaError."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    described = json.loads(schema)
    kind = validator_for(described, default=Draft202012Validator)
    kind.check_schema(described)
    return kind(described, registry=Registry())


def _parse(text: str) -> Any:
    fenced = _FENCE.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise MisfitError(f"is not JSON: {_line(str(error))}") from None


def _text_in(text: str) -> Any:
    """Return an answer whose schema is that of a text: a string of JSON, or the answer as it is."""
    try:
        answer = _parse(text)
    except MisfitError:
        return text.strip()
    return answer if isinstance(answer, str) else text.strip()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _references(schema: Any) -> list[str]:
    """Return every $ref in a schema."""
    if isinstance(schema, list):
        return [reference for item in schema for reference in _references(item)]
    if not isinstance(schema, dict):
        return []
    own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
    return own + [reference for value in schema.values() for reference in _references(value)]


@lru_cache(64)
def _kind_of(schema: str) -> pa.DataType:
    described = json.loads(schema)
    return _type_of(described, described, ("#",))


def _type_of(schema: Any, root: Any, references: tuple[str, ...]) -> pa.DataType:
    """Return the Arrow type of the values of a schema; text, for JSON, where there is none.

    `references`: those that lead to it; one that leads to itself has no type.
    """
    if not isinstance(schema, dict) or schema.get("$ref") in references:
        return pa.string()
    if "$ref" in schema:
        reference = schema["$ref"]
        return _type_of(_referred(reference, root), root, (*references, reference))
    choices = [choice for choice in schema.get("anyOf") or schema.get("oneOf") or [] if choice != {"type": "null"}]
    if choices:
        return _type_of(choices[0], root, references) if len(choices) == 1 else pa.string()
    kinds = schema.get("type", [])
    kinds = [kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null"]
    kind = kinds[0] if len(kinds) == 1 else ""
    if kind == "array" and isinstance(schema.get("items"), dict):
        return pa.list_(_type_of(schema["items"], root, references))
    if kind == "object" and schema.get("properties"):
        fields = schema["properties"].items()
        return pa.struct([pa.field(name, _type_of(value, root, references)) for name, value in fields])
    return _TYPES.get(kind, pa.string())


def _referred(reference: str, root: Any) -> Any:
    """Return the part of a schema that "#/$defs/NAME" stands for; {} where there is none."""
    part = root
    for name in reference.lstrip("#/").split("/") if reference != "#" else []:
        part = part.get(name.replace("~1", "/").replace("~0", "~"), {}) if isinstance(part, dict) else {}
    return part


def _as_type(value: Any, kind: pa.DataType) -> Any:
    """Return a value of JSON as a column of that type takes it. Raises MisfitError where it cannot."""
    if value is None:
        return None
    if types.is_struct(kind):
        names = {field.name for field in kind}
        unnamed = [name for name in value if name not in names]
        if unnamed:
            raise MisfitError(f"has properties that the schema does not name: {_line(', '.join(unnamed))}")
        return {field.name: _as_type(value.get(field.name), field.type) for field in kind}
    if types.is_list(kind):
        return [_as_type(item, kind.value_type) for item in value]
    if types.is_int64(kind):
        if not -_LARGEST <= value < _LARGEST:
            raise MisfitError("holds an integer of more than 64 bits")
        return int(value)
    if types.is_float64(kind):
        if abs(value) > sys.float_info.max:
            raise MisfitError("holds a number that is too large")
        return float(value)
    if types.is_string(kind):
        return _as_text(value)
    return value


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MisfitError("holds text that is not valid Unicode") from None
    return text


def _line(text: str) -> str:
    return " ".join(text.split())[:120]
