"""A training run in one OUT, from the first check to the finished model. The engine runs the work.

OUT/
  train.json          id, settings, fingerprint and base model of the run; its state once it trains
  pairs/              the usable pairs, split; fixed once pairs.json is written, which comes last
  checkpoints/        Ray Train's: the best ones and the latest
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

from captioner.config import ModelConfig, TrainConfig, num_bytes
from captioner.console.stopping import notify, stoppable
from captioner.console.text import counted
from captioner.errors import OK, ModelError, TrainingError, UsageError
from captioner.files import shown
from captioner.models import ModelRef, check_in_subprocess, resolve
from captioner.models.checking import PendingCheck
from captioner.models.families import family_of
from captioner.run.prefetch import in_background
from captioner.sources import describe
from captioner.store.directory import Directory
from captioner.store.lock import sole_writer
from captioner.training.advice import COLLAPSED, length_warning
from captioner.training.pair_sources import PairSources, list_pairs, open_pair_sources
from captioner.training.pairs import SPLITS, TRAINABLE, Examine, Pairs, make_pairs
from captioner.training.pixel_cache import PixelCache
from captioner.training.progress import TrainProgress
from captioner.training.recipes import with_recipe
from captioner.training.record import RUN_FILE, open_record
from captioner.training.schedule import Schedule, make_schedule, with_batch_of
from captioner.training.settings import check_settings
from captioner.training.worker import FinishInputs, WorkerTask

PAIRS_FILE, MODEL_FILE = "pairs/pairs.json", "model/training_run.json"
# Up to this many pairs are examined while the workers start. More take longer than that start and need its CPUs.
MAX_EXAMINED_DURING_START = 10_000
MUCH_WAITING = 0.1  # of the time of training


@dataclass(frozen=True)
class TrainSetup:
    """A run before its pairs are prepared."""

    config: TrainConfig
    out: Directory
    model: ModelRef
    sources: PairSources
    record: dict[str, Any]

    @property
    def pixel_cache(self) -> PixelCache | None:
        limit = num_bytes(self.config.data.pixel_cache)
        return PixelCache(self.record["training_run_id"], limit) if limit else None

    @property
    def name(self) -> str:
        """Return the name of the run's checkpoints, which differs for every configuration."""
        return str(self.record["fingerprint"])[:16]


@dataclass(frozen=True)
class PreparedRun:
    """A run whose pairs are fixed and whose steps are counted."""

    setup: TrainSetup
    pairs: Pairs
    schedule: Schedule

    def worker_task(self) -> WorkerTask:
        setup, tables = self.setup, self.pairs.tables
        return WorkerTask(
            setup.config,
            setup.model,
            setup.sources,
            self.schedule,
            tables["train"],
            tables["eval"],
            setup.out,
            setup.pixel_cache,
        )

    def write_report(self) -> None:
        """Write OUT/report.html before training: the pairs that the model will be trained on."""
        from captioner.training.report import write_report

        setup, pairs = self.setup, self.pairs
        write_report(setup.out, setup.record, setup.sources, pairs.tables, pairs.counts(), [], {})


@dataclass
class TrainOutcome:
    """How training ended. `checkpoint`: of the best model, in the form that the engine's `finish` takes.

    `metrics`: reported with the checkpoint. `stopped`: why the run ended before its last step, or "".
    `checkpoint_seconds`, `data_seconds`: how long training waited for checkpoints and for decoded images, of the
    `train_seconds` that it took.
    """

    run: PreparedRun
    checkpoint: Any
    metrics: dict[str, Any]
    step: int
    history: list[dict[str, Any]]
    stopped: str
    checkpoint_seconds: float
    data_seconds: float
    train_seconds: float

    def finish_inputs(self) -> FinishInputs:
        setup, run = self.run.setup, self.run
        return FinishInputs(
            setup.config,
            setup.model,
            setup.sources,
            run.schedule,
            run.pairs.tables,
            setup.record,
            self.metrics,
            self.history,
            setup.out,
        )


