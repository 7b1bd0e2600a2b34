"""Open a run on one table: check the settings, plan the images, bind the table to a model.

Every error that can be known before a worker starts is raised here.
"""

from __future__ import annotations

import glob
import json
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

import pyarrow as pa

from captioner.config import (
    CaptionConfig,
    OutputConfig,
    SourceConfig,
    check_endpoint_settings,
    check_local_settings,
)
from captioner.console.phases import phase
from captioner.console.text import counted
from captioner.data import Chunk, Receipt, Source
from captioner.errors import CaptionerError, DamagedFileError, OutputError, UsageError
from captioner.files import is_uri, local_path, shown
from captioner.models import ModelRef, resolve, weights_bytes
from captioner.models.placement import check_spread
from captioner.run.changed import COMPARE_UP_TO, find_changed, refreshed
from captioner.run.fingerprint import bind, facts_of, rebind
from captioner.run.question_checks import check_columns_of_questions, check_prompt_columns
from captioner.run.selector import ReadReviews, make_recaption_plan, no_reviews, parse_selector
from captioner.sources import check_exists, describe, open_source
from captioner.sources.splits import DEFAULT as DEFAULT_SPLIT
from captioner.starter.scenes import describes_scene
from captioner.steps import Work
from captioner.store.creating import (
    complete_overwrite,
    create_table,
    discard_new_table,
    is_in_place,
    put_in_place,
    table_exists,
)
from captioner.store.plan import compare_with_source, make_plan, notes_of, read_planned
from captioner.store.publish import missing_chunks, remove_merged_chunks
from captioner.store.repair import restore_table
from captioner.store.replan import make_retry_plan, num_kept
from captioner.store.table import CaptionsTable, Plan, open_table
from captioner.store.verify import count_rows

ROWS_PER_CHUNK = 512
CHUNK_PIXEL_BYTES = 80_000_000  # 512 images of 224 x 224; larger inputs make smaller chunks
# Of variable-size images few have the maximum size, and the device should get whole batches.
VARIABLE_SIZE_CHUNK_BYTES = 400_000_000
# A kill loses at most a chunk of work. A large model without a GPU captions a few images per second: small chunks.
ROWS_PER_CHUNK_SLOW = 64
LARGE_MODEL_BYTES = 50_000_000
MODES = ("overwrite", "only", "retry_failed", "extend")  # fields of OutputConfig; some exclude each other
COMPARING = "comparing the source with the plan"  # a phase
STARTER_NOTE = (
    "the starter model was trained on rendered scenes only: its captions of other images are meaningless; "
    "give --model your own model or a hub id"
)

LACKING = (
    "the last parts of the plan of an --extend may be lost: give --extend with the selection of images it had, so that "
    "the source is compared with the plan"
)
NO_LOGPROBS = "the model server gives no log-probabilities: logprob_mean is null, and no caption counts as uncertain"

Notify = Callable[[str], None]


class Engine(Protocol):
    """What captions chunks: this process, or a Ray cluster."""

    def start(self) -> None:
        """Begin to start what takes seconds, and do not wait for it."""
        ...

    def device(self) -> str:
        """The kind of device that captions: "cpu", "cuda", ...; connects where that is needed."""
        ...

    def slots(self) -> dict[str, float]:
        """How many of "decode", "device" and "write" work at once."""
        ...

    def caption_chunks(self, work: Work, chunks: list[Chunk]) -> Generator[Receipt, None, None]:
        """Caption and commit the chunks, in any order; one receipt for each."""
        ...


@dataclass(frozen=True)
class Planned:
    """A table whose plan is up to date with its source.

    `config`: with a local SOURCE as an absolute path. `notes`: what a person should know about the plan.
    """

    config: CaptionConfig
    table: CaptionsTable
    source: Source
    notes: list[str] = field(default_factory=list)


