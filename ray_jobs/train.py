"""Fine-tune on Ray Train: `python -m ray_jobs.train DATA OUT --model M ...`.

    pairs -> examine (CPU tasks) -> Ray Train workers, each fed by CPU tasks -> best checkpoint -> OUT/model

The flow around it is that of `captioner.training.job`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow.fs import LocalFileSystem

from captioner.config import ClusterConfig, TrainConfig
from captioner.errors import CaptionerError, ClusterError
from captioner.models import ModelRef, weights_bytes
from captioner.models.devices import pick_device, set_wait_policy
from captioner.models.loading import SMALL_MODEL_BYTES
from captioner.run.prefetch import in_background
from captioner.training import job
from captioner.training.job import Finishing, Outcome, Start, TrainRun
from captioner.training.progress import TrainProgress
from captioner.training.record import RUN_FILE
from ray_jobs.cluster import Connection, Resources, Sizes, import_ray, share_out
from ray_jobs.gpus import check_gpu_nodes, device_kind, training_device, worker_device
from ray_jobs.map_tables import map_tables
from ray_jobs.shared import check_shared

if TYPE_CHECKING:
    from captioner.training.collate import Decode
    from captioner.training.evaluate import Feed
    from captioner.training.worker import Training

MAX_FAILURES = 3


def run(config: TrainConfig) -> int:
    """Train into OUT; returns the exit code. Raises CaptionerError."""
    return job.run(config, RayTrainEngine(config))


class RayTrainEngine:
    """Trains on the cluster. Connects when it is first needed. `loop`: what each worker runs."""

    def __init__(self, config: TrainConfig, loop: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self._loop = loop or train_loop
        self._cluster, self._device = ClusterConfig(**config.cluster.model_dump()), config.model.device
        self._connection = Connection(self._cluster)
        self._is_started = False
        self._checked_sizes: Sizes | None = None

    def start(self) -> None:
        """Connect, and import what drives Ray Train, while pairs are listed."""
        # How soon a checkpoint counts as kept: the default of 2 s loses one that a crash follows quickly.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        set_wait_policy()  # read by the workers' torch
        if self._is_started:
            return
        self._is_started = True
        self._connection.start()
        in_background(partial(_import_trainer, self._cluster))

    def num_workers(self) -> int:
        return self._sizes().num_workers

    def device(self) -> str:
        return device_kind(self._connection.resources(), self._sizes(), self._device)

    def map_tables(self, function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        import ray.exceptions

        self._sizes()
        try:
            yield from map_tables(function, tables)
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from error

    def train(self, start: Start, prepare: Callable[[], TrainRun], progress: TrainProgress) -> Outcome:
        import ray.train

        check_shared(start.out, RUN_FILE)
        board = _board()
        progress.watch(lambda: ray.get(board.latest.remote()))
        trainer = self._trainer(start, board)
        preparing = _Preparing(prepare, board, progress)
        try:
            with _own_sigint(), preparing:
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise preparing.error or _cause_of(error) from error
        opened, ended = preparing.result(), result.return_value
        metric = f"eval_{start.config.training.metric_for_best_model}"
        kept = result.best_checkpoints or []
        if not kept:
            return Outcome(opened, None, {}, **ended)
        checkpoint, metrics = min(kept, key=lambda pair: (_number(pair[1][metric]), pair[1]["step"]))
        return Outcome(opened, checkpoint, metrics, **ended)

    def finish(self, checkpoint: Any, finishing: Finishing) -> dict[str, Any]:
        import ray

        sizes = self._sizes()
        task = ray.remote(num_cpus=1, num_gpus=sizes.gpus_per_worker or None, max_retries=1)(_finish)
        try:
            results: dict[str, Any] = ray.get(
                task.remote(checkpoint, finishing, self._device, self._threads(finishing.model))
            )
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from error
        return results

    def _trainer(self, start: Start, board: Any) -> Any:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from ray_jobs.process_group import ProcessGroup

        logging.getLogger("ray.train").setLevel(logging.ERROR)
        sizes, settings = self._sizes(), start.config.training
        resources = {"CPU": sizes.cpus_per_worker} | ({"GPU": sizes.gpus_per_worker} if sizes.gpus_per_worker else {})
        config = {
            "config": start.config,
            "model": start.model,
            "board": board,
            "threads": self._threads(start.model),
        }
        return TorchTrainer(
            self._loop,
            train_loop_config=config,
            torch_config=ProcessGroup(self._device, self.device(), sizes.num_workers, sizes.gpus_per_worker),
            scaling_config=ScalingConfig(
                num_workers=sizes.num_workers, use_gpu=bool(sizes.gpus_per_worker), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=start.name,
                storage_path=start.out.path("checkpoints"),
                storage_filesystem=start.out.filesystem,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=settings.save_total_limit,
                    checkpoint_score_attribute=f"eval_{settings.metric_for_best_model}",
                    checkpoint_score_order="min",
                ),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )

    def _sizes(self) -> Sizes:
        """The shares of the cluster; waits for it. Raises where a node's torch cannot use the node's GPUs."""
        if self._checked_sizes is None:
            self.start()
            sizes = share_out(self._connection.resources(), self._cluster, device=self._device)
            check_gpu_nodes(self._device, sizes)
            self._checked_sizes = sizes
        return self._checked_sizes

    def _threads(self, model: ModelRef) -> int:
        return num_threads(self._sizes(), self._connection.resources(), weights_bytes(model))


def _import_trainer(cluster: ClusterConfig) -> None:
    """Import Ray Train, and torch with it: seconds, in which Ray starts."""
    import_ray(cluster)
    import ray.train.torch  # noqa: F401


def num_threads(sizes: Sizes, resources: Resources, model_bytes: int) -> int:
    """Return the number of CPU threads of torch in each worker.

    Without a GPU workers compute on all CPUs: those that decode are idle most of the time, since a step takes far
    longer than decoding its pictures. A small model is fastest on one.
    """
    if sizes.gpus_per_worker:
        return sizes.threads_per_worker
    if model_bytes <= SMALL_MODEL_BYTES:
        return 1
    return max(1, int(min(resources.num_cpus / sizes.num_workers, resources.least_cpus)))


def train_loop(config: dict[str, Any], kind: type[RayWorker] | None = None) -> dict[str, Any]:
    """What a Ray Train worker runs, as a worker of that kind."""
    import ray.train
    import torch

    from captioner.training.loop import train_worker

    torch.set_num_threads(config["threads"])
    settings, model = config["config"], config["model"]
    worker = (kind or RayWorker)(config["board"], settings.model.device)
    restored = ray.train.get_checkpoint()
    if restored is None:
        return train_worker(settings, model, worker)
    with _as_directory(restored) as folder:
        return train_worker(settings, model, worker, folder)


@contextmanager
def _as_directory(checkpoint: Any) -> Iterator[Path]:
    """Provide a checkpoint as a local directory.

    Ray's method of that name downloads into one directory for all workers of a node: the second one to come overwrites
    the weights that the first one has mapped into memory, which kills it.
    """
    if isinstance(checkpoint.filesystem, LocalFileSystem):
        yield Path(checkpoint.path)
        return
    with tempfile.TemporaryDirectory(prefix="captioner-checkpoint-") as folder:
        yield Path(checkpoint.to_directory(folder))


class RayWorker:
    """A Ray Train worker, as `captioner.training.loop` sees it."""

    def __init__(self, board: Any, device: str) -> None:
        import ray.train

        context = ray.train.get_context()
        self.device = training_device(device)
        self.rank, self.world_size, self._board = context.get_world_rank(), context.get_world_size(), board

    def feed(self, decode: Decode) -> Feed:
        return lambda tables: map_tables(decode, tables)

    def training(self) -> Training | None:
        import ray

        reference = ray.get(self._board.training.remote())
        work: Training | None = None if reference is None else ray.get(reference[0])
        return work

    def doing(self, text: str) -> None:
        self._board.doing.remote(text)

    def prepare(self, trainer: Any) -> Any:
        from ray.train.huggingface.transformers import prepare_trainer

        return prepare_trainer(trainer)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        import ray.train

        kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint)
        ray.train.report(metrics, checkpoint=kept, checkpoint_dir_name=f"step-{metrics['step']:08d}")

    def tell(self, progress: dict[str, Any]) -> None:
        self._board.tell.remote(progress)


@contextmanager
def _own_sigint() -> Iterator[None]:
    """Ray Train replaces the handler of Ctrl-C by one that stops the workers and ends the process with code 0."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _board() -> Any:
    """An actor through which the driver and the workers hand things to each other."""
    import asyncio

    import ray

    class Board:
        def __init__(self) -> None:
            self._latest: dict[str, Any] = {"step": 0, "samples_per_second": None, "doing": "starting workers"}
            self._is_prepared = asyncio.Event()
            self._training: list[Any] | None = None

        async def give(self, training: list[Any] | None) -> None:
            """Let the workers train what a reference in a list stands for; `None`: let them end."""
            self._training = training
            self._is_prepared.set()

        async def training(self) -> list[Any] | None:
            await self._is_prepared.wait()
            return self._training

        async def tell(self, progress: dict[str, Any]) -> None:
            self._latest |= progress

        async def doing(self, text: str) -> None:
            self._latest["doing"] = text

        async def latest(self) -> dict[str, Any]:
            return self._latest

    return ray.remote(num_cpus=0)(Board).remote()