class TrainEngine(Protocol):
    """Runs the work of a training run: on Ray, or in this process."""

    def start(self) -> None:
        """Start in threads what the other methods need. It does not fail: they wait for it and raise its errors."""
        ...

    def num_workers(self) -> int:
        """Return how many workers will train. Raises ClusterError where a request cannot be met."""
        ...

    def device(self) -> str:
        """Return the kind of device that workers train on: "cpu", "cuda", ..."""
        ...

    def map_tables(self, function: Callable[[pa.Table], pa.Table], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield the result of `function` for each table, in order."""
        ...

    def train(self, setup: TrainSetup, prepare: Callable[[], PreparedRun], progress: TrainProgress) -> TrainOutcome:
        """Start the workers and train the run that `prepare` returns.

        `prepare` is called once, perhaps in another thread while the workers start; what it raises is raised.
        """
        ...

    def finish(self, checkpoint: Any, inputs: FinishInputs) -> dict[str, Any]:
        """Call `captioner.training.finish.finish` where a model can be loaded, and return its result."""
        ...


def run(config: TrainConfig, engine: TrainEngine) -> int:
    """Train a model into OUT/model and return the exit code. Raises CaptionerError."""
    check_settings(config)
    out = config.output.path
    with stoppable(f"checkpoints are saved in {shown(out)}"), sole_writer(out) as check_held:
        return _run(config, engine, check_held)


def _run(config: TrainConfig, engine: TrainEngine, check_held: Callable[[], None]) -> int:
    """Train as `run` does. `check_held` raises OutputError where another run has taken OUT over."""
    started = time.perf_counter()
    notify(f"training {shown(config.model.name)} on {shown(config.data.path)} into {shown(config.output.path)}")
    engine.start()
    with TrainProgress() as progress:
        progress.show_status("reading the files of the model")
        out, model = Directory(config.output.path), _resolve(config)
        config = with_recipe(config, model.family)
        progress.show_status(f"opening {shown(config.data.path)}")
        sources = open_pair_sources(config.data)
        for source in sources.sources:
            notify(f"{shown(source.name)} is {describe(source)}")
        listing = in_background(partial(_list_new_pairs, config, out, sources))
        check = check_in_subprocess(model)
        progress.show_status("starting Ray")
        if config.training.fp16 and engine.device() == "cpu":
            raise UsageError("--fp16: there is no GPU to compute in float16 on; --bf16 works on CPUs as well")
        num_workers = engine.num_workers()
        check_held()
        record = open_record(config, out, model, num_workers)
        training = with_batch_of(config.training, record["num_workers"], num_workers)
        config = config.model_copy(update={"training": training})
        setup = TrainSetup(config, out, model, sources, record)
        if out.exists(MODEL_FILE):
            check.cancel()
            notify(f"nothing to train: {shown(config.output.path)}/model is there")
            _push(config, out)
            return OK
        progress.show_status("listing pairs")
        listed = listing.result() or _list_new_pairs(config, out, sources)  # again where `open_record` dropped pairs
        outcome = _train(setup, listed, engine, check, progress)
        check_held()
        progress.show_status("making OUT/model")
        result = engine.finish(outcome.checkpoint, outcome.finish_inputs())
        if setup.pixel_cache is not None:
            setup.pixel_cache.remove()
        progress.show_status("")
    check_held()
    _write_finished(setup, outcome, result, time.perf_counter() - started)
    _push(config, out)
    _notify_result(config, result)
    return OK


def _write_finished(setup: TrainSetup, outcome: TrainOutcome, result: dict[str, Any], seconds: float) -> None:
    """Write the record of a finished run, and say where it waited much for images. `seconds`: that the run took."""
    waited = {name: getattr(outcome, name) for name in ("checkpoint_seconds", "data_seconds", "train_seconds")}
    record = setup.record | {"state": "finished", "seconds": round(seconds, 1), **waited, **result}
    setup.out.write_json(RUN_FILE, record)
    if outcome.data_seconds > MUCH_WAITING * outcome.train_seconds:
        share = outcome.data_seconds / outcome.train_seconds
        notify(f"training waited for decoded images {share:.0%} of its time; more CPUs would make it faster")


def _train(
    setup: TrainSetup,
    listed: list[pa.Table] | None,
    engine: TrainEngine,
    check: PendingCheck,
    progress: TrainProgress,
) -> TrainOutcome:
    """Prepare the pairs and train. Raises TrainingError where the loss is not finite."""
    prepare = partial(_prepare, setup, listed, engine, check, progress)
    if sum(map(len, listed or [])) > MAX_EXAMINED_DURING_START:
        prepared = prepare()
        outcome = engine.train(setup, lambda: prepared, progress)
    else:
        outcome = engine.train(setup, prepare, progress)
    if outcome.stopped:
        notify(f"stopped at step {outcome.step}: {outcome.stopped}")
    if outcome.stopped.startswith(("the loss of", COLLAPSED)):
        raise TrainingError(f"{outcome.stopped}; {_advice_after(outcome)}")
    return outcome


def _advice_after(outcome: TrainOutcome) -> str:
    """Return what to do about a run that training has broken."""
    if not outcome.step:
        return (
            "the model has it before training: its weights are damaged, or too large for --fp16; give another --model"
        )
    kept = (
        ""
        if outcome.checkpoint is None
        else f"the last good checkpoint stays in {outcome.run.setup.out.shown('checkpoints')}; "
    )
    return f"{kept}train with a lower --learning-rate into another OUT"


def _list_new_pairs(config: TrainConfig, out: Directory, sources: PairSources) -> list[pa.Table] | None:
    """Return everything DATA lists, or None where an earlier start has fixed the pairs."""
    return None if out.exists(PAIRS_FILE) else list(list_pairs(sources, config.data.limit, notify))


def _prepare(
    setup: TrainSetup,
    listed: list[pa.Table] | None,
    engine: TrainEngine,
    check: PendingCheck,
    progress: TrainProgress,
) -> PreparedRun:
    config = setup.config
    pairs = _read_pairs(setup.out) if listed is None else _examine(setup, listed, engine, progress)
    _notify_pairs(pairs)
    if warning := length_warning(pairs.tables["train"], config, setup.model.family):
        notify(warning)
    check.result()
    schedule = make_schedule(config.training, _epoch_size(config, pairs), engine.num_workers())
    progress.set_total(schedule.max_steps, schedule.global_batch_size)
    return PreparedRun(setup, pairs, schedule)


def _resolve(config: TrainConfig) -> ModelRef:
    settings = config.model
    model_config = ModelConfig(
        name=settings.name,
        revision=settings.revision,
        prompt=settings.prompt,
        max_new_tokens=settings.max_new_tokens,
        quantize=settings.quantize,
    )
    model = resolve(model_config, "float32", notify=notify)
    if model.family not in TRAINABLE:
        raise ModelError(
            f"--model {shown(settings.name)}: a {model.family} model cannot be trained here; {', '.join(TRAINABLE)} can"
        )
    if settings.keep_adapter and model.adapter is not None:
        raise ModelError(
            f"--keep-adapter: {shown(settings.name)} is an adapter itself, and an adapter of an adapter cannot be"
            " loaded; leave --keep-adapter out"
        )
    if model.spec.variable_size and family_of(model.family).pixels == "fixed":
        raise ModelError(
            f"--model {shown(settings.name)}: cannot be trained here, because only its own image processor can"
            " prepare its images; save it with one that resizes to one size"
        )
    return model


def _read_pairs(out: Directory) -> Pairs:
    """Return the pairs that an earlier start has fixed."""
    facts = out.read_json(PAIRS_FILE)
    tables = {name: out.read_table(f"pairs/{name}.parquet") for name in facts["splits"]}
    return Pairs(
        tables, facts["skipped"], facts["examples"], facts["truncated_captions"], facts["listed"], facts.get("rows", 0)
    )


def _examine(setup: TrainSetup, listed: list[pa.Table], engine: TrainEngine, progress: TrainProgress) -> Pairs:
    """Return the usable pairs among those listed, split, after writing them to OUT/pairs."""
    config, out, model = setup.config, setup.out, setup.model
    total, num_examined = sum(map(len, listed)), 0

    def with_progress(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        nonlocal num_examined
        for table in tables:
            num_examined += len(table)
            progress.show_status(f"examined {num_examined:,} of {counted(total, 'pair')}")
            yield table

    progress.show_status(f"examining {counted(total, 'pair')}")
    examine = Examine(setup.sources, model, setup.pixel_cache)
    pairs = make_pairs(config.data, with_progress(engine.map_tables(examine, listed)), config.training.seed)
    for name, table in pairs.tables.items():
        out.write_table(f"pairs/{name}.parquet", table)
    splits = [name for name in SPLITS if name in pairs.tables]
    out.write_json(PAIRS_FILE, {**pairs.counts(), "splits": splits, "fingerprint": pairs.fingerprint})
    return pairs


def _epoch_size(config: TrainConfig, pairs: Pairs) -> int:
    """Return the number of pairs in an epoch: images, or captions where each caption is a pair of its own."""
    table = pairs.tables["train"]
    if config.data.caption_choice != "all":
        return len(table)
    return sum(len(captions) for captions in table["reference_captions"].to_pylist())


def _notify_pairs(pairs: Pairs) -> None:
    sizes = ", ".join(f"{len(table):,} {name}" for name, table in pairs.tables.items())
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in pairs.skipped.items())
    in_rows = f" in {counted(pairs.num_rows, 'row')}" if pairs.num_rows > pairs.num_listed else ""
    notify(f"{counted(pairs.num_listed, 'image')}{in_rows}: {sizes}" + (f"; left out: {skipped}" if skipped else ""))
    if pairs.num_truncated:
        notify(f"cutting {counted(pairs.num_truncated, 'caption')} longer than the model allows")


def _push(config: TrainConfig, out: Directory) -> None:
    if config.output.push_to_hub:
        from captioner.training.hub import push_to_hub

        notify(f"uploaded to {push_to_hub(out, str(config.output.hub_model_id))}")


def _notify_result(config: TrainConfig, result: dict[str, Any]) -> None:
    for name, figures in result["measured"].items():
        wer, baseline = figures["wer"], figures["shuffled_wer"]
        if wer is not None:
            shuffled = "" if baseline is None else f" (captions shuffled {baseline:.3f})"
            notify(f"WER {wer:.3f} on {counted(figures['num_pictures'], f'{name} image')}{shuffled}")
    before = result["before"]["wer"]
    if before is not None:
        notify(f"before training it was {before:.3f} on the eval images")
    prompt = f"; caption with the same --prompt {config.model.prompt!r}" if config.model.prompt else ""
    notify(f"the model: {shown(config.output.path).rstrip('/')}/model{prompt}")
