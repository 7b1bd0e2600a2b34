"""Caption images on Ray Data: `python -m ray_jobs.caption SOURCE OUT --model M ...`.

    chunks -> DecodeStage (CPUs) -> CaptionStage (GPUs) -> CommitStage -> receipts, read by the driver

The flow around it is that of `captioner.pipeline`. One row is one chunk all the way, so no stage mixes chunks and a
chunk is committed whole or not at all.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from captioner import pipeline
from captioner.config import AutoInt, CaptionConfig
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.data import Chunk, Receipt
from captioner.models import ModelRef, is_small
from captioner.models.endpoint.api_key import ApiKey
from captioner.steps import Work
from captioner.store.table import TABLE_FILE
from ray_jobs.cluster import Connection, Sizes, sizes_of
from ray_jobs.failures import execution_error
from ray_jobs.gpus import device_kind
from ray_jobs.metrics import DriverMetrics
from ray_jobs.nodes import check_gpu_nodes, check_shared
from ray_jobs.stages import CaptionStage, CommitStage, DecodeStage, receipts_of
from ray_jobs.workers import WorkerStarts

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.util.queue import Queue

# Chunks of one Ray Data execution (a million images). The driver keeps a record of every block of an execution; several
# executions keep its memory constant, at the price of filling the pipeline once for each.
CHUNKS_PER_EXECUTION = 2_048


def run(config: CaptionConfig) -> int:
    """Caption a source into OUT; return the exit code. Raises CaptionerError."""
    return pipeline.run(config, RayEngine(config))


class RayEngine:
    """Captions chunks on the cluster. Connects when that is first needed: a finished table needs no Ray."""

    def __init__(self, config: CaptionConfig) -> None:
        self._config = config
        self._connection = Connection(config.cluster)
        self._sizes: Sizes | None = None

    def start(self) -> None:
        """Connect while the images are listed."""
        self._connection.start()

    def device(self) -> str:
        return device_kind(self._connection.resources(), self._share_out(), self._config.model.compute_on)

    def slots(self) -> dict[str, float]:
        sizes = self._sizes or self._share_out()
        return {"decode": sizes.decode_cpus, "device": sizes.num_workers, "write": sizes.committers}

    def caption_chunks(self, work: Work, chunks: list[Chunk]) -> Generator[Receipt, None, None]:
        sizes = self._sizes = self._share_out(is_small(work.model))
        work = replace(work, model=work.model.shared_by(sizes.most_workers))
        check_gpu_nodes(work.device, sizes)
        check_shared(work.table.directory, TABLE_FILE)
        metrics = DriverMetrics(sum(chunk.num_rows for chunk in chunks))
        has_messages = sizes.gpus_per_worker or work.model.endpoint
        with shown_messages() if has_messages else nullcontext() as messages:
            for first in range(0, len(chunks), CHUNKS_PER_EXECUTION):
                window = chunks[first : first + CHUNKS_PER_EXECUTION]
                for receipt in _execute(work, window, sizes, self._config.model.batch_size, messages):
                    metrics.add(receipt)
                    yield receipt

    def _share_out(self, one_thread: bool = False) -> Sizes:
        return sizes_of(self._config, self._connection.resources(), one_thread)


@contextmanager
def shown_messages() -> Iterator[Queue]:
    """Provide a queue for messages of caption workers that start, and show those of the first worker.

    The messages of the other workers are the same. The queue is a process of its own, which a machine with a GPU can
    spare.
    """
    import ray
    from ray.util.queue import Queue

    queue = Queue(actor_options={"num_cpus": 0})

    def show() -> None:
        first_worker = None
        with suppress(ray.exceptions.RayError):  # the queue is gone
            while True:
                worker, line = queue.get()
                first_worker = first_worker or worker
                if worker == first_worker:
                    notify(f"caption worker: {line}")

    threading.Thread(target=show, name="messages", daemon=True).start()
    try:
        yield queue
    finally:
        ray.kill(queue.actor)


def make_dataset(
    work: Work, chunks: list[Chunk], sizes: Sizes, batch_size: AutoInt, messages: Queue | None = None
) -> Dataset:
    """Return the graph of stages, not started yet.

    Every stage is a pool of actors: an actor imports torch once, while Ray starts new processes for tasks again and
    again; and Ray never fuses two pools into one process.
    """
    import ray

    pool = partial(actor_pool, len(chunks))
    dataset = ray.data.from_items([asdict(chunk) for chunk in chunks], override_num_blocks=len(chunks))
    dataset = dataset.map_batches(
        DecodeStage,
        fn_constructor_kwargs={"work": work},
        num_cpus=sizes.cpus_per_decoder,
        **pool(sizes.decode_cpus, sizes.max_decode_cpus),
    )
    dataset = dataset.map_batches(
        CaptionStage,
        fn_constructor_kwargs={
            "work": work,
            "batch_size": batch_size,
            "num_threads": sizes.threads_per_worker,
            "messages": messages,
            "api_key": ApiKey.from_environment(),
        },
        num_cpus=sizes.cpus_per_worker,
        num_gpus=sizes.gpus_per_worker or None,
        **pool(
            sizes.num_workers, sizes.max_workers, calls_at_once(work, sizes, max(chunk.num_rows for chunk in chunks))
        ),
    )
    return dataset.map_batches(CommitStage, fn_constructor_kwargs={"work": work}, num_cpus=0, **pool(sizes.committers))


def actor_pool(num_chunks: int, size: int, max_size: int = 0, max_calls: int = 1) -> dict[str, Any]:
    """Return the arguments of `map_batches` for a stage of `size` to `max_size` actors, which get one chunk a call.

    A batch of one row is one chunk; Ray requires a batch size where a stage reserves a GPU. `max_calls`: chunks that an
    actor processes at the same time. More than one only where no call raises: with Ray's true multi-threading two calls
    that fail together may both be lost, and the run waits for ever (Ray 2.60).
    """
    from ray.data import ActorPoolStrategy

    threads: dict[str, Any] = {}
    if max_calls > 1:
        threads = {
            "max_concurrent_calls_per_actor": max_calls,
            "enable_true_multi_threading": True,
            # Ray would queue as many chunks again, with their decoded images: only a GPU needs them.
            "max_tasks_in_flight_per_actor": max(2 * CaptionStage.MAX_CALLS, max_calls),
        }
    strategy = ActorPoolStrategy(
        min_size=min(size, num_chunks), max_size=min(max(size, max_size), num_chunks), **threads
    )
    return {"compute": strategy, "batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}


def calls_at_once(work: Work, sizes: Sizes, rows_per_chunk: int) -> int:
    """Return how many chunks a caption worker has at the same time."""
    if work.model.endpoint:
        return work.model.endpoint.chunks_at_once(rows_per_chunk)
    return CaptionStage.MAX_CALLS if sizes.gpus_per_worker else 1


def _execute(
    work: Work, chunks: list[Chunk], sizes: Sizes, batch_size: AutoInt, messages: Queue | None = None
) -> Iterator[Receipt]:
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    configure_ray_data(work)
    starts, waiting = WorkerStarts(), ExitStack()
    waiting.enter_context(phase("starting workers" if work.model.endpoint else "starting workers, loading weights"))
    try:
        with starts.watched(), waiting:
            for block in make_dataset(work, chunks, sizes, batch_size, messages).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                starts.has_started()
                waiting.close()
                yield from receipts_of(block)
    except (RayError, ExecutionTimeoutError) as error:
        raise execution_error(error, starts.error, no_progress_timeout(work.decode_timeout, work.model)) from error


def configure_ray_data(work: Work) -> None:
    """Let dropped blocks and stalls fail the run, and turn off Ray Data's own display."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # execution_error gives its errors as one line
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = no_progress_timeout(work.decode_timeout, work.model)


def no_progress_timeout(decode_timeout: float, model: ModelRef | None = None) -> float:
    """Return the seconds without a block from any stage after which a run counts as stalled.

    A chunk of images that all hang takes less (see `captioner.imaging.sandbox.decoder`), and so does a chunk that a
    slow model server captions one image after the other.
    """
    of_servers = 0.0
    if model and model.endpoint:
        num_requests = model.endpoint.rows_per_chunk * sum(2 if question.schema else 1 for question in model.questions)
        of_servers = num_requests * model.endpoint.request_timeout + model.endpoint.endpoint_timeout
    return max(900.0, 20 * decode_timeout, of_servers)


if __name__ == "__main__":  # the same arguments and exit code as `captioner caption`
    from ray_jobs.cli import main

    main(["caption", *sys.argv[1:]])