@dataclass
class Job:
    """A run that can caption: the work for its workers, and what goes into run.json."""

    config: CaptionConfig
    work: Work
    rows_per_chunk: Callable[[], int]
    notify: Notify
    started: float
    notes: list[str] = field(default_factory=list)
    read_reviews: ReadReviews = no_reviews

    @property
    def table(self) -> CaptionsTable:
        return self.work.table

    def generations(self) -> Iterator[Plan]:
        """Yield every plan with missing rows, oldest first; then that of --retry-failed or --only."""
        yield from self.table.open_plans()
        if self.config.output.retry_failed:
            retry = make_retry_plan(self.table, self._refresh)
            if retry is None:
                self.notify("nothing to retry: no image has failed")
            else:
                self.notify(self._retry_message(retry))
                yield retry
        if self.config.output.extend:
            with phase(COMPARING, self.notify):
                changed = find_changed(self.table, self.work.source, compare_up_to=None)
            retry = make_retry_plan(self.table, self._refresh, changed.indices)
            if retry is not None:
                self.notify(f"captioning {counted(retry.num_rows, 'changed image')} again")
                yield retry
        if self.config.output.only:
            yield from self._recaption(self.config.output.only)

    def _retry_message(self, plan: Plan) -> str:
        """Return what a plan of --retry-failed captions or asks again, as a line for the user."""
        counts = count_rows(self.table, whole_files=False)
        without = ", ".join(f"{count:,} without {name}" for name, count in counts.failed_answers.items())
        captioned = plan.num_rows - counts.failed
        failed = [counted(counts.failed, "failed image")] if counts.failed or not without else []
        unanswered = [f"{counted(captioned, 'image')} without an answer ({without})"] if without else []
        return f"retrying {' and '.join(failed + unanswered)}"

    def _refresh(self, rows: pa.Table, error_codes: list[str | None]) -> pa.Table:
        return refreshed(self.table, self.work.source, rows, error_codes)

    def _recaption(self, only: str) -> Iterator[Plan]:
        """Plan the rows that --only selects; from then on the table belongs to this model."""
        model, selector = self.work.model, parse_selector(only)
        plan, selection = make_recaption_plan(
            self.table,
            selector,
            model.fingerprint,
            facts_of(model),
            self.rows_per_chunk(),
            self.read_reviews(self.table.directory),
            self._refresh,
        )
        if selection.settled:
            self.notify(f"{selection.settled:,} more match --only, but have been reviewed")
        if plan is None:
            self.notify("nothing to recaption: --only matches no caption of another model")
            return
        self.notify(f"recaptioning {counted(plan.num_rows, 'image')} with {model.name}")
        self.work = replace(self.work, table=rebind(self.table))
        yield plan
        if number := num_kept(self.table, plan):  # it is published now
            keeps = "keeps its" if number == 1 else "keep their"
            self.notes.append(f"{counted(number, 'image')} that {model.name} could not caption {keeps} caption")
            self.notify(self.notes[-1])

    def missing_chunks(self, plan: Plan) -> list[Chunk]:
        """Return the chunks of a plan that are neither committed nor published."""
        return missing_chunks(self.table, plan)


def open_job(config: CaptionConfig, engine: Engine, notify: Notify, read_reviews: ReadReviews = no_reviews) -> Job:
    """Plan the images and open a run that captions them. Raises CaptionerError.

    `read_reviews`: reads the decisions that --only needs.
    """
    check_settings(config)
    started = time.perf_counter()
    model = resolve(config.model, None, notify=notify)
    check_columns_of_questions(model, config.source)
    check_spread(model, config.cluster)
    rows_per_chunk = partial(_rows_per_chunk, model, engine)
    planned = _plan(config, notify, rows_per_chunk, engine.start)
    table, model = _bind_in_place(planned.table, config, model, engine)
    work = Work(
        table,
        planned.source,
        config.source.max_pixels,
        model,
        _new_run_id(),
        config.source.decode_timeout,
        read_concurrency=config.cluster.read_concurrency,
        max_file_size=config.source.max_file_size,
        dedupe=not config.output.no_dedupe,
        device=config.model.compute_on,
        num_gpus=config.cluster.gpus_for_weights,
    )
    notify(model.summary)
    job = Job(planned.config, work, rows_per_chunk, notify, started, planned.notes, read_reviews)
    if model.endpoint and not model.endpoint.logprobs:
        job.notes.append(NO_LOGPROBS)
    if model.name == "starter" and not _holds_scenes(table):
        job.notes.append(STARTER_NOTE)
        notify(STARTER_NOTE)
    return job


