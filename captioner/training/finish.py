"""From the best checkpoint to OUT/model: weights, processor files, generation config and card; and the final report."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig

from captioner.config import ModelConfig, TrainModelConfig
from captioner.files import is_uri, shown
from captioner.models import resolve
from captioner.models.base import TransformersCaptioner
from captioner.models.ref import ModelRef
from captioner.models.weights import SETTINGS_FILES, TRAINING_IMAGES
from captioner.training.checkpoints import save_network
from captioner.training.collate import Decode
from captioner.training.evaluate import SHARES, Evaluator, eval_batch_size, make_collate
from captioner.training.hub import model_card
from captioner.training.job import MODEL_FILE
from captioner.training.loss import CaptionLoss
from captioner.training.report import write_report
from captioner.training.schedule import best_of, evaluations
from captioner.training.trainable import open_trainable
from captioner.training.worker import FinishInputs

# Settings files that the trained network writes itself.
_NETWORK_FILES = ("config.json", "generation_config.json")


def finish(checkpoint: Path, inputs: FinishInputs, device: torch.device) -> dict[str, Any]:
    """Write OUT/model from a checkpoint's directory, after scoring the test set, if any, on `device`.

    Returns `measured` (figures by set), `before` (figures of the eval set before training), the checkpoint's `step` and
    the model's `sha256`. Safe to repeat.
    """
    evaluated = evaluations(inputs.history)
    best = best_of(inputs.history, f"eval_{inputs.config.training.metric_for_best_model}")
    chosen = next((entry for entry in evaluated if entry["step"] == inputs.metrics.get("step")), best)
    measured = {"eval": _without_prefix(chosen)}
    if "test" in inputs.tables:
        captioner = _open(inputs, inputs.model, device, checkpoint)
        measured["test"] = _evaluate(captioner, inputs, inputs.tables["test"])
    if "test" not in inputs.tables or inputs.model.quantize:
        # Adapters are merged with the whole weights of the base model, for which a GPU that trains beside quantised
        # ones may be too small.
        captioner = _open(inputs, replace(inputs.model, quantize=None), torch.device("cpu"), checkpoint)
    base = captioner.ref  # with its directories on this machine, which may not be the machine that resolved it
    with tempfile.TemporaryDirectory(prefix="captioner-model-") as folder:
        directory = Path(folder)
        _save(captioner, inputs.config.model, directory)
        limit = inputs.config.model.max_new_tokens
        result = {
            "measured": measured,
            "before": _without_prefix(evaluated[0]),
            "step": chosen["step"],
            "sha256": resolve(ModelConfig(name=str(directory), max_new_tokens=limit)).sha256,
        }
        (directory / "README.md").write_text(model_card(inputs, result), encoding="utf-8")
        _publish(directory, base, inputs, result)
    out, history = inputs.out, inputs.history
    out.write_json("history.json", {"history": history})
    counts = out.read_json("pairs/pairs.json")
    write_report(out, inputs.record, inputs.sources, inputs.tables, counts, history, result)
    return result


def _open(inputs: FinishInputs, model: ModelRef, device: torch.device, checkpoint: Path) -> TransformersCaptioner:
    return open_trainable(model, inputs.config.model, device, eval_batch_size(inputs.config), checkpoint)


def _evaluate(captioner: TransformersCaptioner, inputs: FinishInputs, pairs: pa.Table) -> dict[str, Any]:
    decode = Decode(inputs.sources, inputs.model.spec)
    loss, collate = CaptionLoss(captioner), make_collate(captioner)
    evaluator = Evaluator(
        captioner,
        loss,
        collate,
        lambda tables: map(decode, tables),
        captioner.batch_size,
        scores_cider=inputs.config.training.metric_for_best_model == "cider",
    )
    return evaluator(pairs)


def _without_prefix(entry: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in entry.items()}


def _save(captioner: TransformersCaptioner, config: TrainModelConfig, directory: Path) -> None:
    """Write the network (adapters merged) or its adapters, and copy tokenizer and processor of the base model."""
    from captioner.training.lora import merge_adapters, save_peft

    network, base = captioner.model, captioner.ref
    if config.keep_adapter:
        is_elsewhere = base.revision is not None or is_uri(base.name)
        save_peft(network, directory, shown(base.name) if is_elsewhere else base.path, base.revision)
    else:
        if config.lora_rank is not None:
            merge_adapters(network)
        save_network(network, directory)
        # Not by `save_pretrained`, which refuses what many checkpoints have, such as a temperature without sampling.
        _generation_settings(captioner).to_json_file(directory / "generation_config.json")
    for name in SETTINGS_FILES:
        source = Path(base.path) / name
        if source.is_file() and name not in _NETWORK_FILES:
            shutil.copyfile(source, directory / name)


def _generation_settings(captioner: TransformersCaptioner) -> GenerationConfig:
    """Return the base model's generation settings, beams and sampling included, with the length of the training."""
    kept, trained = captioner.checkpoint_settings, captioner.model.generation_config
    if trained is kept:  # the search has set those of a part of the network
        return kept
    settings = kept.to_dict() | captioner.special_token_settings()
    shortest = max(kept.min_length or 0, kept.min_new_tokens or 0)
    settings |= {"max_length": None, "max_new_tokens": max(trained.max_new_tokens, shortest)}
    return GenerationConfig.from_dict(settings)


def _publish(directory: Path, base: ModelRef, inputs: FinishInputs, result: dict[str, Any]) -> None:
    """Copy the model directory into OUT. Its record is written last, so a model with a record is complete."""
    out, record = inputs.out, inputs.record
    for file in sorted(directory.iterdir()):
        with pa.memory_map(str(file)) as stream:
            out.write_bytes(f"model/{file.name}", stream.read_buffer())
    out.write_table(f"model/{TRAINING_IMAGES}", training_images(inputs.tables, base))
    out.write_json(
        MODEL_FILE,
        {
            "training_run_id": record["training_run_id"],
            "base_model": record["base_model"],
            "data": record["settings"]["data"]["path"],
            "data_fingerprint": out.read_json("pairs/pairs.json")["fingerprint"],
            "settings": record["settings"],
            "versions": record["versions"],
            "step": result["step"],
            "sha256": result["sha256"],
            "measured": {name: _figures(evaluation) for name, evaluation in result["measured"].items()},
        },
    )


def _figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    names = ("wer", "shuffled_wer", "loss", "cider", *SHARES, "num_pictures")
    return {name: evaluation[name] for name in names if name in evaluation}


def training_images(tables: dict[str, pa.Table], base: ModelRef) -> pa.Table:
    """Return `sha256`, `image_id` and `split` ("train" or "eval") of every image the model was trained or chosen on.

    The same lists of the base model, and of an adapter that is merged into it, are included where they exist, because
    repeated training keeps what earlier training taught.
    """
    parts = []
    for name in ("train", "eval"):
        rows = tables[name].select(["sha256", "image_id"])
        parts.append(rows.append_column("split", pa.array([name] * len(rows), pa.string())))
    earlier = [Path(directory) / TRAINING_IMAGES for directory in (base.path, base.adapter) if directory]
    parts += [pq.read_table(file) for file in earlier if file.is_file()]
    return pa.concat_tables(parts, promote_options="permissive").combine_chunks()
