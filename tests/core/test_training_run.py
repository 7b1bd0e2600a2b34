"""A training run in one process: the finished model, evaluation, faults, report."""

import gc
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import caption_config, rows_of, train_config, training_losses

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.errors import FingerprintError, ModelError, OutputError, SourceError, TrainingError, UsageError
from captioner.models import load, resolve
from captioner.scoring.wer import corpus_wer
from captioner.testing import make_folder, make_tiny_model
from captioner.testing.tiny_models import TINY_SIDE
from captioner.training import job
from captioner.training.local import LocalTrainEngine, LocalWorker
from captioner.training.worker import FinishInputs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"), 60, seed=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Return the OUT of a run of a few steps on captions that are new to the starter, with a test set."""
    out = tmp_path_factory.mktemp("trained") / "out"
    groups = {"data": {"test_fraction": 0.1}}
    job.run(train_config(data, out, groups=groups, learning_rate=1e-3, max_steps=6, eval_steps=3), LocalTrainEngine())
    return out


def test_the_trained_model_captions_and_is_recorded_in_the_table(tmp_path: Path, trained: Path, data: Path) -> None:
    model = {"name": str(trained / "model")}
    pipeline.run(caption_config(data, tmp_path / "captions", source={"limit": 5}, model=model))

    rows = rows_of(tmp_path / "captions")

    record = json.loads((trained / "model" / "training_run.json").read_text())
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert {row["training_run_id"] for row in rows} == {record["training_run_id"]}
    assert {row["model_sha256"] for row in rows} == {record["sha256"]}


def test_the_trained_model_loads_with_transformers_alone(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        assert type(kind.from_pretrained(trained / "model")).__name__ == "GitForCausalLM"
    assert type(AutoProcessor.from_pretrained(trained / "model")).__name__ == "GitProcessor"
    assert GenerationConfig.from_pretrained(trained / "model").max_new_tokens == 24


def test_training_lowers_the_loss(trained: Path) -> None:
    assert training_losses(trained)[-1] < 0.7 * training_losses(trained)[0]


def test_the_measured_wer_is_that_of_the_saved_model(trained: Path) -> None:
    """Evaluation in training uses the weights of its step."""
    record = json.loads((trained / "model" / "training_run.json").read_text())
    rows = pq.read_table(trained / "pairs" / "test.parquet").to_pylist()
    ref = resolve(ModelConfig(name=str(trained / "model"), max_new_tokens=24))

    from captioner.imaging import decode

    folder = Path(record["data"])
    pixels = np.stack([decode((folder / row["image_id"]).read_bytes(), ref.spec, 10**6).pixels for row in rows])
    captions = load(ref).caption(pixels).texts

    assert record["measured"]["test"]["num_pictures"] == len(rows) == 6
    assert record["measured"]["test"]["wer"] == corpus_wer(captions, [row["reference_captions"] for row in rows])


def test_the_model_lists_its_training_images(trained: Path) -> None:
    seen = pq.read_table(trained / "model" / "training_images.parquet").to_pylist()
    sides = {name: pq.read_table(trained / "pairs" / f"{name}.parquet") for name in ("train", "eval", "test")}

    assert {row["sha256"] for row in seen if row["split"] == "train"} == set(sides["train"]["sha256"].to_pylist())
    assert not {row["sha256"] for row in seen} & set(sides["test"]["sha256"].to_pylist())


def test_the_card_has_the_figures_of_each_set(trained: Path) -> None:
    card = (trained / "model" / "README.md").read_text()
    measured = json.loads((trained / "model" / "training_run.json").read_text())["measured"]

    assert "Fine-tuned from `starter`" in card
    assert f"| test | 6 | {measured['test']['wer']:.4f} | {measured['test']['shuffled_wer']:.4f} |" in card
    assert "scored once, after the checkpoint was chosen" in card


def test_the_report_shows_pairs_and_captions_and_loads_nothing(trained: Path) -> None:
    html = (trained / "report.html").read_text()

    assert html.count("data:image/jpeg;base64,") == 24
    assert len(re.findall("<dt>after</dt>", html)) == 12
    assert "<polyline" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)