def _bind_in_place(
    table: CaptionsTable, config: CaptionConfig, model: ModelRef, engine: Engine
) -> tuple[CaptionsTable, ModelRef]:
    """Return what `bind` does; a table that replaces another one takes its place when nothing has failed."""
    try:
        check_prompt_columns(model, table)
        table, model = bind(table, config, model, engine.device)
        if not is_in_place(table):
            engine.device()  # which connects
    except CaptionerError:
        discard_new_table(table)
        raise
    return put_in_place(table), model


def plan_images(config: CaptionConfig, notify: Notify) -> Planned:
    """List the source into OUT/plan, without a model. Raises CaptionerError."""
    check_settings(config)
    planned = _plan(config, notify, lambda: ROWS_PER_CHUNK)
    return replace(planned, table=put_in_place(planned.table))


def _plan(
    config: CaptionConfig, notify: Notify, rows_per_chunk: Callable[[], int], on_work: Callable[[], None] = lambda: None
) -> Planned:
    """Open table and source, and bring the plan up to date. `on_work` is called where workers may be needed.

    A table that replaces another one is not in place yet.
    """
    config = _with_absolute_source(config)
    table = _existing_table(config)
    replan = table is not None and _may_select_anew(config, table)
    if replan:
        notify("no image is captioned yet: planning again with the changed --include and --exclude")
        table = None
    if table is not None and _belongs_to_no_source(config, table):
        replan, table = True, None
    if table is not None:
        _check_same_source(config, table)
        _check_same_files(config.output, table)
    with phase(f"opening {shown(config.source.path)}", notify):
        source = open_source(config.source)
    notify(f"{shown(config.source.path)} is {describe(source)}")
    if table is not None:
        with phase(f"checking the plan in {shown(config.output.path)}", notify):
            for problem in restore_table(table, source):
                notify(problem)
    if _may_have_work(config, table):
        on_work()
    if table is None:
        settings = config.source.model_dump() | {"path": shown(config.source.path)}
        output = config.output
        table = create_table(
            output.path, settings, source.kept_fields(), output.overwrite or replan, output.rows_per_file
        )
    else:
        table.directory.sweep("")
        remove_merged_chunks(table)
    planned = Planned(config, table, source)
    try:
        _bring_plan_up_to_date(planned, notify, rows_per_chunk)
    except CaptionerError:
        discard_new_table(table)
        raise
    planned.notes.extend(notes_of(table.plans()))
    return planned


def check_settings(config: CaptionConfig) -> None:
    """Raise UsageError for settings that are missing or exclude each other, SourceError where SOURCE is not there.

    Before the model is looked for: SOURCE is the first thing that a person writes.
    """
    if not config.source.path:
        raise UsageError("no SOURCE given; name a folder, tar, Parquet file, dataset or manifest")
    if not config.output.path:
        raise UsageError("no OUT given; name the directory for the captions table")
    modes = [f"--{name.replace('_', '-')}" for name in MODES if getattr(config.output, name)]
    if len(modes) > 1 and not {"--overwrite", "--only"}.isdisjoint(modes):
        raise UsageError(f"{modes[0]} and {modes[1]} exclude each other; give one of them")
    if config.output.retry_failed and config.output.plan_only:
        raise UsageError("--retry-failed and --plan-only exclude each other; give one of them")
    if config.output.only is not None:
        if config.output.plan_only:
            raise UsageError("--only and --plan-only exclude each other; give one of them")
        parse_selector(config.output.only)
    if config.check.stop_early and config.check.max_wer is None:
        raise UsageError("--stop-early: has no effect without --max-wer; add that, such as --max-wer 0.8")
    is_shared = config.cluster.gpus_per_worker is not None and config.cluster.gpus_per_worker < 1
    check_local_settings(config.cluster, *(["gpus_per_worker"] if is_shared else []))
    check_endpoint_settings(config.model)
    check_exists(config.source.path)