class _Preparing:
    """Calls `prepare` in a thread while the workers start, and hands them what it returns.

    A context manager: at its end workers that still wait are let go.
    """

    def __init__(self, prepare: Callable[[], TrainRun], board: Any, progress: TrainProgress) -> None:
        self._prepare, self._board, self._progress = prepare, board, progress
        self._opened: TrainRun | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="preparing", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.error is not None:
            self._thread.join()

    def result(self) -> TrainRun:
        """The run that was prepared; raises what preparing raised."""
        if self.error is not None:
            raise self.error
        assert self._opened is not None
        return self._opened

    def _run(self) -> None:
        import ray

        from captioner.training.worker import Training

        try:
            opened = self._prepare()
            start, tables = opened.start, opened.pairs.tables
            work = Training(start.config, start.model, start.archives, opened.schedule, tables["train"], tables["eval"])
            ray.get(self._board.give.remote([ray.put(work)]))
            self._progress.doing("")
            opened.write_report()
            self._opened = opened
        except BaseException as error:  # raised by the thread that trains
            self.error = error
            self._board.give.remote(None)


def _finish(checkpoint: Any, finishing: Finishing, device: str, num_threads: int) -> dict[str, Any]:
    import torch

    from captioner.training.finish import finish

    torch.set_num_threads(num_threads)
    with _as_directory(checkpoint) as folder:
        return finish(folder, finishing, pick_device(worker_device(device)))


def _number(value: float | None) -> float:
    return float("inf") if value is None else value


def _cause_of(error: BaseException) -> BaseException:
    """The CaptionerError a worker raised, or a ClusterError that says what the worker said."""
    waiting: list[BaseException] = [error]
    while waiting:
        one = waiting.pop()
        if isinstance(one, CaptionerError):
            return type(one)(str(one).strip().splitlines()[-1]) if "\n" in str(one) else one
        failures = getattr(one, "worker_failures", {}) or {}
        inner = [*failures.values(), getattr(one, "cause", None), one.__cause__]
        waiting += [cause for cause in inner if isinstance(cause, BaseException)]
    last = str(error).strip().splitlines()[-1]
    return ClusterError(f"a worker failed: {last}; checkpoints stay, the same command goes on")


if __name__ == "__main__":  # the same arguments and exit code as `captioner train`
    from ray_jobs.cli import main

    main(["train", *sys.argv[1:]])
