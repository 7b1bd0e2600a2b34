"""Options of a training run: adapters, number formats, less memory, TensorBoard, the hub, an interruption."""

import json
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import train_config, training_losses

from captioner.config import ModelConfig, TrainModelConfig
from captioner.errors import InterruptedRunError, TerminatedRunError, UsageError
from captioner.models import load, resolve
from captioner.testing import make_folder
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training import job
from captioner.training.evaluate import WINDOW, Evaluator, make_collate
from captioner.training.local import LocalTrainEngine, LocalWorker
from captioner.training.loss import CaptionLoss
from captioner.training.trainable import open_trainable

pytestmark = pytest.mark.usefixtures("one_thread")

settings = partial(train_config, max_new_tokens=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def plain_out(tmp_path_factory: pytest.TempPathFactory, data: Path, tiny: Path) -> Path:
    """Return the OUT of a run without options."""
    out = tmp_path_factory.mktemp("plain") / "out"
    job.run(settings(data, out, tiny), LocalTrainEngine())
    return out


@pytest.fixture(scope="module")
def plain(plain_out: Path) -> list[float]:
    return training_losses(plain_out)


def test_a_run_with_adapters_ends_with_a_plain_model_that_captions(tmp_path: Path, data: Path, tiny: Path) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    out = tmp_path / "out"
    job.run(
        settings(data, out, tiny, {"model": {"lora_rank": 4}}, learning_rate=1e-2, eval_steps=2), LocalTrainEngine()
    )

    trained, base = load_file(out / "model" / "model.safetensors"), load_file(tiny / "model.safetensors")
    assert trained.keys() == base.keys()
    changed = {name for name in base if not torch.equal(trained[name], base[name])}
    assert "git.encoder.layer.0.attention.self.query.weight" in changed
    assert not [name for name in changed if "embedding" in name or "LayerNorm" in name]
    assert type(AutoModelForImageTextToText.from_pretrained(out / "model")).__name__ == "GitForCausalLM"
    pixels = np.random.default_rng(0).integers(0, 256, (2, TINY_SIDE, TINY_SIDE, 3), dtype=np.uint8)
    assert len(load(resolve(ModelConfig(name=str(out / "model"), max_new_tokens=8))).caption(pixels).texts) == 2
    assert training_losses(out)[-1] < training_losses(out)[0]
    kept = {file.name for file in (out / "checkpoints").glob("*/step-*/*")}
    assert "adapters" in kept
    assert "model.safetensors" not in kept


def test_bfloat16_gives_nearly_the_same_curve_and_float32_weights(
    tmp_path: Path, data: Path, tiny: Path, plain: list[float]
) -> None:
    from safetensors.torch import load_file

    job.run(settings(data, tmp_path / "out", tiny, bf16=True), LocalTrainEngine())

    assert training_losses(tmp_path / "out") == pytest.approx(plain, rel=0.05)
    assert training_losses(tmp_path / "out") != plain
    weights = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_curve(
    tmp_path: Path, data: Path, tiny: Path, plain: list[float]
) -> None:
    job.run(settings(data, tmp_path / "out", tiny, gradient_checkpointing=True), LocalTrainEngine())

    assert training_losses(tmp_path / "out") == pytest.approx(plain, rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_without_a_gpu_is_refused_before_anything_is_written(tmp_path: Path, data: Path, tiny: Path) -> None:
    with pytest.raises(UsageError, match="--fp16: there is no GPU"):
        job.run(settings(data, tmp_path / "out", tiny, fp16=True), LocalTrainEngine())

    assert not (tmp_path / "out").exists()


def test_events_for_tensorboard_are_in_out(tmp_path: Path, data: Path, tiny: Path) -> None:
    out = tmp_path / "out"
    job.run(settings(data, out, tiny, report_to="tensorboard", eval_steps=2), LocalTrainEngine())

    history = json.loads((out / "history.json").read_text())["history"]
    points = [point for file in sorted((out / "tensorboard").iterdir()) for point in scalars(file)]
    for tag, name in (("train/loss", "loss"), ("eval/wer", "eval_wer"), ("eval/loss", "eval_loss")):
        expected = [(entry["step"], pytest.approx(entry[name])) for entry in history if name in entry]
        assert [(step, value) for name_of_point, step, value in points if name_of_point == tag] == expected
        assert len(expected) >= 3
    assert all("tfevents" in file.name for file in (out / "tensorboard").iterdir())


def scalars(file: Path) -> list[tuple[str, int, float]]:
    """Return (tag, step, value) of an event file: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    points, data = [], file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return points


def test_captions_longer_than_the_model_allows_after_the_prompt_are_cut_and_counted(
    tmp_path: Path, data: Path, tiny: Path
) -> None:
    """The tiny model has 64 text positions: 4 for start token and prompt, 60 for a caption."""
    repeats = [100, 31, 30, 30, 30, 30]  # of two tokens
    folder, out = make_folder(tmp_path / "long", len(repeats), seed=5), tmp_path / "out"
    lines = [{"file_name": f"{number:06d}.png", "text": "a ring " * count} for number, count in enumerate(repeats)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    job.run(settings(folder, out, tiny, {"model": {"prompt": "a small red"}}, max_steps=1), LocalTrainEngine())

    assert len(training_losses(out)) == 1
    assert json.loads((out / "pairs" / "pairs.json").read_text())["truncated_captions"] == 2


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("stop", "error", "code"), [(signal.SIGINT, InterruptedRunError, 130), (signal.SIGTERM, TerminatedRunError, 143)]
)
def test_a_stopped_run_says_how_to_resume_it_and_resumes(
    tmp_path: Path, data: Path, tiny: Path, plain: list[float], monkeypatch: pytest.MonkeyPatch, stop, error, code
) -> None:
    show_progress, out = LocalWorker.show_progress, tmp_path / "out"

    def stop_at_step_3(worker: LocalWorker, progress: dict) -> None:
        show_progress(worker, progress)
        if progress["step"] == 3:
            signal.raise_signal(stop)

    config = settings(data, out, tiny, eval_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(LocalWorker, "show_progress", stop_at_step_3)
        with pytest.raises(error, match=rf"checkpoints are saved in {out}; run the same command to continue") as raised:
            job.run(config, LocalTrainEngine())
    assert raised.value.exit_code == code
    assert [folder.name for folder in (out / "checkpoints").glob("*/step-*")] == ["step-00000002"]

    job.run(config, LocalTrainEngine())

    assert training_losses(out) == pytest.approx(plain, rel=1e-5)


def test_without_a_test_set_the_card_says_what_its_figures_mean(plain_out: Path) -> None:
    card = (plain_out / "model" / "README.md").read_text()

    assert "| eval | 6 |" in card
    assert "selected on this set" in card


def test_a_finished_run_is_uploaded_by_the_same_command(
    data: Path, tiny: Path, plain_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded: list[str] = []

    class Hub:
        """Stands in for the hub's client."""

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            assert private
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            uploaded.extend(file.name for file in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    to_hub = {"push_to_hub": True, "hub_model_id": "someone/model"}
    job.run(settings(data, plain_out, tiny, {"output": to_hub}), LocalTrainEngine())

    assert {"README.md", "model.safetensors", "training_images.parquet", "training_run.json"} < set(uploaded)
    assert "uploaded to https://hub.example/someone/model" in capsys.readouterr().err


def test_evaluation_keeps_one_window_of_images_in_memory(tiny: Path) -> None:
    captioner = open_trainable(
        resolve(ModelConfig(name=str(tiny), max_new_tokens=2)), TrainModelConfig(), torch.device("cpu"), 64, None
    )
    allocated: list[int] = []

    def decode(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            allocated.append(pa.total_allocated_bytes())
            size = TINY_SIDE * TINY_SIDE * 3
            yield table.append_column("_pixels", pa.array([bytes(size)] * len(table), pa.binary(size)))

    evaluate = Evaluator(captioner, CaptionLoss(captioner), make_collate(captioner), decode, 64)
    count = 8 * WINDOW
    pairs = pa.table({"image_id": [str(n) for n in range(count)], "reference_captions": [["a ring"]] * count})

    assert evaluate(pairs)["num_pictures"] == count
    window = WINDOW * TINY_SIDE * TINY_SIDE * 3
    assert len(allocated) == 8
    assert max(allocated) - allocated[0] < 2.5 * window
