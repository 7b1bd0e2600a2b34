"""Training with sharded weights: two processes give the losses of one, with half of the memory each."""

import json
import multiprocessing
import os
import pickle
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_config, training_losses

from captioner.config import TrainConfig, TrainingConfig
from captioner.errors import TrainingError, UsageError
from captioner.testing import make_folder, make_tiny_model
from captioner.training import job
from captioner.training.local import LocalTrainEngine, LocalWorker
from captioner.training.pairs import TRAINABLE
from captioner.training.schedule import with_batch_of

Settings = dict[str, Any]
pytestmark = pytest.mark.usefixtures("one_thread")
ALL = bool(os.environ.get("ALL_FAMILIES"))
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["captioner.training.loop"])


class GroupWorker(LocalWorker):
    """One of two processes that train together. `kill_at`: the step at which this one ends by SIGKILL."""

    world_size = 2

    def __init__(self, rank: int, kill_at: int | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rank, self._kill_at = rank, kill_at

    def prepare(self, trainer: Any) -> Any:
        self._trainer = trainer
        return trainer

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is not None:
            super().report(metrics, checkpoint)

    def show_progress(self, progress: dict[str, Any]) -> None:
        if progress["step"] == self._kill_at:
            self.write_memory()
            os.kill(os.getpid(), signal.SIGKILL)

    def write_memory(self) -> None:
        """Write how many numbers this process holds of the weights, and of the states of the optimizer."""
        weights = list(self._trainer.model.network.parameters())
        counts = {
            "weights": sum(map(num_local, weights)),
            "all_weights": sum(values.numel() for values in weights),
            "all_trained": sum(values.numel() for values in weights if values.requires_grad),
            "states": sum(num_local(v) for state in self._trainer.optimizer.state.values() for v in state.values()),
        }
        (self.folder.parent / "memory.json").write_text(json.dumps(counts))


def num_local(values: Any) -> int:
    return int((values.to_local() if hasattr(values, "to_local") else values).numel())


def train_in_group(
    rank: int, store: Path, kill_at: int | None, config: TrainConfig, model: Any, *arguments: Any
) -> None:
    from captioner.training.loop import train_worker

    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "not used, but asked for by accelerate"}
    os.environ.update(
        {name: str(value) for name, value in group.items()}, ACCELERATE_TORCH_DEVICE="cpu", OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    worker = GroupWorker(rank, kill_at, *arguments)
    ended = train_worker(config, model, worker, worker.latest_checkpoint())
    if rank == 0:
        worker.folder.parent.mkdir(exist_ok=True)  # of the checkpoints, of which there may be none
        (worker.folder.parent / "ended").write_bytes(pickle.dumps(ended))
    torch.distributed.destroy_process_group()


class GroupEngine(LocalTrainEngine):
    """Trains with two processes."""

    def __init__(self, kill_at: int | None = None) -> None:
        super().__init__("cpu")
        self._kill_at = kill_at

    def num_workers(self) -> int:
        return 2

    def train_with(self, worker: LocalWorker, setup: job.TrainSetup) -> dict[str, Any]:
        store = Path(tempfile.mkdtemp()) / "store"  # no port: another process may take it before it is used
        arguments = (store, self._kill_at, setup.config, setup.model, worker.folder, worker.task(), "cpu")
        workers = [PROCESSES.Process(target=train_in_group, args=(rank, *arguments)) for rank in (0, 1)]
        for process in workers:
            process.start()
        workers[0].join()
        if workers[0].exitcode:
            workers[1].kill()
            raise RuntimeError(f"a worker ended with {workers[0].exitcode}")
        workers[1].join()
        return pickle.loads((worker.folder.parent / "ended").read_bytes())


def settings(data: Path, out: Path, model: Path, batch_size: int, lora: Settings, **training: Any) -> TrainConfig:
    groups = {"model": {"device": "cpu"} | lora, "data": {"caption_choice": "first"}}
    steps = {"max_steps": 6, "eval_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": batch_size}
    return train_config(data, out, model, groups, 8, **steps | training)


CASES = [(family, lora, size) for family in TRAINABLE for lora in ({}, {"lora_rank": 4}) for size in (2, 4)]


@pytest.mark.parametrize(("family", "lora", "batch_size"), CASES if ALL else CASES[:1])
def test_two_workers_with_half_of_the_weights_give_the_losses_of_one(
    tmp_path: Path, family: str, lora: Settings, batch_size: int
) -> None:
    """A step has 8 pairs; with batches of 2 each worker accumulates the gradients of two batches."""
    if lora:
        pytest.importorskip("peft", reason="the extra `lora` is not installed")
    data, model = make_folder(tmp_path / "data", 20, seed=5), make_tiny_model(family, tmp_path / "model")
    job.run(settings(data, tmp_path / "alone", model, 8, lora), LocalTrainEngine("cpu"))
    options = {"gradient_accumulation_steps": 4 // batch_size, "fsdp": True, "gradient_checkpointing": True}
    sharded = settings(data, tmp_path / "sharded", model, batch_size, lora, **options)

    for step in (3, 5):
        with pytest.raises(RuntimeError, match="-9"):
            job.run(sharded, GroupEngine(kill_at=step))
    job.run(sharded, LocalTrainEngine("cpu"))

    losses = training_losses(tmp_path / "sharded")
    assert len(losses) == 6
    assert losses == pytest.approx(training_losses(tmp_path / "alone"), rel=1e-4)
    memory = json.loads((tmp_path / "sharded" / "checkpoints" / "memory.json").read_text())
    assert memory["weights"] / memory["all_weights"] == pytest.approx(0.5, abs=0.05)
    assert memory["states"] / (2 * memory["all_trained"]) == pytest.approx(0.5, abs=0.05)


def test_a_collapse_stops_all_workers_and_is_said(tmp_path: Path) -> None:
    """Only the first worker has captions to quote."""
    data, model = make_folder(tmp_path / "data", 20, seed=5), make_tiny_model("git", tmp_path / "model")
    rate = {"learning_rate": 10, "eval_steps": 2, "max_steps": 40, "stop_on_collapse": True, "fsdp": True}

    with pytest.raises(TrainingError, match="collapsed at step 2"):
        job.run(settings(data, tmp_path / "out", model, 4, {}, **rate), GroupEngine())


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "workers", "expected"),
    [(8, 1, 1, (8, 2)), (8, 1, 4, (4, 1)), (6, 2, 3, (4, 2)), (8, 1, 16, (1, 1))],
)
def test_another_number_of_workers_takes_the_same_pairs_in_a_step(batch_size, accumulation, workers, expected) -> None:
    """A run that two workers have started."""
    batch = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    config = with_batch_of(TrainingConfig(**batch), 2, workers)

    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == expected


def test_workers_that_cannot_share_a_step_are_refused() -> None:
    with pytest.raises(UsageError, match="--num-workers 3: a step of this run has 16 pairs, which 3 workers cannot"):
        with_batch_of(TrainingConfig(per_device_train_batch_size=8), 2, 3)
