"""Each family that can be trained learns 16 scenes by heart, resumes after SIGKILL, and captions through the main job.

The ordinary suite has one chat model and Florence-2, with fewer scenes; `make families` has all.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import caption_config, rows_of, train_config, training_losses

from captioner import pipeline
from captioner.config import ModelConfig, TrainConfig
from captioner.errors import ModelError, UsageError
from captioner.models import load, resolve
from captioner.scoring.wer import corpus_wer
from captioner.testing import make_folder, make_tiny_model
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training import job
from captioner.training.local import LocalTrainEngine
from captioner.training.pairs import TRAINABLE

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = bool(os.environ.get("ALL_FAMILIES"))
NUM_SCENES, STEPS = (16, 400) if ALL else (6, 140)  # with 90 Florence-2 learns on some CPUs, and on others not quite
# A rate at which tiny models with random weights learn; real ones need far less (captioner.training.recipes).
RATE = 3e-3


@pytest.mark.parametrize("family", TRAINABLE if ALL else ["florence2", "qwen2_vl"])
def test_a_family_learns_its_scenes_by_heart_and_captions_them_in_the_main_job(tmp_path: Path, family: str) -> None:
    data, out = make_folder(tmp_path / "data", NUM_SCENES + 1, seed=5), tmp_path / "out"
    model = make_tiny_model(family, tmp_path / "model")
    schedule = {"learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
    steps = {"max_steps": STEPS, "eval_steps": STEPS, "logging_steps": STEPS}
    one_eval_image = {"data": {"eval_fraction": 0.01, "caption_choice": "first"}}
    batch = {"per_device_train_batch_size": NUM_SCENES}
    job.run(train_config(data, out, model, one_eval_image, **schedule, **steps, **batch), LocalTrainEngine())

    trained = {"name": str(out / "model"), "max_new_tokens": 24}
    pipeline.run(caption_config(data, tmp_path / "captions", model=trained))

    learned = set(pq.read_table(out / "pairs" / "train.parquet")["image_id"].to_pylist())
    rows = [row for row in rows_of(tmp_path / "captions") if row["image_id"] in learned]
    assert len(rows) == NUM_SCENES
    assert corpus_wer([row["caption"] for row in rows], [row["reference_captions"] for row in rows]) <= 0.1


def resumed_config(data: Path, out: Path, model: Path) -> TrainConfig:
    return train_config(data, out, model, max_new_tokens=8, learning_rate=RATE, max_steps=6, eval_steps=2)


@pytest.mark.skipif(not ALL, reason="make families runs it")
@pytest.mark.parametrize("family", TRAINABLE)
def test_a_family_resumes_after_sigkill_to_the_same_losses(tmp_path: Path, family: str) -> None:
    data, model = make_folder(tmp_path / "data", 20, seed=5), make_tiny_model(family, tmp_path / "model")
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from captioner.training import job
from captioner.training.local import LocalTrainEngine, LocalWorker
from test_training_families import resumed_config
torch.set_num_threads(1)
show_progress = LocalWorker.show_progress
def killed(worker, progress):
    show_progress(worker, progress)
    if progress["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
LocalWorker.show_progress = killed
config = resumed_config(Path({str(data)!r}), Path({str(tmp_path / "killed")!r}), Path({str(model)!r}))
job.run(config, LocalTrainEngine())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr

    for name in ("killed", "whole"):
        job.run(resumed_config(data, tmp_path / name, model), LocalTrainEngine())

    assert len(training_losses(tmp_path / "killed")) == 6
    assert training_losses(tmp_path / "killed") == pytest.approx(training_losses(tmp_path / "whole"), rel=1e-4)


def test_an_adapter_that_is_kept_captions_like_the_merged_model_and_loads_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
    from transformers import AutoModelForImageTextToText

    data, model = make_folder(tmp_path / "data", 10, seed=5), make_tiny_model("qwen2_vl", tmp_path / "model")
    base = resolve(ModelConfig(name=str(model))).sha256
    pixels = np.random.default_rng(0).integers(0, 256, (2, TINY_SIDE, TINY_SIDE, 3), dtype=np.uint8)
    captions = []
    for name in ("merged", "kept"):
        lora = {"lora_rank": 4, "lora_targets": ["q_proj", "v_proj"], "keep_adapter": name == "kept"}
        config = train_config(data, tmp_path / name, model, {"model": lora}, 8, learning_rate=1e-2, max_steps=3)
        job.run(config, LocalTrainEngine())
        ref = resolve(ModelConfig(name=str(tmp_path / name / "model"), max_new_tokens=8))
        captions.append(load(ref, device="cpu").caption(pixels).texts)

    kept = tmp_path / "kept" / "model"
    assert captions[0] == captions[1]
    assert not (kept / "model.safetensors").exists()
    assert ref.adapter == str(kept)
    assert ref.sha256 != base
    adapted = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model), kept)
    layers = {name.rpartition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "v_proj"}
    assert not [name for name in layers if "visual" in name]
    assert "library_name: peft" in (kept / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep_adapter": True}, UsageError, "--keep-adapter: there are no adapters; add --lora-rank"),
        ({"quantize": "int4"}, UsageError, "--quantize: weights of fewer bits cannot be trained; add --lora-rank"),
        ({"lora_targets": ["q_proj"]}, UsageError, "--lora-targets: there are no adapters; add --lora-rank"),
        (
            {"lora_rank": 2, "lora_targets": ["nothing"]},
            ModelError,
            "no linear layer is named nothing; there are .*key",
        ),
        ({"prompt": "the {title} of"}, UsageError, "--prompt .*: pairs have no columns"),
    ],
)
def test_wrong_settings_of_adapters_and_prompts_are_errors(tmp_path: Path, settings, error, message) -> None:
    data = make_folder(tmp_path / "data", 6)
    model = {"name": str(make_tiny_model("git", tmp_path / "model"))} | settings

    with pytest.raises(error, match=message):
        job.run(train_config(data, tmp_path / "out", groups={"model": model}), LocalTrainEngine())
