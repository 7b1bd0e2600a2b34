"""OUT/train.json: which training run an OUT holds, and whether a command may resume it."""

from __future__ import annotations

import hashlib
import json
import uuid
from datetime import UTC, datetime
from typing import Any

from captioner.config import Settings, TrainConfig
from captioner.errors import FingerprintError, OutputError
from captioner.files import shown
from captioner.models import ModelRef
from captioner.run.record import versions
from captioner.sources.splits import DEFAULT as DEFAULT_SPLIT
from captioner.store.directory import Directory
from captioner.training.settings import replaced_settings

RUN_FILE = "train.json"

# Settings that may differ when a run is resumed: where it runs and what it reports.
UNBOUND_SETTINGS = {
    "cluster": {"address", "gpus_per_worker", "num_workers"},
    "training": {
        "fsdp",
        "logging_steps",
        "per_device_eval_batch_size",
        "report_to",
        "save_total_limit",
        "stop_on_collapse",
    },
    "output": {"path", "push_to_hub", "hub_model_id", "caption_image"},
    "data": {"max_failed", "pixel_cache"},
    "model": {"device", "keep_adapter"},
}
# Settings that may be URIs, whose credentials must not be written to a record.
_URI_SETTINGS = {"data": ("path", "eval_data", "test_data"), "model": ("name",), "output": ("path",)}


def open_record(config: TrainConfig, out: Directory, model: ModelRef, num_workers: int) -> dict[str, Any]:
    """Return the record of the run in OUT, or a new one. Its `num_workers` are those that started it.

    A run that never trained is begun anew where its configuration differs. Raises FingerprintError where OUT holds a
    run with another configuration that did.
    """
    bound = {group: settings for group, settings in _bound_settings(config).items() if settings}
    bound["model"]["sha256"] = model.sha256
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    if out.exists(RUN_FILE):
        record = out.read_json(RUN_FILE)
        run_id = record["training_run_id"]  # which its pixel cache is named after
        difference = _difference(record["bound"], bound)
        if not difference:
            return record
        if "state" in record:
            raise FingerprintError(
                f"{shown(config.output.path)} was started with {difference}; give the same value to resume the run, or"
                " another OUT"
            )
        if not _has_pairs_of(record["bound"], bound):
            out.delete_folder("pairs")
    elif not out.is_empty():
        raise OutputError(f"{shown(config.output.path)} is not empty and holds no training run; give another OUT")
    identity = bound | {"cluster": {"num_workers": num_workers}}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    record = {
        "training_run_id": run_id,
        "fingerprint": fingerprint,
        "num_workers": num_workers,
        "bound": bound,
        "settings": _settings(config),
        "base_model": {"name": shown(model.name), "revision": model.revision, "sha256": model.sha256},
        "versions": versions(),
    }
    out.write_json(RUN_FILE, record)
    return record


def mark_trained(out: Directory) -> None:
    """Write into the record that the run in OUT trains, so that its settings are kept from now on."""
    record = out.read_json(RUN_FILE)
    if "state" not in record:
        out.write_json(RUN_FILE, record | {"state": "running"})


def _bound_settings(config: TrainConfig) -> dict[str, dict[str, Any]]:
    unused = {(group, replaced) for group, _, replaced in replaced_settings(config)}
    return {
        group: {
            name: value
            for name, value in settings.items()
            if name not in UNBOUND_SETTINGS[group] and (group, name) not in unused
        }
        for group, settings in _settings(config).items()
    }


def _settings(config: TrainConfig) -> dict[str, dict[str, Any]]:
    settings = config.model_dump()
    settings["data"]["split"] = config.data.split or DEFAULT_SPLIT  # as earlier versions recorded it
    for group, names in _URI_SETTINGS.items():
        settings[group] |= {name: shown(settings[group][name]) for name in names if settings[group][name]}
    return settings


def _difference(recorded: dict[str, Any], given: dict[str, Any]) -> str:
    """Return the first setting that differs, with both values; "" where none does."""
    for group, settings in given.items():
        for name, value in settings.items():
            before = recorded.get(group, {}).get(name, _default(group, name))
            if before != value:
                return f"{group}.{name} = {_shorten(before)}, now it is {_shorten(value)}"
    return ""


def _has_pairs_of(recorded: dict[str, Any], given: dict[str, Any]) -> bool:
    """Return whether two configurations have the same pairs in the same sets."""
    seeds = [bound.get("training", {}).get("seed") for bound in (recorded, given)]
    return seeds[0] == seeds[1] and all(recorded.get(group) == given.get(group) for group in ("data", "model"))


def _default(group: str, name: str) -> Any:
    """Return the default of a setting that the version which started the run did not have."""
    kind = TrainConfig.model_fields[group].annotation
    field = kind.model_fields.get(name) if isinstance(kind, type) and issubclass(kind, Settings) else None
    return None if field is None else field.get_default(call_default_factory=True)


def _shorten(value: Any) -> str:
    """Return the repr of a setting, of a sha256 its first 12 digits."""
    return repr(value[:12] if isinstance(value, str) and len(value) == 64 else value)
