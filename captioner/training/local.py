"""Training in this process, with one worker and without Ray: for tests, and for looking at a run in a debugger."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from captioner.models.devices import pick_device
from captioner.training.job import Finishing, Outcome, Start, TrainRun
from captioner.training.progress import TrainProgress

if TYPE_CHECKING:
    from captioner.training.collate import Decode
    from captioner.training.evaluate import Feed
    from captioner.training.worker import Training

_METRICS = "metrics.json"


class LocalEngine:
    """The engine of one process. OUT must be a local directory; every checkpoint is kept. `device`: a --device."""

    def __init__(self, device: str = "auto") -> None:
        self._device = device

    def num_workers(self) -> int:
        return 1

    def device(self) -> str:
        return pick_device(self._device).type

    def map_tables(self, function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        return map(function, tables)

    def train(self, start: Start, prepare: Callable[[], TrainRun], progress: TrainProgress) -> Outcome:
        from captioner.training.loop import train_worker
        from captioner.training.worker import Training

        opened = prepare()
        opened.write_report()
        tables = opened.pairs.tables
        work = Training(start.config, start.model, start.archives, opened.schedule, tables["train"], tables["eval"])
        worker = LocalWorker(Path(start.out.path("checkpoints")) / start.name, work, self._device)
        progress.doing("")
        progress.watch(lambda: worker.told[-1] if worker.told else None)
        ended = train_worker(start.config, start.model, worker, worker.latest())
        kept = [(folder, json.loads((folder / _METRICS).read_text())) for folder in worker.kept()]
        metric = f"eval_{start.config.training.metric_for_best_model}"
        best, metrics = min(kept, key=lambda pair: (pair[1][metric], pair[1]["step"]), default=(None, {}))
        return Outcome(opened, best, metrics, ended["step"], ended["history"], ended["stopped"])

    def finish(self, checkpoint: Any, finishing: Finishing) -> dict[str, Any]:
        from captioner.training.finish import finish

        return finish(checkpoint, finishing, pick_device(self._device))


class LocalWorker:
    """The only worker; checkpoints go to `folder`."""

    rank, world_size = 0, 1

    def __init__(self, folder: Path, work: Training, device: str = "auto") -> None:
        self._work = work
        self.device = pick_device(device)
        self.folder = folder
        self.told: list[dict[str, Any]] = []

    def kept(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(folder for folder in self.folder.glob("step-*") if (folder / _METRICS).exists())

    def latest(self) -> Path | None:
        return max(self.kept(), default=None)

    def feed(self, decode: Decode) -> Feed:
        return lambda tables: map(decode, tables)

    def training(self) -> Training | None:
        return self._work

    def doing(self, text: str) -> None:
        pass

    def prepare(self, trainer: Any) -> Any:
        return trainer

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        assert checkpoint is not None
        folder = self.folder / f"step-{metrics['step']:08d}"
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        (folder / _METRICS).write_text(json.dumps(metrics))

    def tell(self, progress: dict[str, Any]) -> None:
        self.told.append(progress)
