"""From the best checkpoint to OUT/model: weights, processor files, generation config, card; and the run's report."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from captioner.config import ModelConfig
from captioner.models import resolve
from captioner.models.weights import SETTINGS_FILES
from captioner.scoring.eligible_rows import TRAINING_IMAGES
from captioner.training.card import model_card
from captioner.training.checkpoints import save_network
from captioner.training.collate import Decode
from captioner.training.evaluate import Evaluator
from captioner.training.job import MODEL_FILE, Finishing
from captioner.training.loop import make_collate
from captioner.training.loss import CaptionLoss
from captioner.training.report import write_report
from captioner.training.schedule import best_of, evaluations
from captioner.training.trainable import open_trainable

# Written by the trained network itself.
_OWN_FILES = ("config.json", "generation_config.json")


def finish(checkpoint: Path, job: Finishing, device: torch.device) -> dict[str, Any]:
    """Make OUT/model from a checkpoint's directory. Scores the test set, on `device`, where there is one.

    Returns what was `measured` on which set, and the model's `sha256`. Safe to repeat.
    """
    settings = job.config.training
    batch_size = settings.per_device_eval_batch_size or settings.per_device_train_batch_size
    captioner = open_trainable(job.model, job.config.model, device, batch_size, checkpoint)
    known = evaluations(job.history)
    best = best_of(job.history, f"eval_{job.config.training.metric_for_best_model}")
    chosen = next((one for one in known if one["step"] == job.metrics.get("step")), best)
    measured = {"eval": _without_prefix(chosen)}
    if "test" in job.tables:
        evaluator = Evaluator(
            captioner,
            CaptionLoss(captioner),
            make_collate(captioner),
            lambda tables: map(Decode(job.archives, job.model.spec), tables),
            captioner.batch_size,
        )
        measured["test"] = evaluator(job.tables["test"])
    with tempfile.TemporaryDirectory(prefix="captioner-model-") as folder:
        directory = Path(folder)
        _save(captioner.model, job, directory)
        ref = resolve(ModelConfig(name=str(directory)))
        result = {
            "measured": measured,
            "before": _without_prefix(known[0]),
            "step": chosen["step"],
            "sha256": ref.sha256,
        }
        (directory / "README.md").write_text(model_card(job, result), encoding="utf-8")
        _publish(directory, job, result)
    job.out.write_json("history.json", {"history": job.history})
    write_report(
        job.out, job.record, job.archives, job.tables, job.out.read_json("pairs/pairs.json"), job.history, result
    )
    return result


def _without_prefix(entry: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in entry.items()}


def _save(network: Any, job: Finishing, directory: Path) -> None:
    """The network (adapters merged) and what the base model's directory has beside it: tokenizer and processor."""
    if job.config.model.lora_rank is not None:
        from captioner.training.lora import merge_adapters

        merge_adapters(network)
    save_network(network, directory)
    for name in SETTINGS_FILES:
        source = Path(job.model.path) / name
        if source.is_file() and name not in _OWN_FILES:
            shutil.copyfile(source, directory / name)


def _publish(directory: Path, job: Finishing, result: dict[str, Any]) -> None:
    """Write the model directory into OUT; its record comes last, so a model with a record is whole."""
    for file in sorted(directory.iterdir()):
        with pa.memory_map(str(file)) as stream:
            job.out.write_bytes(f"model/{file.name}", stream.read_buffer())
    seen = training_images(job.tables, Path(job.model.path) / TRAINING_IMAGES)
    job.out.write_table(f"model/{TRAINING_IMAGES}", seen)
    job.out.write_json(
        MODEL_FILE,
        {
            "training_run_id": job.record["training_run_id"],
            "base_model": job.record["base_model"],
            "data": job.record["settings"]["data"]["path"],
            "data_fingerprint": job.out.read_json("pairs/pairs.json")["fingerprint"],
            "settings": job.record["settings"],
            "versions": job.record["versions"],
            "step": result["step"],
            "sha256": result["sha256"],
            "measured": {name: _figures(found) for name, found in result["measured"].items()},
        },
    )


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("wer", "shuffled_wer", "loss", "num_pictures")}


def training_images(tables: dict[str, pa.Table], of_base: Path) -> pa.Table:
    """Return `sha256`, `image_id` and `split` ("train" or "eval") of every image that shaped the model.

    Those of the base model are among them: a model that is trained again and again still shows what it was trained on
    before.
    """
    parts = []
    for name in ("train", "eval"):
        rows = tables[name].select(["sha256", "image_id"])
        parts.append(rows.append_column("split", pa.array([name] * len(rows), pa.string())))
    if of_base.is_file():
        parts.append(pq.read_table(of_base))
    return pa.concat_tables(parts).combine_chunks()
