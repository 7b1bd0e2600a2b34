"""A table is bound to one model and its settings: its fingerprint. Captions of two never mix, unless a person asks for
it with --only; then every row still says by which it was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from captioner.config import CaptionConfig
from captioner.errors import FingerprintError
from captioner.models import ModelRef
from captioner.models.devices import auto_dtype
from captioner.store.table import CaptionsTable

FACTS = ("name", "revision", "sha256", "dtype", "num_beams", "max_new_tokens", "prompt", "preprocess")
_FLAGS = {"sha256": "weights", "num_beams": "--num-beams", "max_new_tokens": "--max-new-tokens"}


def bind(
    table: CaptionsTable, config: CaptionConfig, model: ModelRef, device: Callable[[], str]
) -> tuple[CaptionsTable, ModelRef]:
    """The table bound to the model, and the model in the dtype of its captions.

    With --only the model may be another one; the table is bound to it once its rows are chosen (see `rebind`).
    Raises FingerprintError with the way out.
    """
    table = rebind(table)
    recorded = table.info["model"]
    dtype: str = config.model.dtype
    if dtype == "auto":
        known = recorded and (not config.output.only or recorded["sha256"] == model.sha256)
        dtype = recorded["dtype"] if known else auto_dtype(device())
    model = replace(model, dtype=dtype)
    if recorded is None:
        return _bound(table, model.fingerprint, facts_of(model)), model
    if table.info["fingerprint"] != model.fingerprint:
        if not config.output.only:
            raise FingerprintError(_refusal(table, model))
        if table.open_plans():
            raise FingerprintError(
                f"{table.directory.location} is not finished with {recorded['name']}; run its own command again, "
                "then --only with another model"
            )
    return table, model


def rebind(table: CaptionsTable) -> CaptionsTable:
    """The table bound to the model of its latest recaptioning, if there is one."""
    latest = next((plan.recaption for plan in reversed(table.plans()) if plan.recaption), None)
    if latest is None or latest.fingerprint == table.info["fingerprint"]:
        return table
    return _bound(table, latest.fingerprint, latest.model)


def facts_of(model: ModelRef) -> dict[str, Any]:
    """What table.json says of a model."""
    return {name: getattr(model, name) for name in FACTS}


def _bound(table: CaptionsTable, fingerprint: str, facts: dict[str, Any]) -> CaptionsTable:
    info = table.info
    earlier = info.get("models") or ({info["fingerprint"]: info["model"]} if info["model"] else {})
    return table.update(fingerprint=fingerprint, model=facts, models={**earlier, fingerprint: facts})


def _refusal(table: CaptionsTable, model: ModelRef) -> str:
    recorded, location = table.info["model"], table.directory.location
    what = _difference(recorded, model)
    if model.fingerprint in table.info.get("models", {}):
        return (
            f"{location} was recaptioned with {recorded['name']} ({what}); give --model {recorded['name']} to go on, "
            "--only to recaption with this one, another OUT, or --overwrite"
        )
    return (
        f"{location} holds captions made with {what}; use the same, --only to recaption weak rows with this model, "
        "another OUT, or --overwrite"
    )


def _difference(recorded: dict[str, Any], model: ModelRef) -> str:
    """What of the recorded model differs, in words."""
    differing = [
        f"{_FLAGS.get(key, '--' + key)} {str(value)[:12]} instead of {str(getattr(model, key))[:12]}"
        for key, value in recorded.items()
        if key not in ("name", "revision") and getattr(model, key) != value
    ]
    return ", ".join(differing) or f"another tokenizer, processor or generation config of {recorded['name']}"
