"""`captioner demo train`: train the starter model on new images and a new wording."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from captioner.config import TrainConfig

IMAGES, SEED = 2_000, 3


def train(directory: Path) -> int:
    """Render posters into DIR/images, train on them with two workers and print the WER before and after.

    The posters are those of `captioner.starter.scenes`.
    """
    from captioner.starter.render import render_scenes
    from ray_jobs import train

    images, out = directory / "images", directory / "run"
    if not (images / "metadata.jsonl").exists():
        render_scenes(images, IMAGES, SEED, width=64, family="poster")
    config = demo_config(images, out)
    code = train.run(config)
    measured = json.loads((out / "train.json").read_text(encoding="utf-8"))
    before, after = measured["before"]["wer"], measured["measured"]["eval"]["wer"]
    print(f"WER {before:.3f} before, {after:.3f} after {config.training.max_steps} steps", flush=True)
    print(f"see {out}/report.html", file=sys.stderr)
    return code


def demo_config(images: Path, out: Path) -> TrainConfig:
    """Return settings for a run of about two minutes on two cores."""
    return TrainConfig.model_validate(
        {
            "data": {"path": str(images), "max_eval_samples": 100},
            "model": {"name": "starter"},
            "cluster": {"num_workers": 2, "gpus_per_worker": 0},
            "training": {
                "max_steps": 220,
                "per_device_train_batch_size": 16,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 10,
                "eval_steps": 110,
            },
            "output": {"path": str(out)},
        }
    )
