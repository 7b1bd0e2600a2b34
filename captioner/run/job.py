"""A run on one table, from the first check to the last count: what both kinds of pipeline share.

Everything that can be known to be wrong is said here, before a worker starts.
"""

from __future__ import annotations

import glob
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from captioner.config import CaptionConfig, SourceConfig
from captioner.data import Chunk, Receipt, Source
from captioner.errors import OutputError, UsageError
from captioner.files import is_uri, local_path, shown
from captioner.models import ModelRef, resolve, weights_bytes
from captioner.run.fingerprint import bind, facts_of, rebind
from captioner.run.selector import make_recaption_plan, parse_selector
from captioner.sources import open_source
from captioner.starter.scenes import describes_scene
from captioner.steps import Work
from captioner.store.plan import compare_with_source, make_plan, read_planned
from captioner.store.publish import remove_merged_chunks
from captioner.store.replan import make_retry_plan
from captioner.store.table import CaptionsTable, Plan, create_table, open_table, table_exists

ROWS_PER_CHUNK = 512
CHUNK_PIXEL_BYTES = 80_000_000  # 512 images of 224 x 224; larger inputs make smaller chunks
# Where images keep their own sizes, few are as large as they may be, and the device wants whole batches.
OWN_SIZES_CHUNK_BYTES = 400_000_000
# A chunk is what a kill can cost. A large model without a GPU captions a few images a second: its chunks are small.
ROWS_PER_CHUNK_SLOW = 64
LARGE_MODEL_BYTES = 50_000_000
MODES = ("overwrite", "only", "retry_failed", "extend")  # of a start; some exclude each other
# Above this many images a finished listing is not compared with the source at every start: it would take minutes.
COMPARE_UP_TO = 1_000_000
STARTER_NOTE = (
    "the starter model knows rendered scenes only: its captions of these images mean nothing; "
    "give --model a model of your own or a hub id"
)

Say = Callable[[str], None]


class Engine(Protocol):
    """Where chunks are captioned: this process, or a Ray cluster."""

    def start(self) -> None:
        """Begin to start what takes seconds, and do not wait for it."""
        ...

    def device(self) -> str:
        """The kind of device that captions: "cpu", "cuda", ...; connects where that is needed."""
        ...

    def slots(self) -> dict[str, float]:
        """How many of "decode", "device" and "write" work at once."""
        ...

    def caption_chunks(self, work: Work, chunks: list[Chunk]) -> Iterator[Receipt]:
        """Caption and commit the chunks, in any order; one receipt for each."""
        ...


@dataclass
class Job:
    """An open run: the table, what is still to be done, and the record that becomes run.json."""

    config: CaptionConfig
    table: CaptionsTable
    source: Source
    say: Say
    device: Callable[[], str]
    run_id: str
    work: Work | None = None
    started: float = field(default_factory=time.perf_counter)
    notes: list[str] = field(default_factory=list)

    def generations(self) -> Iterator[Plan]:
        """Every plan with work left, oldest first; then one of what --retry-failed or --only mean."""
        yield from self.table.open_plans()
        if self.config.output.retry_failed and not self.config.output.plan_only:
            retry = make_retry_plan(self.table)
            if retry is None:
                self.say("nothing to retry: no image has failed")
            else:
                self.say(f"retrying {retry.num_rows:,} failed images")
                yield retry
        if self.config.output.only:
            yield from self._weak(self.config.output.only)

    def _weak(self, only: str) -> Iterator[Plan]:
        """A generation of the rows that --only chooses; from then on the table is bound to this model."""
        assert self.work is not None
        model = self.work.model
        size = _rows_per_chunk(model, self.device)
        plan, chosen = make_recaption_plan(self.table, parse_selector(only), model.fingerprint, facts_of(model), size)
        if chosen.settled:
            self.say(f"{chosen.settled:,} more match --only, but a person settled their text")
        if plan is None:
            self.say("nothing to recaption: --only matches no caption that another model made")
            return
        self.say(f"recaptioning {plan.num_rows:,} images with {model.name}")
        self.table = rebind(self.table)
        self.work = replace(self.work, table=self.table)
        yield plan

    def missing_chunks(self, plan: Plan) -> list[Chunk]:
        """The chunks of a plan that are neither committed nor published."""
        done = self.table.committed_chunks(plan.generation)
        published = self.table.published_parts() if plan.founds_parts else set()
        return [chunk for chunk in plan.chunks() if chunk.part not in published and chunk.chunk_id not in done]


def open_job(config: CaptionConfig, engine: Engine, say: Say) -> Job:
    """Check the settings, open source, model and table, and bring the plan up to date. Raises CaptionerError."""
    _check_settings(config)
    config = _with_absolute_source(config)
    started = time.perf_counter()
    model = None if config.output.plan_only else resolve(config.model, None, announce=say)
    table = _existing_table(config)
    source_config = config.source if table is None else _planned_source(config, table)
    source = open_source(source_config)
    if model is not None and _may_have_work(config, table):
        engine.start()
    if table is None:
        settings = config.source.model_dump() | {"path": shown(config.source.path)}
        table = create_table(config.output.path, settings, source.kept_fields(), config.output.overwrite)
    else:
        table.directory.sweep("")
        remove_merged_chunks(table)
    job = Job(config, table, source, say, engine.device, _new_run_id(), started=started)
    _bring_plan_up_to_date(job, model)
    if model is not None:
        job.table, model = bind(job.table, config, model, engine.device)
        job.work = Work(
            job.table,
            source,
            source_config.max_pixels,
            model,
            job.run_id,
            source_config.decode_timeout,
            read_concurrency=config.cluster.read_concurrency,
            dedupe=not config.output.no_dedupe,
            device=config.model.device,
        )
        say(model.told)
        if model.name == "starter" and not _holds_scenes(job.table):
            job.notes.append(STARTER_NOTE)
            say(STARTER_NOTE)
    return job


