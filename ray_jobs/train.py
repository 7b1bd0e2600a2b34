"""Fine-tune on Ray Train: `python -m ray_jobs.train DATA OUT --model M ...`.

    pairs -> examine (Ray Data, CPU tasks) -> Ray Train workers, each fed by Ray Data -> best checkpoint -> OUT/model

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow.fs import LocalFileSystem

from captioner.config import ClusterConfig, TrainConfig
from captioner.devices import pick_device
from captioner.errors import CaptionerError, ClusterError
from captioner.models import ModelRef, weights_bytes
from captioner.models.loading import SMALL_MODEL_BYTES
from captioner.training import job
from captioner.training.job import Finishing, Outcome, TrainRun
from captioner.training.record import RUN_FILE
from ray_jobs.cluster import Resources, Sizes, connect, share_out
from ray_jobs.devices import check_gpu_nodes, device_kind, worker_device
from ray_jobs.shared import check_shared
from ray_jobs.tables import map_tables

if TYPE_CHECKING:
    import torch

    from captioner.training.batches import Decode
    from captioner.training.evaluate import Feed

MAX_FAILURES = 3
# How workers exchange gradients on each kind of device; None: Ray's choice, which is NCCL wherever it reserves a GPU.
BACKENDS = {"cpu": "gloo", "mps": "gloo", "cuda": None, "xpu": "xccl"}


def run(config: TrainConfig) -> int:
    """Train into OUT; returns the exit code. Raises CaptionerError."""
    return job.run(config, RayTrainEngine(config))


class RayTrainEngine:
    """Trains on the cluster. Connects when it is first needed. `loop`: what each worker runs."""

    def __init__(self, config: TrainConfig, loop: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self._loop = loop or train_loop
        self._cluster, self._device = ClusterConfig(**config.cluster.model_dump()), config.model.device
        self._resources: Resources | None = None

    def num_workers(self) -> int:
        return self._sizes().num_workers

    def device(self) -> str:
        sizes = self._sizes()
        assert self._resources is not None
        return device_kind(self._resources, sizes, self._device)

    def map_tables(self, function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        import ray.exceptions

        self._sizes()
        try:
            yield from map_tables(function, tables)
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from error

    def train(self, opened: TrainRun) -> Outcome:
        import ray.train

        from captioner.training.progress import TrainProgress

        check_shared(opened.out, RUN_FILE)
        board = _board()
        look = lambda: ray.get(board.latest.remote())  # noqa: E731
        schedule = opened.schedule
        trainer = self._trainer(opened, board)
        try:
            with TrainProgress(schedule.max_steps, look, schedule.global_batch_size), _own_sigint():
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause_of(error) from error
        ended = result.return_value
        metric = f"eval_{opened.config.training.metric_for_best_model}"
        kept = result.best_checkpoints or []
        if not kept:
            return Outcome(None, {}, ended["step"], ended["history"], ended["stopped"])
        checkpoint, metrics = min(kept, key=lambda pair: (_number(pair[1][metric]), pair[1]["step"]))
        return Outcome(checkpoint, metrics, ended["step"], ended["history"], ended["stopped"])

    def finish(self, checkpoint: Any, finishing: Finishing) -> dict[str, Any]:
        import ray

        sizes = self._sizes()
        task = ray.remote(num_cpus=1, num_gpus=sizes.gpus_per_worker or None, max_retries=1)(_finish)
        try:
            return ray.get(task.remote(checkpoint, finishing, self._device, self._threads(finishing.model)))
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from error

    def _trainer(self, opened: TrainRun, board: Any) -> Any:
        import ray
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from captioner.training.work import Training

        logging.getLogger("ray.train").setLevel(logging.ERROR)
        sizes, settings = self._sizes(), opened.config.training
        tables = opened.pairs.tables
        work = Training(opened.config, opened.model, opened.archives, opened.schedule, tables["train"], tables["eval"])
        resources = {"CPU": sizes.cpus_per_worker} | ({"GPU": sizes.gpus_per_worker} if sizes.gpus_per_worker else {})
        return TorchTrainer(
            self._loop,
            train_loop_config={"work": ray.put(work), "board": board, "threads": self._threads(opened.model)},
            torch_config=TorchConfig(backend=BACKENDS[self.device()]),
            scaling_config=ScalingConfig(
                num_workers=sizes.num_workers, use_gpu=bool(sizes.gpus_per_worker), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=opened.name,
                storage_path=opened.out.path("checkpoints"),
                storage_filesystem=opened.out.filesystem,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=settings.save_total_limit,
                    checkpoint_score_attribute=f"eval_{settings.metric_for_best_model}",
                    checkpoint_score_order="min",
                ),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )

    def _sizes(self) -> Sizes:
        if self._resources is None:
            # How soon a checkpoint counts as kept: the default of 2 s loses one that a crash follows quickly.
            os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
            # Threads that wait for each other must not spin: decoding shares the CPUs with training.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            self._resources = connect(self._cluster)
            check_gpu_nodes(self._device, share_out(self._resources, self._cluster, device=self._device))
        return share_out(self._resources, self._cluster, device=self._device)

    def _threads(self, model: ModelRef) -> int:
        sizes = self._sizes()
        assert self._resources is not None
        return num_threads(sizes, self._resources, weights_bytes(model))


def num_threads(sizes: Sizes, resources: Resources, model_bytes: int) -> int:
    """CPU threads of torch in each worker. Without a GPU workers compute on all CPUs: those that decode are idle most
    of the time, since a step takes far longer than decoding its pictures. A small model is fastest on one."""
    if sizes.gpus_per_worker:
        return sizes.threads_per_worker
    if model_bytes <= SMALL_MODEL_BYTES:
        return 1
    return max(1, int(min(resources.num_cpus / sizes.num_workers, resources.least_cpus)))


def train_loop(config: dict[str, Any], kind: type[RayWorker] | None = None) -> dict[str, Any]:
    """What a Ray Train worker runs, as a worker of that kind."""
    import ray
    import ray.train
    import torch

    from captioner.training.loop import train_worker

    torch.set_num_threads(config["threads"])
    work = ray.get(config["work"])
    worker = (kind or RayWorker)(config["board"], work.config.model.device)
    restored = ray.train.get_checkpoint()
    if restored is None:
        return train_worker(work, worker)
    with _as_directory(restored) as folder:
        return train_worker(work, worker, folder)


@contextmanager
def _as_directory(checkpoint: Any) -> Iterator[Path]:
    """A checkpoint as a local directory. Ray's method of that name downloads into one directory for all workers of a
    node: the second one to come overwrites the weights that the first one has mapped into memory, which kills it."""
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
        self.device = _worker_device(device)
        self.rank, self.world_size, self._board = context.get_world_rank(), context.get_world_size(), board

    def feed(self, decode: Decode) -> Feed:
        return lambda tables: map_tables(decode, tables)

    def prepare(self, trainer: Any) -> Any:
        from ray.train.huggingface.transformers import prepare_trainer

        return prepare_trainer(trainer)

    def report(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        import ray.train

        kept = None if checkpoint is None else ray.train.Checkpoint.from_directory(checkpoint)
        ray.train.report(metrics, checkpoint=kept, checkpoint_dir_name=f"step-{metrics['step']:08d}")

    def tell(self, progress: dict[str, Any]) -> None:
        self._board.tell.remote(progress)


def _worker_device(name: str) -> torch.device:
    """Ray Train shows each worker all GPUs of its node; which of them is the worker's own, Ray's `get_device` knows."""
    import ray.train.torch

    device = pick_device(worker_device(name))
    if device.type == "cuda":
        device = ray.train.torch.get_device()
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # Ray names a CUDA device wherever it reserved a GPU
    return device


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
    """An actor that holds what rank 0 told last."""
    import ray

    class Board:
        def __init__(self) -> None:
            self._latest: dict[str, Any] | None = None

        def tell(self, progress: dict[str, Any]) -> None:
            self._latest = progress

        def latest(self) -> dict[str, Any] | None:
            return self._latest

    return ray.remote(num_cpus=0)(Board).remote()


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


def main(argv: list[str] | None = None) -> None:
    """The same arguments as `captioner train`; ends the process with its exit code."""
    from ray_jobs.cli import main as command

    command(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
