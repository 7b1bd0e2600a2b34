"""A trained model on the Hugging Face hub: its model card, and its upload."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.console.text import printable
from captioner.errors import OutputError, UsageError
from captioner.files import hub_reason
from captioner.store.directory import Directory

if TYPE_CHECKING:
    from captioner.training.worker import FinishInputs

_CARD = """---
library_name: {library}
pipeline_tag: image-to-text
{base_line}tags: [image-captioning]
metrics: [wer]
---

# Image captioning model

Fine-tuned from `{base}` (weights sha256 `{base_sha}`) on {num_train:,} images of `{data}`.

| set | images | WER | WER of shuffled captions | loss |
|---|---|---|---|---|
{rows}

WER is that of generated captions (greedy, at most {max_new_tokens} tokens) against the best reference of each image.
The shuffled column is the WER of the same captions assigned to other images. {selection}

- Training run: `{run_id}`, step {step:,} of {max_steps:,}
- Data fingerprint: `{data_fingerprint}`
- Training images: `training_images.parquet` (sha256); leave them out when you measure quality.

## Settings

{settings}

Versions: {versions}.
"""
_WITH_TEST_SET = "The test set was scored once, after the checkpoint was chosen on the eval set."
_WITHOUT_TEST_SET = "The checkpoint was selected on this set, so its figures are better than on new images."


def model_card(inputs: FinishInputs, result: dict[str, Any]) -> str:
    """Return the README.md of a trained model. `result`: as `captioner.training.finish.finish` returns it."""
    base = inputs.record["base_model"]
    settings = {**inputs.config.training.model_dump(), "caption_choice": inputs.config.data.caption_choice}
    names = {"prompt", "freeze_vision", "lora_rank", "lora_targets", "quantize"}
    chosen = inputs.config.model.model_dump(include=names)
    settings |= {name: value for name, value in chosen.items() if value}
    measured = {"eval, before training": result["before"]} | result["measured"]
    on_hub = base["revision"] is not None
    return _CARD.format(
        base_line=f"base_model: {base['name']}\n" if on_hub else "",
        library="peft" if inputs.config.model.keep_adapter else "transformers",
        base=printable(base["name"]),
        base_sha=base["sha256"][:16],
        num_train=len(inputs.tables["train"]),
        data=printable(inputs.record["settings"]["data"]["path"]),
        rows="\n".join(_row(name, figures) for name, figures in measured.items()),
        max_new_tokens=inputs.config.model.max_new_tokens,
        selection=_WITH_TEST_SET if "test" in result["measured"] else _WITHOUT_TEST_SET,
        run_id=inputs.record["training_run_id"],
        step=result["step"],
        max_steps=inputs.schedule.max_steps,
        data_fingerprint=inputs.out.read_json("pairs/pairs.json")["fingerprint"],
        settings="\n".join(f"- `{name}`: {value}" for name, value in settings.items()),
        versions=", ".join(f"{name} {number}" for name, number in inputs.record["versions"].items()),
    )


def _row(name: str, figures: dict[str, Any]) -> str:
    values = [figures["wer"], figures["shuffled_wer"], figures["loss"]]
    columns = " | ".join("-" if value is None else f"{value:.4f}" for value in values)
    return f"| {name} | {figures['num_pictures']:,} | {columns} |"


def check_repository(name: str) -> None:
    """Raise UsageError where a repository cannot have this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--hub-model-id {name}: {error}") from None
    if "/" not in name:
        raise UsageError(f"--hub-model-id {name}: has no owner; give OWNER/NAME")


def push_to_hub(out: Directory, repository: str, api: Any = None) -> str:
    """Upload OUT/model to a repository, which is created private where it is new, and return its address.

    `api`: the hub's client. Raises OutputError where the upload fails.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with tempfile.TemporaryDirectory(prefix="captioner-push-") as folder:
        for name in out.list_names("model"):
            (Path(folder) / name).write_bytes(out.read_bytes(f"model/{name}"))
        try:
            address = api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add the trained model")
        except Exception as error:  # which exceptions the client raises depends on its version
            raise OutputError(
                f"--hub-model-id {repository}: the upload failed: {hub_reason(error)}; the model is in "
                f"{out.shown('model')}, the same command tries again"
            ) from None
    return str(address)
