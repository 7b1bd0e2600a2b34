"""Bind a table to one model and its settings, which are known by their fingerprint.

Captions of two models are never mixed in a table, except with --only; each row then names its model.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from captioner.config import CaptionConfig
from captioner.data import SAMPLES_FIELD
from captioner.errors import FingerprintError, OutputError, UsageError
from captioner.models import ModelRef
from captioner.models.devices import auto_dtype
from captioner.models.questions import answer_columns, answer_fields
from captioner.run.question_checks import check_same_answers
from captioner.store.table import CaptionsTable, as_hex

FACTS = (
    *("name", "revision", "sha256", "dtype", "num_beams", "max_new_tokens"),
    *("prompt", "system", "question_facts", "preprocess", "quantize"),
)
ENDPOINT_FACTS = ("served_model", "system_fingerprint", "max_side")
# Recorded where captions are sampled, and their values where they are not.
SAMPLING_FACTS = {"temperature": 0.0, "top_p": 1.0, "num_captions": 1, "seed": 0}
_NOT_ALWAYS_RECORDED: dict[str, Any] = SAMPLING_FACTS | {"system": None, "question_facts": None, "quantize": None}
_WORDS = {  # where they are not --NAME
    "sha256": "weights",
    "num_beams": "--num-beams",
    "max_new_tokens": "--max-new-tokens",
    "served_model": "served model",
    "system_fingerprint": "system_fingerprint",
    "max_side": "--max-side",
    "top_p": "--top-p",
    "num_captions": "--num-captions",
}


def bind(
    table: CaptionsTable, config: CaptionConfig, model: ModelRef, device: Callable[[], str]
) -> tuple[CaptionsTable, ModelRef]:
    """Return the table bound to the model, and the model with the dtype of the table.

    With --only the model may be another one; the table is bound to it once its rows are selected (see `rebind`).
    A table without a caption takes any model: that of an earlier start may be one that could not be loaded.
    Raises FingerprintError that says what to do.
    """
    table = rebind(table)
    before = table.info["fingerprint"]
    if before and not table.has_captions():
        if config.output.only:
            raise OutputError(f"--only: {table.directory.location} holds no captions yet; run without --only first")
        table = CaptionsTable(table.directory, table.info | {"fingerprint": None, "model": None, "models": {}})
    recorded = table.info["model"]
    _check_columns(table, model)
    dtype: str = config.model.dtype
    if model.endpoint:
        dtype = model.dtype
    elif dtype == "auto":
        same_model = recorded and (not config.output.only or recorded["sha256"] == model.sha256)
        dtype = recorded["dtype"] if same_model else auto_dtype(device())
    model = replace(model, dtype=dtype)
    if recorded is None:
        changes = {"answer_schema": as_hex(answer_fields(model)), "answer_columns": answer_columns(model)}
        if before not in (None, model.fingerprint):  # a late writer of that model cannot reach the chunks of this one
            changes["chunks_id"] = uuid.uuid4().hex[:12]
        return _bound(table, model.fingerprint, facts_of(model), **changes), model
    if table.info["fingerprint"] != model.fingerprint:
        if not config.output.only:
            raise FingerprintError(_refusal(table, model))
        if table.open_plans():
            raise FingerprintError(
                f"{table.directory.location} is not finished with {recorded['name']}; run its own command again, "
                "then --only with another model"
            )
        check_same_answers(model, table)
    return table, model


def rebind(table: CaptionsTable) -> CaptionsTable:
    """Return the table bound to the model of its latest recaptioning, if there is one."""
    latest = next((plan.recaption for plan in reversed(table.plans()) if plan.recaption), None)
    if latest is None or latest.fingerprint == table.info["fingerprint"]:
        return table
    return _bound(table, latest.fingerprint, latest.model)


def facts_of(model: ModelRef) -> dict[str, Any]:
    """Return what table.json records about a model."""
    facts = (*FACTS, *(ENDPOINT_FACTS if model.endpoint else ()), *(SAMPLING_FACTS if model.temperature else ()))
    return {name: getattr(model, name) for name in facts}


def _check_columns(table: CaptionsTable, model: ModelRef) -> None:
    """Raise FingerprintError where the model would write other columns than the table has, or one of them twice."""
    location, now = table.directory.location, model.num_captions
    before = (table.info["model"] or facts_of(model)).get("num_captions", 1)
    if before != now:
        raise FingerprintError(
            f"{location} holds captions made with --num-captions {before}, not {now}; give the same, another OUT, or "
            "--overwrite"
        )
    if now > 1 and any(field.name == SAMPLES_FIELD.name for field in table.kept_fields):
        raise UsageError(
            f"--num-captions {now} writes column {SAMPLES_FIELD.name!r}, but --keep-columns keeps one of that name; "
            "leave one of them out"
        )


def _bound(table: CaptionsTable, fingerprint: str, facts: dict[str, Any], **changes: Any) -> CaptionsTable:
    info = table.info
    earlier = info.get("models") or ({info["fingerprint"]: info["model"]} if info["model"] else {})
    return table.update(fingerprint=fingerprint, model=facts, models={**earlier, fingerprint: facts}, **changes)


def _refusal(table: CaptionsTable, model: ModelRef) -> str:
    recorded, location = table.info["model"], table.directory.location
    difference = _difference(recorded, model)
    if model.fingerprint in table.info.get("models", {}):
        return (
            f"{location} was recaptioned with {recorded['name']} ({difference}); give --model {recorded['name']} to go "
            "on, --only to recaption with this one, another OUT, or --overwrite"
        )
    return (
        f"{location} holds captions made with {difference}; use the same, --only to recaption weak rows with this "
        "model, another OUT, or --overwrite"
    )


def _difference(recorded: dict[str, Any], model: ModelRef) -> str:
    """Return in words how the recorded model differs from `model`."""
    both_served = model.endpoint and recorded.get("served_model")
    ignored = {"name", "revision"} | ({"sha256"} if both_served else set())
    differing = [
        _in_words(key, value, getattr(model, key))
        for key, value in (_NOT_ALWAYS_RECORDED | recorded).items()
        if key not in ignored and getattr(model, key) != value
    ]
    return ", ".join(differing) or f"another tokenizer, processor or generation config of {recorded['name']}"


def _in_words(key: str, recorded: Any, now: Any) -> str:
    if key == "question_facts":
        return "other --questions"
    before, after = ("none" if value is None else str(value)[:12] for value in (recorded, now))
    return f"{_WORDS.get(key, '--' + key)} {before} instead of {after}"
