"""The model card of a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from captioner.console.text import printable

if TYPE_CHECKING:
    from captioner.training.job import Finishing

_CARD = """---
library_name: transformers
pipeline_tag: image-to-text
{base_line}tags: [image-captioning]
metrics: [wer]
---

# Image captioning model

Fine-tuned from `{base}` (weights sha256 `{base_sha}`) on {num_train:,} pictures of `{data}`.

| set | pictures | WER | WER of shuffled captions | loss |
|---|---|---|---|---|
{rows}

WER is that of generated captions (greedy, at most {max_new_tokens} tokens), the best reference of each picture
counted. The shuffled column is the same captions on the wrong pictures. {selection}

- Training run: `{run_id}`, step {step:,} of {max_steps:,}
- Data fingerprint: `{data_fingerprint}`
- Pictures it has seen: `training_images.parquet` (sha256); leave them out of spot-checks.

## Settings

{settings}

Versions: {versions}.
"""


def model_card(job: Finishing, result: dict[str, Any]) -> str:
    """README.md, from what was measured."""
    before = {"eval, before training": result["before"]}
    base = job.record["base_model"]
    facts = job.out.read_json("pairs/pairs.json")
    has_test = "test" in result["measured"]
    settings = {**job.config.training.model_dump(), "caption_choice": job.config.data.caption_choice}
    on_hub = base["revision"] is not None
    return _CARD.format(
        base_line=f"base_model: {base['name']}\n" if on_hub else "",
        base=printable(base["name"]),
        base_sha=base["sha256"][:16],
        num_train=len(job.tables["train"]),
        data=printable(job.record["settings"]["data"]["path"]),
        rows="\n".join(_row(name, found) for name, found in (before | result["measured"]).items()),
        max_new_tokens=job.config.model.max_new_tokens,
        selection="The test set was scored once, after the checkpoint was chosen on the eval set."
        if has_test
        else "The checkpoint was selected on this set, so its figures are better than on new pictures.",
        run_id=job.record["training_run_id"],
        step=result["step"],
        max_steps=job.schedule.max_steps,
        data_fingerprint=facts["fingerprint"],
        settings="\n".join(f"- `{name}`: {value}" for name, value in settings.items()),
        versions=", ".join(f"{name} {number}" for name, number in job.record["versions"].items()),
    )


def _row(name: str, found: dict[str, Any]) -> str:
    figures = [found["wer"], found["shuffled_wer"], found["loss"]]
    return f"| {name} | {found['num_pictures']:,} | {' | '.join('-' if f is None else f'{f:.4f}' for f in figures)} |"