def _with_absolute_source(config: CaptionConfig) -> CaptionConfig:
    """Make a local SOURCE an absolute path, so that a resume from another folder means the same images."""
    path = config.source.path
    if is_uri(path) or not (os.path.exists(local_path(path)) or glob.has_magic(path)):
        return config  # a store, a hub id, or nothing: `open_source` finds out
    source = config.source.model_copy(update={"path": local_path(path)})
    return config.model_copy(update={"source": source})


def _existing_table(config: CaptionConfig) -> CaptionsTable | None:
    complete_overwrite(config.output.path)
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
    """Return whether workers may be needed: a finished table needs none."""
    output = config.output
    return table is None or output.extend or output.retry_failed or bool(output.only) or bool(table.open_plans())


def _may_select_anew(config: CaptionConfig, table: CaptionsTable) -> bool:
    """Return whether only --include or --exclude differ from a plan of which no image is captioned yet."""
    names = ("include", "exclude")
    planned = SourceConfig.model_validate(table.info["source"])
    changes = {name: getattr(planned, name) for name in names}
    if config.output.extend or all(getattr(config.source, name) == value for name, value in changes.items()):
        return False
    if table.has_captions():
        return False
    same = config.model_copy(update={"source": config.source.model_copy(update=changes)})
    _check_same_source(same, table)
    return True


def _belongs_to_no_source(config: CaptionConfig, table: CaptionsTable) -> bool:
    """Return whether another source was never listed to its end for this table, so that this one may have it."""
    try:
        if table.plans() or table.published_parts():
            return False
    except DamagedFileError:
        return False
    try:
        _check_same_source(config, table)
    except OutputError:
        return True
    return False


def _check_same_source(config: CaptionConfig, table: CaptionsTable) -> None:
    """Raise OutputError where the table was planned with another source.

    The limits of decoding may differ, and with --extend the selection of images.
    """
    planned = SourceConfig.model_validate(table.info["source"])
    selection = {"include", "exclude", "limit"}
    may_differ = {"max_pixels", "max_file_size", "decode_timeout"} | (selection if config.output.extend else set())
    for name in SourceConfig.model_fields:
        before, now = getattr(planned, name), getattr(config.source, name)
        now = shown(now) if name == "path" else now
        before, now = (value or DEFAULT_SPLIT if name == "split" else value for value in (before, now))
        if name not in may_differ and before != now:
            raise OutputError(
                f"{shown(config.output.path)} was created {_difference(name, before, now)}; give the same, "
                f"{'--extend to add images, ' if name in selection else ''}another OUT, or --overwrite"
            )


def _difference(name: str, before: object, now: object) -> str:
    """Return in words how a setting of SOURCE differs, such as "with --limit 2, not without"."""
    if name == "path":
        return f"from {before!r}, not {now!r}"
    flag = "--as" if name == "take_as" else f"--{name.replace('_', '-')}"
    if not before:
        return f"without {flag}, not with {now!r}"
    return f"with {flag} {before!r}, not {repr(now) if now else 'without'}"


def _check_same_files(output: OutputConfig, table: CaptionsTable) -> None:
    """Raise OutputError where the files of the table have another size than is asked for. New ones may have any."""
    before, now = table.info.get("rows_per_file"), output.rows_per_file
    if before not in (None, now) and not output.extend and now != OutputConfig().rows_per_file:
        raise OutputError(
            f"{shown(output.path)} was created with --rows-per-file {before}, not {now}; leave it out, or give another "
            "OUT, or --overwrite"
        )


