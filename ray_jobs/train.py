"""Fine-tune on Ray Train: `python -m ray_jobs.train DATA OUT --model M ...`.

    pairs -> examine (CPU tasks) -> Ray Train workers, each fed by CPU tasks -> best checkpoint -> OUT/model

The flow around it is that of `captioner.training.job`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow as pa

from captioner.config import ClusterConfig, ModelConfig, TrainConfig
from captioner.errors import CaptionerError
from captioner.files import inside
from captioner.models import ModelRef, weights_bytes
from captioner.models.devices import set_wait_policy
from captioner.models.loading import SMALL_MODEL_BYTES
from captioner.run.prefetch import in_background
from captioner.training import job
from captioner.training.job import PreparedRun, TrainEngine, TrainOutcome, TrainSetup
from captioner.training.progress import TrainProgress
from captioner.training.record import RUN_FILE
from captioner.training.schedule import is_higher_better, rank
from captioner.training.worker import FinishInputs
from ray_jobs.cluster import Connection, Resources, Sizes, cluster_address, import_ray, share_out
from ray_jobs.failures import cause_of
from ray_jobs.gpus import device_kind
from ray_jobs.nodes import check_gpu_nodes, check_shared
from ray_jobs.train_workers import finish_model, make_board, map_tables, train_loop

MAX_FAILURES = 3


def run(config: TrainConfig, engine: TrainEngine | None = None) -> int:
    """Train a model into OUT, and caption --caption-image with it; return the exit code. Raises CaptionerError.

    `engine`: by default one on the cluster.
    """
    code = job.run(config, engine or RayTrainEngine(config))
    image, out, model = config.output.caption_image, config.output.path, config.model
    if code or image is None:
        return code
    from captioner.console.trying import try_images

    trained = ModelConfig(
        name=inside(out, "model"), prompt=model.prompt, max_new_tokens=model.max_new_tokens, device=model.device
    )
    return try_images([image], [trained])


class RayTrainEngine:
    """Trains on the cluster. Connects when it is first needed. `loop`: run by each worker, `train_loop` by default."""

    def __init__(self, config: TrainConfig, loop: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> None:
        self._loop = loop or train_loop
        self._cluster, self._device = ClusterConfig(**config.cluster.model_dump()), config.model.device
        self._connection = Connection(self._cluster)
        self._is_started = False
        self._checked_sizes: Sizes | None = None

    def start(self) -> None:
        """Connect, and import what drives Ray Train, while pairs are listed."""
        # How often Ray registers checkpoints: with the default of 2 s a crash soon after a report loses one.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        if cluster_address(self._cluster) == "local":  # no node leaves: a process for each start of workers is saved
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
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

    def train(self, setup: TrainSetup, prepare: Callable[[], PreparedRun], progress: TrainProgress) -> TrainOutcome:
        import ray.train

        check_shared(setup.out, RUN_FILE)
        board = make_board()
        progress.watch(lambda: ray.get(board.latest.remote()))
        trainer = self._trainer(setup, board)
        preparing = _Preparing(prepare, board, progress)
        try:
            with _own_sigint(), preparing:
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise preparing.error or _cause_of(error) from error
        prepared, ended = preparing.result(), result.return_value
        metric = f"eval_{setup.config.training.metric_for_best_model}"
        checkpoints = result.best_checkpoints or []
        if not checkpoints:
            return TrainOutcome(prepared, None, {}, **ended)
        checkpoint, metrics = min(checkpoints, key=lambda pair: rank(pair[1], metric))
        return TrainOutcome(prepared, checkpoint, metrics, **ended)

    def finish(self, checkpoint: Any, inputs: FinishInputs) -> dict[str, Any]:
        import ray

        sizes = self._sizes()
        task = ray.remote(num_cpus=1, num_gpus=sizes.gpus_per_worker or None, max_retries=1)(finish_model)
        try:
            results: dict[str, Any] = ray.get(
                task.remote(checkpoint, inputs, self._device, self._threads(inputs.model))
            )
        except ray.exceptions.RayError as error:
            raise _cause_of(error) from error
        return results

    def _trainer(self, setup: TrainSetup, board: Any) -> Any:
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

        from ray_jobs.process_group import ProcessGroup
        from ray_jobs.trainer import Trainer

        logging.getLogger("ray.train").setLevel(logging.ERROR)
        sizes, settings = self._sizes(), setup.config.training
        metric = f"eval_{settings.metric_for_best_model}"
        resources = {"CPU": sizes.cpus_per_worker} | ({"GPU": sizes.gpus_per_worker} if sizes.gpus_per_worker else {})
        config = {
            "config": setup.config,
            "model": setup.model,
            "board": board,
            "threads": self._threads(setup.model),
        }
        return Trainer(
            self._loop,
            train_loop_config=config,
            backend_config=ProcessGroup(self._device, self.device(), sizes.num_workers, sizes.gpus_per_worker),
            scaling_config=ScalingConfig(
                num_workers=sizes.num_workers, use_gpu=bool(sizes.gpus_per_worker), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=setup.name,
                storage_path=setup.out.path("checkpoints"),
                storage_filesystem=setup.out.filesystem,
                checkpoint_config=CheckpointConfig(
                    num_to_keep=settings.save_total_limit,
                    checkpoint_score_attribute=metric,
                    checkpoint_score_order="max" if is_higher_better(metric) else "min",
                ),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )

    def _sizes(self) -> Sizes:
        """Return the shares of the cluster; wait for it. Raises ModelError where torch cannot use a node's GPUs."""
        if self._checked_sizes is None:
            self.start()
            sizes = share_out(self._connection.resources(), self._cluster, device=self._device)
            check_gpu_nodes(self._device, sizes)
            self._checked_sizes = sizes
        return self._checked_sizes

    def _threads(self, model: ModelRef) -> int:
        return num_threads(self._sizes(), self._connection.resources(), weights_bytes(model))


