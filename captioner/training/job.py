"""A training run on one OUT, from the first check to the finished model. The engine says where the work is done.

OUT/
  train.json          which run this is: id, settings, fingerprint, counts; its state at the end
  pairs/              the usable pairs, split and frozen; pairs.json is written last
  checkpoints/        Ray Train's; the best ones and the latest
  model/              the finished model; training_run.json is written last
  history.json, report.html
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa

from captioner.config import ModelConfig, TrainConfig
from captioner.console.stopping import notify, stoppable
from captioner.errors import OK, ModelError, TrainingError, UsageError
from captioner.files import shown
from captioner.models import ModelRef, check_in_subprocess, resolve
from captioner.models.checking import PendingCheck
from captioner.run.prefetch import in_background
from captioner.store.directory import Directory
from captioner.training.archives import Archives, list_pairs, open_archives
from captioner.training.pairs import SPLITS, TRAINABLE, Examine, Pairs, make_pairs, max_caption_tokens
from captioner.training.progress import TrainProgress
from captioner.training.record import RUN_FILE, open_record
from captioner.training.schedule import Schedule, make_schedule

PAIRS_FILE, MODEL_FILE = "pairs/pairs.json", "model/training_run.json"
# So many pairs are examined while the workers start. More take longer than that start, and want its CPUs.
EXAMINED_BESIDE = 10_000


@dataclass(frozen=True)
class Finishing:
    """What is needed to make OUT/model from a checkpoint. Picklable."""

    config: TrainConfig
    model: ModelRef
    archives: Archives
    schedule: Schedule
    tables: dict[str, pa.Table]
    record: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    out: Directory


@dataclass(frozen=True)
class Start:
    """What is known of a run before its pairs are."""

    config: TrainConfig
    out: Directory
    model: ModelRef
    archives: Archives
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the run's checkpoints: another configuration never finds them."""
        return str(self.record["fingerprint"])[:16]


@dataclass(frozen=True)
class TrainRun:
    """An open run: its pairs are frozen, its steps counted."""

    start: Start
    pairs: Pairs
    schedule: Schedule

    def write_report(self) -> None:
        """OUT/report.html before training: what the model will be shown."""
        from captioner.training.report import write_report

        start, pairs = self.start, self.pairs
        write_report(start.out, start.record, start.archives, pairs.tables, pairs.counts(), [], {})


@dataclass
class Outcome:
    """How the workers ended.

    `checkpoint`: of the best model, opened by the engine; `stopped`: why before the last step, or "";
    `checkpoint_seconds`: how long training waited for checkpoints.
    """

    run: TrainRun
    checkpoint: Any
    metrics: dict[str, Any]
    step: int
    history: list[dict[str, Any]]
    stopped: str
    checkpoint_seconds: float


