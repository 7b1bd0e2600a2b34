"""Settings of a training run that exclude each other, or cannot be met: refused before anything is read."""

from __future__ import annotations

import os

from captioner.config import (
    TrainConfig,
    TrainDataConfig,
    TrainingConfig,
    TrainModelConfig,
    TrainOutputConfig,
    refuse_unused,
)
from captioner.errors import UsageError
from captioner.files import is_uri, local_path, shown
from captioner.models.questions import columns_in
from captioner.training.schedule import make_schedule

# (group, setting, the setting that it replaces)
REPLACED = [
    ("data", "eval_data", "eval_fraction"),
    ("data", "test_data", "test_fraction"),
    ("training", "max_steps", "num_train_epochs"),
]


def replaced_settings(config: TrainConfig) -> list[tuple[str, str, str]]:
    """Return those of REPLACED in which the first setting is given, so that the second has no effect."""
    return [entry for entry in REPLACED if getattr(getattr(config, entry[0]), entry[1])]


def check_settings(config: TrainConfig) -> None:
    """Raise UsageError, which names the flag, where the settings cannot be those of a run."""
    if not config.output.path:
        raise UsageError("no OUT given; name the directory for the model and its report")
    if not config.data.path:
        raise UsageError("no DATA given; name a folder with metadata.jsonl, tars, Parquet, a dataset or captions table")
    for group, field, replaced in replaced_settings(config):
        refuse_unused(getattr(config, group), [replaced], f"has no effect with --{field.replace('_', '-')}")
    if (gpus := config.cluster.gpus_per_worker or 0.0) > 1:
        raise UsageError(f"--gpus-per-worker {gpus:g}: a training worker uses one GPU; give 1 and more --num-workers")
    _check_data(config.data)
    _check_training(config.training)
    _check_model(config.model, config.training)
    _check_output(config.output)


def _check_data(data: TrainDataConfig) -> None:
    if not data.eval_data and not data.eval_fraction:
        raise UsageError("--eval-fraction 0: the eval set is empty; raise it, or give --eval-data")


def _check_training(training: TrainingConfig) -> None:
    if training.bf16 and training.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other; give one of them")
    if training.fsdp and training.fp16:
        raise UsageError("--fsdp: sharded weights cannot be trained in float16; give --bf16 in place of --fp16")
    if training.max_steps and training.eval_steps:
        make_schedule(training, 1, 1)  # with both given, whether --save-steps fits does not depend on the pairs


def _check_model(model: TrainModelConfig, training: TrainingConfig) -> None:
    if columns := columns_in(model.prompt):
        raise UsageError(f"--prompt {model.prompt!r}: pairs have no columns to fill {{{columns[0]}}} from")
    if model.lora_rank is not None:
        from captioner.training.lora import check_installed

        check_installed()
    if model.quantize and training.fsdp:
        raise UsageError("--quantize: weights of fewer bits cannot be sharded; leave --fsdp or --quantize out")
    if model.quantize and model.lora_rank is None:
        raise UsageError("--quantize: weights of fewer bits cannot be trained; add --lora-rank, such as --lora-rank 16")
    for flag, value in (("--lora-targets", model.lora_targets), ("--keep-adapter", model.keep_adapter)):
        if value and model.lora_rank is None:
            raise UsageError(f"{flag}: there are no adapters; add --lora-rank, such as --lora-rank 16")


def _check_output(output: TrainOutputConfig) -> None:
    image, repository = output.caption_image, output.hub_model_id
    if image and is_uri(image):
        raise UsageError(f"--caption-image {shown(image)}: is not on a local disk; give a file that is")
    if image and not os.path.isfile(local_path(image)):
        raise UsageError(f"--caption-image {image}: no such file")
    if output.push_to_hub and not repository:
        raise UsageError("--push-to-hub: name the repository with --hub-model-id OWNER/NAME")
    if repository and not output.push_to_hub:
        raise UsageError(f"--hub-model-id {repository}: nothing is uploaded; add --push-to-hub")
    if repository:
        from captioner.training.hub import check_repository

        check_repository(repository)