def _bring_plan_up_to_date(planned: Planned, notify: Notify, rows_per_chunk: Callable[[], int]) -> None:
    plans, config = planned.table.plans(), planned.config
    num_planned = sum(plan.num_rows for plan in plans if plan.adds_parts)
    lacking = [plan for plan in plans if plan.may_lack_images]
    # What an --extend selected is known to nobody else.
    list_again = bool(lacking) and not any(plan.generation for plan in lacking)
    if lacking and not list_again and not config.output.extend:
        planned.notes.append(LACKING)
        notify(LACKING)
    if plans and not config.output.extend and not list_again:
        _note_changes(planned, notify, num_planned)
        return
    limit = config.source.limit
    if limit is not None and list_again and not config.output.extend:
        limit = max(0, limit - num_planned)
    elif limit is not None and (num_open := _num_rows_of_open_extensions(planned.table)):
        limit = max(0, limit - num_open)
        if not limit:  # the same command as before, which was killed
            notify(f"{counted(num_open, 'image')} of an --extend are planned already; continuing with them")
            return
    started = time.perf_counter()
    max_rows = rows_per_chunk()
    with phase("listing images", notify) as listing:

        def show(text: str) -> None:
            listing.text = text

        selected = {name: getattr(config.source, name) for name in ("include", "exclude", "limit")}
        plan = make_plan(
            planned.table,
            planned.source,
            max_rows,
            config.output.rows_per_file,
            limit,
            on_progress=show,
            selection=json.dumps(selected),
        )
    for incomplete in lacking:  # every image of the source is planned now
        planned.table.write_plan(replace(incomplete, may_lack_images=False))
    if plan is None:
        notify("nothing to add: every image of the source is in the plan")
        return
    seconds = time.perf_counter() - started
    images, chunks = counted(plan.num_rows, "image"), counted(plan.num_chunks, "chunk")
    notify(f"planned {images} in {chunks}{_skipped(plan)} in {seconds:.1f} s")
    for note in plan.notes:
        notify(note)


def _num_rows_of_open_extensions(table: CaptionsTable) -> int:
    return sum(plan.num_rows for plan in table.open_plans() if plan.kind == "extend")


def _skipped(plan: Plan) -> str:
    """Return which files were skipped: few by their names, many by their suffixes."""
    if not plan.num_ignored:
        return ""
    kinds = sorted(plan.ignored_kinds.items(), key=lambda item: -item[1])[:5]
    by_kind = ", ".join(f"{number:,} {kind!r}" for kind, number in kinds)
    names = ", ".join(map(repr, plan.ignored_examples))
    files = counted(plan.num_ignored, "file that is not an image", "files that are not images")
    return f", skipped {files} ({names if plan.num_ignored <= 3 else by_kind})"


def _note_changes(planned: Planned, notify: Notify, num_planned: int) -> None:
    """Note how the source has changed since it was planned."""
    if num_planned > COMPARE_UP_TO:
        planned.notes.append(
            f"the source was not compared with the plan of {counted(num_planned, 'image')}; --extend lists it again"
        )
        return
    with phase(COMPARING, notify):
        changed = find_changed(planned.table, planned.source).note
    if changed and not (planned.config.output.retry_failed or planned.config.output.only):
        planned.notes.append(changed)
        notify(changed)
    if planned.config.source.limit is not None:
        return
    with phase(COMPARING, notify):
        change = compare_with_source(planned.table, planned.source)
    if change.num_new or change.num_gone:
        planned.notes.append(
            f"the source has changed since it was planned: {counted(change.num_new, 'new image')} (--extend adds "
            f"new images), {change.num_gone:,} removed; continuing with the plan"
        )
        notify(planned.notes[-1])


def _holds_scenes(table: CaptionsTable) -> bool:
    """Return whether the first images are rendered scenes, by their reference captions."""
    first = next(table.plans()[0].chunks())
    references = read_planned(table, first)["reference_captions"].to_pylist()
    return all(captions and all(describes_scene(caption) for caption in captions) for captions in references)


def _rows_per_chunk(model: ModelRef, engine: Engine) -> int:
    if model.endpoint:
        return model.endpoint.rows_per_chunk
    slow = weights_bytes(model) > LARGE_MODEL_BYTES and engine.device() == "cpu"
    max_bytes = VARIABLE_SIZE_CHUNK_BYTES if model.spec.variable_size else CHUNK_PIXEL_BYTES
    return max(1, min(ROWS_PER_CHUNK_SLOW if slow else ROWS_PER_CHUNK, max_bytes // model.spec.max_bytes))


def _new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
