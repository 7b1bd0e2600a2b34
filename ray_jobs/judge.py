"""Judge captions on Ray Data: `captioner judge OUT --model M`.

    chunks -> DecodeCaptions (CPUs) -> ScoreCaptions (GPUs) -> scores, which the driver writes

The flow around it is that of `captioner.run.judging`. One row is one chunk all the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from captioner.config import ClusterConfig
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.data import Chunk
from captioner.models import is_small
from captioner.models.dual_encoder import open_encoder
from captioner.run.judging import CaptionReader, JudgeWork, score
from captioner.scoring.judgements import JUDGE_SCHEMA
from captioner.store.table import TABLE_FILE
from ray_jobs.caption import CHUNKS_PER_EXECUTION, configure_ray_data, no_progress_timeout
from ray_jobs.cluster import Connection, Sizes, share_out
from ray_jobs.failures import execution_error
from ray_jobs.gpus import worker_device
from ray_jobs.nodes import check_gpu_nodes, check_shared
from ray_jobs.stages import from_block, to_block
from ray_jobs.workers import WorkerStarts

if TYPE_CHECKING:
    from ray.data import Dataset


class RayJudge:
    """Judges chunks on the cluster. Connects when the first chunk is judged: a judged table needs no Ray."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    def judge_chunks(self, work: JudgeWork, chunks: list[Chunk]) -> Iterator[tuple[Chunk, pa.Table]]:
        device = work.settings.device
        sizes = share_out(Connection(self._config).resources(), self._config, is_small(work.work.model), device=device)
        check_gpu_nodes(device, sizes)
        check_shared(work.work.table.directory, TABLE_FILE)
        for first in range(0, len(chunks), CHUNKS_PER_EXECUTION):
            yield from _execute(work, chunks[first : first + CHUNKS_PER_EXECUTION], sizes)


class DecodeCaptions:
    """Turns a block with the description of one chunk into its captions and decoded images."""

    def __init__(self, work: JudgeWork) -> None:
        self._reader = CaptionReader(work)
        self._decoder = work.work.decoder()
        self._decoder.start()

    def __call__(self, block: pa.Table) -> pa.Table:
        (chunk,) = (Chunk(**row) for row in block.to_pylist())
        return to_block(self._reader.decode(chunk, self._decoder))


class ScoreCaptions:
    """Turns a block of decoded images into the scores of their captions; holds the model."""

    def __init__(self, work: JudgeWork, num_threads: int) -> None:
        self._work = work
        device = worker_device(work.settings.device)
        self._encoder = open_encoder(work.work.model, device, work.settings.batch_size, num_threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        decoded = from_block(block, self._work.work)
        (rows,) = score(self._work, self._encoder, decoded).combine_chunks().to_batches()
        scores = pa.LargeListArray.from_arrays([0, len(rows)], rows.to_struct_array())
        return pa.table({"chunk": [json.dumps(asdict(decoded.chunk))], "scores": scores})


def make_dataset(work: JudgeWork, chunks: list[Chunk], sizes: Sizes) -> Dataset:
    """Return the graph of stages, not started yet. Every stage is a pool of actors, as in `ray_jobs.caption`."""
    import ray
    from ray.data import ActorPoolStrategy

    def pool(size: int) -> dict[str, Any]:
        strategy = ActorPoolStrategy(size=min(size, len(chunks)))
        return {"compute": strategy, "batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}

    dataset = ray.data.from_items([asdict(chunk) for chunk in chunks], override_num_blocks=len(chunks))
    dataset = dataset.map_batches(
        DecodeCaptions,
        fn_constructor_kwargs={"work": work},
        num_cpus=sizes.cpus_per_decoder,
        **pool(sizes.decode_cpus),
    )
    return dataset.map_batches(
        ScoreCaptions,
        fn_constructor_kwargs={"work": work, "num_threads": sizes.threads_per_worker},
        num_cpus=sizes.cpus_per_worker,
        num_gpus=sizes.gpus_per_worker or None,
        **pool(sizes.num_workers),
    )


def _execute(work: JudgeWork, chunks: list[Chunk], sizes: Sizes) -> Iterator[tuple[Chunk, pa.Table]]:
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    configure_ray_data(work.work)
    starts = WorkerStarts()
    try:
        with starts.watched():
            dataset = make_dataset(work, chunks, sizes)
            batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
            with phase("starting workers, loading the model", notify):
                first = next(batches)
            starts.has_started()
            for block in chain([first], batches):
                yield from _scores_of(block)
    except (RayError, ExecutionTimeoutError) as error:
        raise execution_error(error, starts.error, no_progress_timeout(work.work.decode_timeout)) from error


def _scores_of(block: pa.Table) -> Iterator[tuple[Chunk, pa.Table]]:
    for facts, scores in zip(block["chunk"].to_pylist(), block["scores"], strict=True):
        yield Chunk(**json.loads(facts)), pa.Table.from_struct_array(scores.values).cast(JUDGE_SCHEMA)
