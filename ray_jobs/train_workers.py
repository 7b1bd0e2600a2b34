"""What runs on the workers of a training run, and the actor through which the driver and the workers communicate."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow.fs import LocalFileSystem

from captioner.models.devices import pick_device
from captioner.training.worker import FinishInputs
from ray_jobs.gpus import training_device, worker_device

if TYPE_CHECKING:
    from captioner.training.collate import Decode
    from captioner.training.evaluate import TableDecoder
    from captioner.training.worker import WorkerTask

MIN_TASKS, MAX_TASKS = 4, 32  # of `map_tables` at once, whatever the number of CPUs


def train_loop(config: dict[str, Any], kind: type[RayWorker] | None = None) -> dict[str, Any]:
    """Run by each Ray Train worker. `kind`: the class of the worker, for tests."""
    import ray.train
    import torch

    from captioner.training.loop import train_worker

    torch.set_num_threads(config["threads"])
    settings, model = config["config"], config["model"]
    worker = (kind or RayWorker)(config["board"], settings.model.device)
    restored = ray.train.get_checkpoint()
    if restored is None:
        return train_worker(settings, model, worker)
    with as_directory(restored) as directory:
        return train_worker(settings, model, worker, directory)


class RayWorker:
    """A `captioner.training.worker.Worker` in a worker of Ray Train."""

    def __init__(self, board: Any, device: str) -> None:
        import ray.train

        context = ray.train.get_context()
        self.device = training_device(device)
        self.rank, self.world_size, self._board = context.get_world_rank(), context.get_world_size(), board

    def table_decoder(self, decode: Decode) -> TableDecoder:
        return lambda tables: map_tables(decode, tables)

    def task(self) -> WorkerTask | None:
        import ray

        reference = ray.get(self._board.task.remote())
        task: WorkerTask | None = None if reference is None else ray.get(reference[0])
        return task

    def show_status(self, text: str) -> None:
        self._board.show_status.remote(text)

    def prepare(self, trainer: Any) -> Any:
        from ray.train.huggingface.transformers import prepare_trainer

        return prepare_trainer(trainer)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        import ray.train

        uploaded = None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint)
        ray.train.report(metrics, checkpoint=uploaded, checkpoint_dir_name=f"step-{metrics['step']:08d}")

    def show_progress(self, progress: dict[str, Any]) -> None:
        self._board.show_progress.remote(progress)


def finish_model(checkpoint: Any, inputs: FinishInputs, device: str, num_threads: int) -> dict[str, Any]:
    """Make OUT/model of a checkpoint, in a task on a worker node; return its record."""
    import torch

    from captioner.training.finish import finish

    torch.set_num_threads(num_threads)
    with as_directory(checkpoint) as directory:
        return finish(directory, inputs, pick_device(worker_device(device)))


def make_board() -> Any:
    """Start the actor through which the driver and the workers communicate."""
    import asyncio

    import ray

    class Board:
        def __init__(self) -> None:
            self._latest: dict[str, Any] = {"step": 0, "samples_per_second": None, "status": "starting workers"}
            self._is_prepared = asyncio.Event()
            self._task: list[Any] | None = None

        async def set_task(self, task: list[Any] | None) -> None:
            """Hand over the WorkerTask as an object reference in a list; with None the workers end."""
            self._task = task
            self._is_prepared.set()

        async def task(self) -> list[Any] | None:
            await self._is_prepared.wait()
            return self._task

        async def show_progress(self, progress: dict[str, Any]) -> None:
            self._latest |= progress

        async def show_status(self, text: str) -> None:
            self._latest["status"] = text

        async def latest(self) -> dict[str, Any]:
            return self._latest

    return ray.remote(num_cpus=0)(Board).remote()


@contextmanager
def as_directory(checkpoint: Any) -> Iterator[Path]:
    """Yield a checkpoint of Ray as a local directory.

    Ray's own method of that name downloads into one directory for all workers of a node: the second worker overwrites
    the weights that the first one has mapped into memory, which kills the first.
    """
    if isinstance(checkpoint.filesystem, LocalFileSystem):
        yield Path(checkpoint.path)
        return
    with tempfile.TemporaryDirectory(prefix="captioner-checkpoint-") as directory:
        yield Path(checkpoint.to_directory(directory))


def map_tables(function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield `function(table)` for each table, in order, computed by Ray tasks, a bounded number of them at once.

    Works in the driver and inside a Ray Train worker; a task whose process or node dies is run again. These are plain
    tasks, not a Ray Data pipeline: a worker needs the first table at once, and Ray Data starts processes of its own
    before its first block.
    """
    import ray

    def call(shared_function: Callable[[pa.Table], pa.Table], table: pa.Table) -> pa.Table:
        return shared_function(table)

    # A worker's own placement group holds its CPUs and no others: tasks may run anywhere.
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(call)
    shared_function, max_tasks = ray.put(function), _max_tasks()
    running: deque[Any] = deque()
    try:
        for table in tables:
            running.append(task.remote(shared_function, table))
            if len(running) >= max_tasks:
                yield ray.get(running.popleft())
        while running:
            yield ray.get(running.popleft())
    finally:
        for reference in running:
            ray.cancel(reference)


def _max_tasks() -> int:
    import ray

    return min(max(MIN_TASKS, int(ray.cluster_resources().get("CPU", 1))), MAX_TASKS)