def _check_settings(config: CaptionConfig) -> None:
    if not config.source.path:
        raise UsageError("no SOURCE given; name a folder, tar, Parquet file, dataset or manifest")
    if not config.output.path:
        raise UsageError("no OUT given; name the directory for the captions table")
    wanted = [f"--{name.replace('_', '-')}" for name in MODES if getattr(config.output, name)]
    if len(wanted) > 1 and not {"--overwrite", "--only"}.isdisjoint(wanted):
        raise UsageError(f"{wanted[0]} and {wanted[1]} exclude each other; give one of them")
    if config.output.only is not None:
        if config.output.plan_only:
            raise UsageError("--only and --plan-only exclude each other; give one of them")
        parse_selector(config.output.only)


def _with_absolute_source(config: CaptionConfig) -> CaptionConfig:
    """A local SOURCE as an absolute path: a resume from another folder means the same images."""
    path = config.source.path
    if is_uri(path) or not (os.path.exists(local_path(path)) or glob.has_magic(path)):
        return config  # a store, a hub id, or nothing: `open_source` tells
    source = config.source.model_copy(update={"path": local_path(path)})
    return config.model_copy(update={"source": source})


def _existing_table(config: CaptionConfig) -> CaptionsTable | None:
    if table_exists(config.output.path) and not config.output.overwrite:
        table = open_table(config.output.path)
        if config.output.only and table.info["model"] is None:
            raise OutputError(f"--only: {shown(config.output.path)} holds no captions yet; run without --only first")
        return table
    flag = next((f"--{name.replace('_', '-')}" for name in MODES[1:] if getattr(config.output, name)), None)
    if flag:
        raise OutputError(f"{flag}: {shown(config.output.path)} holds no captions table yet; run without {flag} first")
    return None


def _may_have_work(config: CaptionConfig, table: CaptionsTable | None) -> bool:
    """Whether workers may be needed: a table that is finished needs none."""
    output = config.output
    return table is None or output.extend or output.retry_failed or bool(output.only) or bool(table.open_plans())


def _planned_source(config: CaptionConfig, table: CaptionsTable) -> SourceConfig:
    """The source as it was planned. What may differ: limits of decoding, and with --extend which images are taken."""
    planned = SourceConfig.model_validate(table.info["source"])
    free = {"max_pixels", "decode_timeout"} | ({"include", "exclude", "limit"} if config.output.extend else set())
    for name in SourceConfig.model_fields:
        before, now = getattr(planned, name), getattr(config.source, name)
        now = shown(now) if name == "path" else now
        if name not in free and before != now:
            raise OutputError(
                f"{shown(config.output.path)} was planned with source.{name}={before!r}, now it is {now!r}; "
                "give the same, another OUT, or --overwrite"
            )
    return config.source


def _bring_plan_up_to_date(job: Job, model: ModelRef | None) -> None:
    plans, config = job.table.plans(), job.config
    if plans and not config.output.extend:
        _tell_what_changed(job, sum(plan.num_rows for plan in plans if plan.founds_parts))
        return
    limits = (_rows_per_chunk(model, job.device), config.output.rows_per_file)
    teller = _ListingTeller(job.say)
    started = time.perf_counter()
    plan = make_plan(job.table, job.source, config.source, *limits, on_progress=teller)
    if plan is None:
        job.say("nothing to add: every image of the source is in the plan")
        return
    ignored = f", {plan.num_ignored:,} other files passed over" if plan.num_ignored else ""
    seconds = time.perf_counter() - started
    job.say(f"planned {plan.num_rows:,} images in {plan.num_chunks:,} chunks{ignored} in {seconds:.1f} s")


def _tell_what_changed(job: Job, planned: int) -> None:
    if job.config.source.limit is not None:
        return
    if planned > COMPARE_UP_TO:
        job.notes.append(f"the source was not compared with the plan of {planned:,} images; --extend lists it again")
        return
    change = compare_with_source(job.table, job.source, job.config.source)
    if change.num_new or change.num_gone:
        job.notes.append(
            f"the source has changed since it was planned: {change.num_new:,} new images (add them with --extend), "
            f"{change.num_gone:,} gone; going on with the plan"
        )
        job.say(job.notes[-1])


def _holds_scenes(table: CaptionsTable) -> bool:
    """Whether the first images are rendered scenes, by their references."""
    first = next(table.plans()[0].chunks())
    known = read_planned(table, first)["reference_captions"].to_pylist()
    return all(captions and all(describes_scene(caption) for caption in captions) for captions in known)


def _rows_per_chunk(model: ModelRef | None, device: Callable[[], str]) -> int:
    if model is None:
        return ROWS_PER_CHUNK
    slow = weights_bytes(model) > LARGE_MODEL_BYTES and device() == "cpu"
    limit = OWN_SIZES_CHUNK_BYTES if model.spec.own_sizes else CHUNK_PIXEL_BYTES
    fitting = limit // model.spec.max_bytes
    return max(1, min(ROWS_PER_CHUNK_SLOW if slow else ROWS_PER_CHUNK, fitting))


def _new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


class _ListingTeller:
    """Says how far a long listing has come, every few seconds."""

    def __init__(self, say: Say, every: float = 5.0) -> None:
        self._say, self._every, self._last = say, every, time.monotonic()

    def __call__(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._say(f"listing: {rows:,} images so far")