class TrainEngine(Protocol):
    """Where training runs: Ray, or this process in tests."""

    def start(self) -> None:
        """Begin to get ready, in threads; called first. It cannot fail: what follows waits, and raises."""
        ...

    def num_workers(self) -> int:
        """How many workers will train; raises ClusterError where a request cannot be met."""
        ...

    def device(self) -> str:
        """The kind of device that workers train on: "cpu", "cuda", ..."""
        ...

    def map_tables(self, function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """`function` on each table, in order."""
        ...

    def train(self, start: Start, prepare: Callable[[], TrainRun], progress: TrainProgress) -> Outcome:
        """Start the workers, and train what `prepare` returns.

        It is called once, perhaps in another thread while the workers start; what it raises is raised.
        """
        ...

    def finish(self, checkpoint: Any, finishing: Finishing) -> dict[str, Any]:
        """Call `captioner.training.finish.finish` where a model can be loaded; returns its record."""
        ...


def run(config: TrainConfig, engine: TrainEngine) -> int:
    """Train a model into OUT/model; returns the exit code. Raises CaptionerError."""
    with stoppable(f"checkpoints stay in {shown(config.output.path)}"):
        return _run(config, engine)


def _run(config: TrainConfig, engine: TrainEngine) -> int:
    started = time.perf_counter()
    _check_settings(config)
    engine.start()
    out, model, archives = Directory(config.output.path), _resolve(config), open_archives(config.data)
    with TrainProgress() as progress:
        listed = in_background(partial(_list_new_pairs, config, out, archives))
        check = check_in_subprocess(model)
        progress.doing("starting Ray")
        if config.training.fp16 and engine.device() == "cpu":
            raise UsageError("--fp16: there is no GPU to compute in float16 on; --bf16 works on CPUs as well")
        record = open_record(config, out, model, engine.num_workers())
        if out.exists(MODEL_FILE):
            check.cancel()
            notify(f"nothing to train: {shown(config.output.path)}/model is there")
            _push(config, out)
            return OK
        start = Start(config, out, model, archives, record)
        progress.doing("reading pairs")
        tables = listed.result()
        prepare = partial(_prepare, start, tables, engine, check, progress)
        if sum(map(len, tables or [])) > EXAMINED_BESIDE:
            prepare = partial(_same, prepare())
        outcome = engine.train(start, prepare, progress)
        if outcome.stopped:
            notify(f"stopped at step {outcome.step}: {outcome.stopped}")
        if outcome.stopped.startswith("the loss of"):
            raise TrainingError(
                f"{outcome.stopped}; the last good checkpoint stays in {shown(config.output.path)}/checkpoints; "
                "train with a lower --learning-rate into another OUT"
            )
        progress.doing("making OUT/model")
        opened = outcome.run
        finishing = Finishing(
            config, model, archives, opened.schedule, opened.pairs.tables, record, outcome.metrics, outcome.history, out
        )
        finished = engine.finish(outcome.checkpoint, finishing)
        progress.doing("")
    seconds = {"seconds": round(time.perf_counter() - started, 1), "checkpoint_seconds": outcome.checkpoint_seconds}
    out.write_json(RUN_FILE, record | {"state": "finished", **seconds, **finished})
    _push(config, out)
    _tell_result(config, finished)
    return OK


def _list_new_pairs(config: TrainConfig, out: Directory, archives: Archives) -> list[pa.Table] | None:
    """What DATA lists, or None where an earlier start has frozen the pairs."""
    return None if out.exists(PAIRS_FILE) else list(list_pairs(archives, config.data.limit))


def _prepare(
    start: Start, listed: list[pa.Table] | None, engine: TrainEngine, check: PendingCheck, progress: TrainProgress
) -> TrainRun:
    config, record = start.config, start.record
    pairs = _frozen_pairs(start.out) if listed is None else _examine(start, listed, engine, progress)
    _tell_pairs(pairs)
    check.result()
    schedule = make_schedule(config.training, _epoch_size(config, pairs), record["num_workers"])
    start.out.write_json(RUN_FILE, record | {"state": "running"})
    progress.expect(schedule.max_steps, schedule.global_batch_size)
    return TrainRun(start, pairs, schedule)


def _same(opened: TrainRun) -> TrainRun:
    return opened


def _check_settings(config: TrainConfig) -> None:
    if not config.output.path:
        raise UsageError("no OUT given; name the directory for the model and its report")
    if not config.data.path:
        raise UsageError("no DATA given; name a folder with metadata.jsonl, tars, Parquet, a dataset or captions table")
    if config.training.bf16 and config.training.fp16:
        raise UsageError("--bf16 and --fp16 exclude each other; give one of them")
    if config.output.push_to_hub and not config.output.hub_model_id:
        raise UsageError("--push-to-hub: name the repository with --hub-model-id OWNER/NAME")
    if not config.data.eval_data and not config.data.eval_fraction:
        raise UsageError("--eval-fraction 0: the eval set is empty; raise it, or give --eval-data")
    if config.model.lora_rank is not None:
        from captioner.training.lora import check_installed

        check_installed()


def _resolve(config: TrainConfig) -> ModelRef:
    wanted = ModelConfig(
        name=config.model.name, revision=config.model.revision, max_new_tokens=config.model.max_new_tokens
    )
    model = resolve(wanted, "float32", announce=notify)
    if model.family not in TRAINABLE:
        known = ", ".join(TRAINABLE)
        raise ModelError(
            f"--model {shown(config.model.name)}: a {model.family} model cannot be trained here; {known} can"
        )
    if model.spec.own_sizes:
        raise ModelError(
            f"--model {shown(config.model.name)}: cannot be trained here, because only its own image processor can"
            " prepare its pictures; save it with one that resizes to one size"
        )
    return model


def _frozen_pairs(out: Directory) -> Pairs:
    """The pairs as an earlier start froze them."""
    facts = out.read_json(PAIRS_FILE)
    tables = {name: out.read_table(f"pairs/{name}.parquet") for name in facts["splits"]}
    return Pairs(tables, facts["skipped"], facts["examples"], facts["truncated_captions"], facts["listed"])


def _examine(start: Start, listed: list[pa.Table], engine: TrainEngine, progress: TrainProgress) -> Pairs:
    """The usable pairs among those listed, split and frozen."""
    config, out, model = start.config, start.out, start.model
    total, num_examined = sum(map(len, listed)), 0

    def counted(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        nonlocal num_examined
        for table in tables:
            num_examined += len(table)
            progress.doing(f"examined {num_examined:,} of {total:,} pairs")
            yield table

    progress.doing(f"examining {total:,} pairs")
    examine = Examine(start.archives, model.spec, model.path, max_caption_tokens(model))
    pairs = make_pairs(config.data, counted(engine.map_tables(examine, listed)), config.training.seed)
    for name, table in pairs.tables.items():
        out.write_table(f"pairs/{name}.parquet", table)
    facts = {**pairs.counts(), "splits": [n for n in SPLITS if n in pairs.tables], "fingerprint": pairs.fingerprint}
    out.write_json(PAIRS_FILE, facts)
    return pairs


def _epoch_size(config: TrainConfig, pairs: Pairs) -> int:
    """Pairs of one pass: pictures, or captions where each is a pair of its own."""
    table = pairs.tables["train"]
    if config.data.caption_choice != "all":
        return len(table)
    return sum(len(captions) for captions in table["reference_captions"].to_pylist())


def _tell_pairs(pairs: Pairs) -> None:
    shares = ", ".join(f"{len(table):,} {name}" for name, table in pairs.tables.items())
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in pairs.skipped.items())
    notify(f"{pairs.num_listed:,} pictures: {shares}" + (f"; left out: {skipped}" if skipped else ""))
    if pairs.num_truncated:
        notify(f"{pairs.num_truncated:,} captions are longer than the model allows and are cut")


def _push(config: TrainConfig, out: Directory) -> None:
    if config.output.push_to_hub:
        from captioner.training.push import push_to_hub

        notify(f"uploaded to {push_to_hub(out, str(config.output.hub_model_id))}")


def _tell_result(config: TrainConfig, finished: dict[str, Any]) -> None:
    for name, found in finished["measured"].items():
        wer, baseline = found["wer"], found["shuffled_wer"]
        if wer is not None:
            beside = "" if baseline is None else f" ({baseline:.3f} with the captions shuffled)"
            notify(f"WER {wer:.3f} on {found['num_pictures']:,} {name} pictures{beside}")
    before = finished["before"]["wer"]
    if before is not None:
        notify(f"before training it was {before:.3f} on the eval pictures")
    notify(f"the model: {shown(config.output.path).rstrip('/')}/model")