def _import_trainer(cluster: ClusterConfig) -> None:
    """Import Ray Train: a second or two, in which Ray starts."""
    import_ray(cluster)
    import ray_jobs.trainer  # noqa: F401


def num_threads(sizes: Sizes, resources: Resources, model_bytes: int) -> int:
    """Return the number of torch's CPU threads in each worker.

    Without a GPU workers compute on all CPUs, those for decoding included: they are idle most of the time, since a step
    takes far longer than decoding its images. A small model is fastest on one thread.
    """
    if sizes.gpus_per_worker:
        return sizes.threads_per_worker
    if model_bytes <= SMALL_MODEL_BYTES:
        return 1
    return max(1, int(min(resources.num_cpus / sizes.num_workers, resources.least_cpus)))


@contextmanager
def _own_sigint() -> Iterator[None]:
    """Keep this program's handling of Ctrl-C.

    Ray Train replaces the handler by one that stops the workers and ends the process with code 0.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


class _Preparing:
    """Calls `prepare` in a thread while the workers start, and gives its result to them through the board.

    A context manager: it waits for the thread, unless training itself failed. `error`: raised by `prepare`.
    """

    def __init__(self, prepare: Callable[[], PreparedRun], board: Any, progress: TrainProgress) -> None:
        self._prepare, self._board, self._progress = prepare, board, progress
        self._prepared: PreparedRun | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="preparing", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.error is not None:
            self._thread.join()

    def result(self) -> PreparedRun:
        """Return the prepared run. Raises what `prepare` raised."""
        if self.error is not None:
            raise self.error
        assert self._prepared is not None
        return self._prepared

    def _run(self) -> None:
        import ray

        try:
            prepared = self._prepare()
            ray.get(self._board.set_task.remote([ray.put(prepared.worker_task())]))
            self._progress.show_status("")
            prepared.write_report()
            self._prepared = prepared
        except BaseException as error:  # raised by the thread that trains
            self.error = error
            self._board.set_task.remote(None)


def _cause_of(error: BaseException) -> CaptionerError:
    return cause_of(error, "checkpoints are saved; run the same command to continue")


if __name__ == "__main__":  # the same arguments and exit code as `captioner train`
    from ray_jobs.cli import main

    main(["train", *sys.argv[1:]])
