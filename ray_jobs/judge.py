"""Judge captions on Ray Data: `captioner judge OUT --model M`.

    chunks  -> DecodeCaptions (CPUs) -> ScoreCaptions (GPUs) -> scores, which the driver writes
    batches -> DecodeSample (CPUs) -> AskAboutObjects (model servers) -> verdicts, which the driver writes

The flow around it is that of `captioner.run.judging`, or with an --endpoint that of `captioner.run.object_judge`. One
row is one chunk, or one batch, all the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from captioner.config import ClusterConfig
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.data import Chunk
from captioner.models import is_small
from captioner.models.dual_encoder import open_encoder
from captioner.models.endpoint.api_key import ApiKey
from captioner.run.judging import CaptionReader, JudgeWork, pixels_of, score
from captioner.run.object_judge import OBJECTS_SCHEMA, Batch, Judge, ObjectWork, judge_calls
from captioner.scoring.judgements import JUDGE_SCHEMA
from captioner.steps import Work
from captioner.store.table import TABLE_FILE
from ray_jobs.caption import CHUNKS_PER_EXECUTION, actor_pool, configure_ray_data, no_progress_timeout, shown_messages
from ray_jobs.cluster import Connection, Sizes, share_out
from ray_jobs.failures import execution_error
from ray_jobs.gpus import worker_device
from ray_jobs.nodes import check_gpu_nodes, check_shared
from ray_jobs.stages import error_block, from_block, messages_to, raise_error, to_block
from ray_jobs.workers import WorkerStarts

if TYPE_CHECKING:
    from ray.data import Dataset
    from ray.util.queue import Queue


T = TypeVar("T")


class RayJudgeEngine:
    """Judges chunks on the cluster. Connects when the first chunk is judged: a judged table needs no Ray."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    def judge_chunks(self, work: JudgeWork, chunks: list[Chunk]) -> Iterator[tuple[Chunk, pa.Table]]:
        device = work.settings.device
        sizes = share_out(Connection(self._config).resources(), self._config, is_small(work.work.model), device=device)
        check_gpu_nodes(device, sizes)
        check_shared(work.work.table.directory, TABLE_FILE)
        scorer = ScoreCaptions, {"work": work, "num_threads": sizes.threads_per_worker}
        stages = Stages((DecodeCaptions, {"work": work}), scorer)
        for window in _windows(iter(chunks)):
            for block in _execute(work.work, [asdict(chunk) for chunk in window], stages, sizes):
                yield from _scores_of(block)

    def ask_about(self, work: ObjectWork, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Ask the servers about captions, from workers on the nodes. Needs no GPU."""
        resources = Connection(self._config).resources()
        endpoint = work.work.model.endpoint
        assert endpoint is not None
        sizes = share_out(resources, self._config, device="cpu", concurrency=endpoint.concurrency)
        check_shared(work.work.table.directory, TABLE_FILE)
        shared = replace(work, work=replace(work.work, model=work.work.model.shared_by(sizes.most_workers)))
        with shown_messages() as messages:
            asker = {"work": shared, "api_key": ApiKey.from_environment(), "messages": messages}
            stages = Stages((DecodeSample, {"work": work.work}), (AskAboutObjects, asker), judge_calls(shared))
            for window in _windows(batches):
                rows = [{"part": part, "captions": _to_bytes(captions)} for part, captions in window]
                for block in _execute(work.work, rows, stages, sizes):
                    raise_error(block)
                    yield from _verdicts_of(block)


@dataclass(frozen=True)
class Stages:
    """The two stages: of each the class and the arguments of its `__init__`. `calls`: to a judge at the same time."""

    decoder: tuple[type, dict[str, Any]]
    judge: tuple[type, dict[str, Any]]
    calls: int = 1


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


class DecodeSample:
    """Turns a block with one batch of captions into these captions and their decoded images."""

    def __init__(self, work: Work) -> None:
        self._work, self._decoder = work, work.decoder()
        self._decoder.start()

    def __call__(self, block: pa.Table) -> pa.Table:
        (batch,) = block.to_pylist()
        captions = pa.ipc.open_stream(batch["captions"]).read_all()
        chunk = Chunk(0, batch["part"], 0, captions.num_rows)
        return to_block(pixels_of(self._work, captions, self._decoder, chunk))


class AskAboutObjects:
    """Turns a block of decoded images into what a chat model says of their captions.

    Several calls run at the same time, and none raises: see `ray_jobs.stages.CaptionStage`.
    """

    def __init__(self, work: ObjectWork, api_key: ApiKey, messages: Queue) -> None:
        self._work, self._judge = work.work, Judge(work, api_key, messages_to(messages))

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            decoded = from_block(block, self._work)
            (rows,) = self._judge.ask(decoded)[0].combine_chunks().to_batches()
        except Exception as error:
            return error_block(error)
        verdicts = pa.LargeListArray.from_arrays([0, len(rows)], rows.to_struct_array())
        return pa.table({"part": [decoded.chunk.part], "verdicts": verdicts})


def make_dataset(rows: list[dict[str, Any]], stages: Stages, sizes: Sizes) -> Dataset:
    """Return the graph of stages, not started yet. Every stage is a pool of actors, as in `ray_jobs.caption`."""
    import ray

    pool = partial(actor_pool, len(rows))
    (decoder, decoder_arguments), (judge, judge_arguments) = stages.decoder, stages.judge
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset = dataset.map_batches(
        decoder,
        fn_constructor_kwargs=decoder_arguments,
        num_cpus=sizes.cpus_per_decoder,
        **pool(sizes.decode_cpus, sizes.max_decode_cpus),
    )
    return dataset.map_batches(
        judge,
        fn_constructor_kwargs=judge_arguments,
        num_cpus=sizes.cpus_per_worker,
        num_gpus=sizes.gpus_per_worker or None,
        **pool(sizes.num_workers, sizes.max_workers, stages.calls),
    )


def _execute(work: Work, rows: list[dict[str, Any]], stages: Stages, sizes: Sizes) -> Iterator[pa.Table]:
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    configure_ray_data(work)
    starts = WorkerStarts()
    try:
        with starts.watched():
            dataset = make_dataset(rows, stages, sizes)
            batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
            with phase("starting workers, loading the model", notify):
                first = next(batches)
            starts.has_started()
            yield from chain([first], batches)
    except (RayError, ExecutionTimeoutError) as error:
        raise execution_error(error, starts.error, no_progress_timeout(work.decode_timeout, work.model)) from error


def _scores_of(block: pa.Table) -> Iterator[tuple[Chunk, pa.Table]]:
    for facts, scores in zip(block["chunk"].to_pylist(), block["scores"], strict=True):
        yield Chunk(**json.loads(facts)), pa.Table.from_struct_array(scores.values).cast(JUDGE_SCHEMA)


def _windows(items: Iterator[T]) -> Iterator[list[T]]:
    """Yield the items of one Ray Data execution after the other."""
    while window := list(islice(items, CHUNKS_PER_EXECUTION)):
        yield window


def _verdicts_of(block: pa.Table) -> Iterator[Batch]:
    for part, verdicts in zip(block["part"].to_pylist(), block["verdicts"], strict=True):
        yield part, pa.Table.from_struct_array(verdicts.values).cast(OBJECTS_SCHEMA)


def _to_bytes(captions: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, captions.schema) as stream:
        stream.write_table(captions)
    return bytes(sink.getvalue())
