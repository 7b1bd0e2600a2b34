"""Training in this process, with one worker and without Ray: for tests and for debugging."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from captioner.models.devices import pick_device
from captioner.training.job import PreparedRun, TrainOutcome, TrainSetup
from captioner.training.progress import TrainProgress
from captioner.training.schedule import rank
from captioner.training.worker import FinishInputs

if TYPE_CHECKING:
    from captioner.training.collate import Decode
    from captioner.training.evaluate import TableDecoder
    from captioner.training.worker import WorkerTask

_METRICS = "metrics.json"


class LocalTrainEngine:
    """The engine that trains in this process. OUT must be a local directory; every checkpoint is kept.

    `device`: a value of --device.
    """

    def __init__(self, device: str = "auto") -> None:
        self._device = device

    def start(self) -> None:
        pass

    def num_workers(self) -> int:
        return 1

    def device(self) -> str:
        return pick_device(self._device).type

    def map_tables(self, function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        return map(function, tables)

    def train(self, setup: TrainSetup, prepare: Callable[[], PreparedRun], progress: TrainProgress) -> TrainOutcome:
        run = prepare()
        run.write_report()
        progress.show_status("")
        worker = LocalWorker(Path(setup.out.path("checkpoints")) / setup.name, run.worker_task(), self._device)
        progress.watch(lambda: worker.progress[-1] if worker.progress else None)
        ended = self.train_with(worker, setup)
        checkpoints = [(folder, json.loads((folder / _METRICS).read_text())) for folder in worker.checkpoints()]
        metric = f"eval_{setup.config.training.metric_for_best_model}"
        best, metrics = min(checkpoints, key=lambda pair: rank(pair[1], metric), default=(None, {}))
        return TrainOutcome(run, best, metrics, **ended)

    def train_with(self, worker: LocalWorker, setup: TrainSetup) -> dict[str, Any]:
        """Return the result of `train_worker`."""
        from captioner.training.loop import train_worker

        return train_worker(setup.config, setup.model, worker, worker.latest_checkpoint())

    def finish(self, checkpoint: Any, inputs: FinishInputs) -> dict[str, Any]:
        from captioner.training.finish import finish

        return finish(checkpoint, inputs, pick_device(self._device))


class LocalWorker:
    """The only worker of a run. `folder`: where its checkpoints go."""

    rank, world_size = 0, 1

    def __init__(self, folder: Path, task: WorkerTask, device: str = "auto") -> None:
        self._task = task
        self.device = pick_device(device)
        self.folder = folder
        self.progress: list[dict[str, Any]] = []

    def checkpoints(self) -> list[Path]:
        """Return the directories of the complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def latest_checkpoint(self) -> Path | None:
        return max(self.checkpoints(), default=None)

    def table_decoder(self, decode: Decode) -> TableDecoder:
        return lambda tables: map(decode, tables)

    def task(self) -> WorkerTask | None:
        return self._task

    def show_status(self, text: str) -> None:
        pass

    def prepare(self, trainer: Any) -> Any:
        return trainer

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        folder, part, old = (self.folder / f"{kind}-{metrics['step']:08d}" for kind in ("step", "part", "old"))
        for left_by_a_kill in (part, old):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        shutil.copytree(checkpoint, part)
        (part / _METRICS).write_text(json.dumps(metrics))
        if folder.exists():
            folder.rename(old)
        part.rename(folder)  # complete, or not there
        shutil.rmtree(old, ignore_errors=True)

    def show_progress(self, progress: dict[str, Any]) -> None:
        self.progress.append(progress)