def test_the_same_command_again_does_nothing(trained: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    groups = {"data": {"test_fraction": 0.1}}
    job.run(
        train_config(data, trained, groups=groups, learning_rate=1e-3, max_steps=6, eval_steps=3), LocalTrainEngine()
    )

    assert "nothing to train" in capsys.readouterr().err


def test_a_changed_setting_is_refused_by_name(trained: Path, data: Path) -> None:
    with pytest.raises(FingerprintError, match=r"started with training\.learning_rate = 0\.001, now it is 0\.5"):
        job.run(
            train_config(data, trained, groups={"data": {"test_fraction": 0.1}}, learning_rate=0.5, max_steps=6),
            LocalTrainEngine(),
        )


def test_a_run_that_never_trained_takes_other_settings(tmp_path: Path, data: Path, tiny: Path) -> None:
    """Its pairs stay where they are the same with the other settings."""
    out, options = tmp_path / "out", {"max_steps": 1, "max_new_tokens": 4}

    def start(groups: dict, **others) -> None:
        job.run(train_config(data, out, tiny, groups, **(options | others)), LocalTrainEngine())

    refused = {"max_steps": None, "num_train_epochs": 9, "save_steps": 7}
    for fraction, num_eval in ((0.5, 30), (0.2, 12)):
        with pytest.raises(UsageError, match="--save-steps 7: must be a multiple of --eval-steps"):
            start({"data": {"eval_fraction": fraction}}, **refused)
        assert pq.read_metadata(out / "pairs" / "eval.parquet").num_rows == num_eval
    pairs = (out / "pairs" / "pairs.json").stat().st_mtime_ns
    start({}, learning_rate=1e-3)

    assert (out / "pairs" / "pairs.json").stat().st_mtime_ns == pairs
    assert json.loads((out / "train.json").read_text())["settings"]["training"]["learning_rate"] == 1e-3
    with pytest.raises(FingerprintError, match=r"training\.learning_rate = 0\.001, now it is 0\.5"):
        start({}, learning_rate=0.5)


HOLDER = """
import sys
from pathlib import Path
from captioner.config import TrainConfig
from captioner.training import job
from captioner.training.local import LocalTrainEngine

class Waiting(LocalTrainEngine):
    def map_tables(self, function, tables):  # once the record is written, before anything is trained
        print("holds OUT", flush=True)
        sys.stdin.read()

job.run(TrainConfig.model_validate_json(sys.argv[1]), Waiting())
"""


def test_a_second_command_is_refused_while_the_first_one_lives(tmp_path: Path, data: Path, tiny: Path) -> None:
    out = tmp_path / "out"
    first, second = (
        train_config(data, out, tiny, max_steps=1, max_new_tokens=4, learning_rate=rate) for rate in (1e-3, 1e-4)
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, first.model_dump_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds OUT\n"
        record = (out / "train.json").read_text()
        with pytest.raises(OutputError, match="another run is writing to it; wait until it ends, or give another OUT"):
            job.run(second, LocalTrainEngine())
        assert (out / "train.json").read_text() == record
        holder.kill()
    job.run(second, LocalTrainEngine())

    assert json.loads((out / "train.json").read_text())["settings"]["training"]["learning_rate"] == 1e-4
    assert (out / "model" / "training_run.json").exists()


class Stopped(BaseException):
    """Stands for the end of the process."""


def test_a_killed_run_resumes_and_ends_like_an_uninterrupted_one(
    tmp_path: Path, data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 6, "eval_steps": 2, "learning_rate": 1e-3, "logging_steps": 3}
    job.run(train_config(data, tmp_path / "whole", tiny, **options), LocalTrainEngine())
    show_progress = LocalWorker.show_progress

    def die_at_step_5(worker: LocalWorker, progress: dict) -> None:
        show_progress(worker, progress)
        if progress["step"] == 5:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(LocalWorker, "show_progress", die_at_step_5)
        with pytest.raises(Stopped):
            job.run(train_config(data, tmp_path / "killed", tiny, **options), LocalTrainEngine())
    assert not (tmp_path / "killed" / "model").exists()
    job.run(train_config(data, tmp_path / "killed", tiny, **options), LocalTrainEngine())

    assert training_losses(tmp_path / "killed") == pytest.approx(training_losses(tmp_path / "whole"), rel=1e-5)
    assert len(training_losses(tmp_path / "killed")) == 4  # at steps 2, 3, 4 and 6: also at checkpoints
    weights = [_weights(tmp_path / name) for name in ("whole", "killed")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-5)


def without_dropout(model: Path) -> Path:
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(re.sub(r'"(\w+_(?:pdrop|dropout))": 0\.1', r'"\1": 0.0', config))
    return model


def _weights(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("family", ["git", "blip", "vision-encoder-decoder"])
def test_every_family_trains(tmp_path: Path, data: Path, family: str) -> None:
    model, out = without_dropout(make_tiny_model(family, tmp_path / "model")), tmp_path / "out"
    job.run(train_config(data, out, model, learning_rate=1e-2, max_steps=3), LocalTrainEngine())

    assert training_losses(out)[-1] < training_losses(out)[0]
    assert_loads(out / "model", family)


def test_gradients_that_are_accumulated_are_those_of_the_whole_batch(tmp_path: Path, data: Path) -> None:
    model = without_dropout(make_tiny_model("git", tmp_path / "model"))
    for out, accumulation in (("whole", 1), ("parts", 2)):
        cut = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        job.run(train_config(data, tmp_path / out, model, learning_rate=1e-2, max_steps=3, **cut), LocalTrainEngine())

    assert training_losses(tmp_path / "parts") == pytest.approx(training_losses(tmp_path / "whole"), rel=1e-3)


def assert_loads(model: Path, family: str) -> None:
    """Assert that transformers and `load` open the model. AutoProcessor has none for VisionEncoderDecoder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert AutoModelForImageTextToText.from_pretrained(model).config.model_type == family
    if family != "vision-encoder-decoder":
        assert AutoProcessor.from_pretrained(model).image_processor is not None
    pixels = np.zeros((2, TINY_SIDE, TINY_SIDE, 3), np.uint8)
    assert len(load(resolve(ModelConfig(name=str(model), max_new_tokens=4))).caption(pixels).texts) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captioner.training.loss import CaptionLoss

    forward, calls = CaptionLoss.forward, []

    def broken(self, *batch, **named):
        calls.extend([1] if self.training else [])
        return forward(self, *batch, **named) * (float("nan") if len(calls) == 3 and self.training else 1.0)

    monkeypatch.setattr(CaptionLoss, "forward", broken)
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"the loss of step 3 is nan.*checkpoint stays"):
        job.run(train_config(data, out, tiny, max_steps=4, eval_steps=1), LocalTrainEngine())

    assert [folder.name for folder in sorted((out / "checkpoints").glob("*/step-*"))] == [
        "step-00000001",
        "step-00000002",
    ]
    assert not (out / "model").exists()


def test_no_thread_of_a_training_that_failed_is_left_to_the_garbage_collector(
    tmp_path: Path, data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for the thread at any later time, also while `threading` holds a lock that the thread needs."""
    from captioner.training.loss import CaptionLoss

    forward, before = CaptionLoss.forward, set(threading.enumerate())

    def broken(self, *batch, **named):
        if self.training:
            raise ZeroDivisionError("a defect")
        return forward(self, *batch, **named)

    monkeypatch.setattr(CaptionLoss, "forward", broken)
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError) as error:
            job.run(train_config(data, tmp_path / "out", tiny, max_steps=4, eval_steps=4), LocalTrainEngine())
        assert error.tb is not None  # with its frames, and their iterator of batches
        left = [thread.name for thread in set(threading.enumerate()) - before if "ThreadPool" in thread.name]
    finally:
        gc.enable()

    assert left == []


def test_a_loss_that_is_not_finite_is_noticed_between_evaluations(
    tmp_path: Path, data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are read a step late, so that a GPU need not wait; the message names the step of the loss."""
    from captioner.training.loss import CaptionLoss

    forward, calls = CaptionLoss.forward, []

    def broken(self, *batch, **named):
        calls.extend([1] if self.training else [])
        return forward(self, *batch, **named) * (float("nan") if len(calls) == 3 and self.training else 1.0)

    monkeypatch.setattr(CaptionLoss, "forward", broken)
    with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
        job.run(
            train_config(data, tmp_path / "out", tiny, max_steps=20, eval_steps=10, logging_steps=10),
            LocalTrainEngine(),
        )

    assert len(calls) == 4
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("step", "message"), [(2, r"the last good checkpoint stays.*lower --learning-rate"), (0, "give another --model")]
)
def test_an_evaluation_whose_loss_is_not_finite_stops_the_run_without_a_checkpoint_of_its_step(
    tmp_path: Path, data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, step: int, message: str
) -> None:
    from captioner.training.evaluate import Evaluator

    evaluate, evaluations = Evaluator.__call__, []

    def broken(self, *args):
        evaluations.append(evaluate(self, *args))
        return evaluations[-1] | ({"loss": float("nan")} if len(evaluations) == step + 1 else {})

    monkeypatch.setattr(Evaluator, "__call__", broken)
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=rf"the loss of the evaluation at step {step} is nan; .*{message}"):
        job.run(train_config(data, out, tiny, max_steps=3, eval_steps=1), LocalTrainEngine())

    assert len(list((out / "checkpoints").glob("*/step-*"))) == max(0, step - 1)
    assert not (out / "model").exists()


def test_captions_without_words_give_no_wer_and_the_run_ends_well(tmp_path: Path, tiny: Path) -> None:
    folder, out = make_folder(tmp_path / "data", 6, seed=5), tmp_path / "out"
    lines = [{"file_name": f"{number:06d}.png", "text": "!" * (number + 1)} for number in range(6)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    job.run(train_config(folder, out, tiny, max_new_tokens=4, max_steps=2, eval_steps=1), LocalTrainEngine())

    metrics = [json.loads(file.read_text()) for file in (out / "checkpoints").glob("*/step-*/metrics.json")]
    assert [math.isnan(entry["eval_wer"]) for entry in metrics] == [True, True]
    assert json.loads((out / "train.json").read_text())["measured"]["eval"]["wer"] is None


def test_early_stopping_keeps_the_best(tmp_path: Path, data: Path) -> None:
    """The starter was trained on these captions, so no evaluation is better than the first."""
    out = tmp_path / "out"
    job.run(
        train_config(data, out, max_steps=9, eval_steps=1, early_stopping_patience=2, learning_rate=1e-2),
        LocalTrainEngine(),
    )

    assert len(training_losses(out)) == 2


def test_a_run_that_ended_after_it_had_stopped_early_trains_no_further(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, histories = tmp_path / "out", []
    options = {"max_steps": 9, "eval_steps": 2, "early_stopping_patience": 1, "learning_rate": 1e-2}

    def die(engine: LocalTrainEngine, checkpoint: Path, inputs: FinishInputs) -> None:
        histories.append(inputs.history)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(LocalTrainEngine, "finish", die)
        with pytest.raises(Stopped):
            job.run(train_config(data, out, **options), LocalTrainEngine())
    capsys.readouterr()
    job.run(train_config(data, out, **options), LocalTrainEngine())

    history = json.loads((out / "history.json").read_text())["history"]
    assert history[:-1] == histories[0][:-1]  # the last entry has the seconds of each start
    assert len(training_losses(out)) == 2
    assert "stopped at step 2: no better evaluation since step 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"model": {"name": "fake"}}, ModelError, "cannot be trained"),
        ({"data": {"path": ""}}, UsageError, "no DATA"),
        ({"output": {"path": ""}}, UsageError, "no OUT"),
        ({"data": {"path": "/no/such/folder"}}, SourceError, "no such file"),
        ({"data": {"eval_fraction": 0}}, UsageError, "the eval set is empty"),
        ({"training": {"bf16": True, "fp16": True}}, UsageError, "exclude each other"),
        ({"output": {"push_to_hub": True}}, UsageError, "--hub-model-id"),
        ({"output": {"hub_model_id": "me/git"}}, UsageError, "--hub-model-id me/git: nothing is uploaded"),
        (
            {"output": {"push_to_hub": True, "hub_model_id": "me/a b"}},
            UsageError,
            "--hub-model-id me/a b: Repo id must",
        ),
        ({"output": {"push_to_hub": True, "hub_model_id": "git"}}, UsageError, "--hub-model-id git: has no owner"),
        ({"data": {"eval_data": "x"}}, UsageError, r"--eval-fraction 0\.2: has no effect with --eval-data"),
        ({"data": {"eval_fraction": 0.1, "test_data": "x", "test_fraction": 0.3}}, UsageError, "with --test-data"),
        ({"training": {"max_steps": 4, "num_train_epochs": 7}}, UsageError, "--num-train-epochs 7.*with --max-steps"),
        (
            {"training": {"max_steps": 10, "save_steps": 3, "eval_steps": 2}},
            UsageError,
            "--save-steps 3: must be a mult",
        ),
        ({"cluster": {"gpus_per_worker": 2}}, UsageError, "--gpus-per-worker 2: a training worker uses one GPU"),
        ({"output": {"caption_image": "s3://b/a.png"}}, UsageError, "--caption-image s3://b/a.png: is not on a local"),
        ({"output": {"caption_image": "/no/such.png"}}, UsageError, "--caption-image /no/such.png: no such file"),
        ({"model": {"name": "/no/such/model"}}, ModelError, "no such directory"),
    ],
)
def test_wrong_settings_are_errors_before_anything_starts(tmp_path: Path, data: Path, groups, error, message) -> None:
    with pytest.raises(error, match=message):
        job.run(train_config(data, tmp_path / "out", groups=groups), LocalTrainEngine())

    assert not (tmp_path / "out").exists()


def test_an_out_without_a_training_run_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="holds no training run"):
        job.run(train_config(data, tmp_path), LocalTrainEngine())
