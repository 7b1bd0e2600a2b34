"""Checkpoints are written while training continues, with the state of their step."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captioner.config import TrainConfig
from captioner.testing import make_folder, make_tiny_model
from captioner.training import job
from captioner.training.checkpoints import copies_on_host
from captioner.training.local import LocalTrainEngine, LocalWorker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("checkpoints")
    return TrainConfig.model_validate(
        {
            "data": {"path": str(make_folder(folder / "data", 24, seed=5)), "eval_fraction": 0.2},
            "model": {"name": str(make_tiny_model("git", folder / "tiny")), "max_new_tokens": 4},
            "training": {"per_device_train_batch_size": 4, "max_steps": 4, "eval_steps": 2},
        }
    )


def into(config: TrainConfig, out: Path) -> TrainConfig:
    return config.model_copy(update={"output": config.output.model_copy(update={"path": str(out)})})


def test_training_continues_while_a_checkpoint_is_written(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, tell, step_3 = LocalWorker.report, LocalWorker.show_progress, threading.Event()

    def slow_report(worker: LocalWorker, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert step_3.wait(120), "step 3 waits for the checkpoint of step 2"
        report(worker, metrics, checkpoint)

    def noting_show_progress(worker: LocalWorker, progress: dict[str, Any]) -> None:
        tell(worker, progress)
        if progress["step"] == 3:
            step_3.set()

    monkeypatch.setattr(LocalWorker, "report", slow_report)
    monkeypatch.setattr(LocalWorker, "show_progress", noting_show_progress)
    job.run(into(config, tmp_path / "out"), LocalTrainEngine())

    folders = sorted((tmp_path / "out" / "checkpoints").glob("*/step-*"))
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000004"]
    files = {"model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    assert all(files <= {file.name for file in folder.iterdir()} for folder in folders)


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(worker: LocalWorker, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(LocalWorker, "report", full)

    with pytest.raises(OSError, match="no space left"):
        job.run(into(config, tmp_path / "out"), LocalTrainEngine())


def test_copies_do_not_change_and_share_memory_like_the_originals() -> None:
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step() -> None:
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    step()
    before = layer.weight.detach().clone()
    weights, state = copies_on_host(({"a": layer.weight, "tied": layer.weight}, optimizer.state_dict()))
    step()

    assert torch.equal(weights["a"], before)
    assert not torch.equal(layer.weight, before)
    assert weights["a"] is weights["tied"]
    assert state["state"][0]["step"] == 1
    assert optimizer.state_dict()["state"][0]["step"] == 2
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("call", ["write_text", "rename"])
def test_a_checkpoint_that_a_kill_cut_off_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def killed(path: Path, *_: Any) -> None:
        path.touch()
        raise Killed

    worker = LocalWorker(tmp_path / "checkpoints", task=None, device="cpu")
    (tmp_path / "new").mkdir()
    worker.report({"step": 2}, tmp_path / "new")
    for step in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(Path, call, killed)
            with pytest.raises(Killed):
                worker.report({"step": step}, tmp_path / "new")

    assert [json.loads((folder / "metrics.json").read_text()) for folder in worker.checkpoints()] == [{"step": 2}]
    worker.report({"step": 4}, tmp_path / "new")
    assert [folder.name for folder in worker.checkpoints()] == ["step-00000002", "step-00000004"]
