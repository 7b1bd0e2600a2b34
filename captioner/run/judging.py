"""Judge the captions of a finished table by a model that embeds images and texts (CLIP, SigLIP).

    for each part of captions/ that is not judged yet, chunk by chunk:
        read -> decode -> score
    write OUT/checks/judge/part-*.parquet, one row for each caption; then OUT/checks/judge.json

Images are read again from the source, through the plan. One that is not what was captioned is counted and named, and
its caption has no score. A part that is written is not judged again until its captions change.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import (
    ClusterConfig,
    JudgeConfig,
    JudgeTableConfig,
    SourceConfig,
    check_endpoint_settings,
    check_local_settings,
)
from captioner.console.phases import phase
from captioner.console.progress import Progress
from captioner.console.stopping import notify, stoppable
from captioner.console.text import counted
from captioner.data import CAPTIONS_SCHEMA, STATUS_OK, Chunk
from captioner.errors import DamagedFileError, UsageError
from captioner.files import absolute, shown
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import ModelRef
from captioner.models.dual_encoder import Encoder, open_encoder, resolve_judge
from captioner.run.prefetch import one_ahead
from captioner.run.quality import references_of, remember_references
from captioner.scoring.clip_score import PREFIX, Floats, compare_with_images, ref_clip_score
from captioner.scoring.eligible_rows import no_match_message
from captioner.scoring.judgements import JUDGE_FILE, JUDGE_SCHEMA, judge_name
from captioner.scoring.references import References, read_references
from captioner.scoring.sample import LowestRanks
from captioner.sources import reopen_source
from captioner.steps import ChunkRows, ReadChunk, Work, decode, read_rows
from captioner.store.lock import sole_writer
from captioner.store.plan import read_planned
from captioner.store.read import read_part
from captioner.store.replan import generation_of_parts, image_ids, without_replan_columns
from captioner.store.table import CaptionsTable, open_table

ROWS = 512  # captions of a chunk: the other images that a caption is compared with are drawn from them
SHOWN = 20  # captions in judge.json
EXAMPLES = 3  # images named for each reason why there is no score
_MADE_BY = b"captioner.judge"  # schema metadata of a part: the model and settings that its scores depend on
_COLUMNS = ["image_id", "status", "caption", "sha256", "reference_captions", "chunk_id", "chunk_row", "created_at"]
# Columns of a decoded chunk beside those of its images.
_CAPTION = [pa.field("caption", pa.string()), CAPTIONS_SCHEMA.field("created_at"), pa.field("captioned", pa.string())]


@dataclass(frozen=True)
class ReferencesFile:
    """Where workers read reference captions, as `read_references` takes it, and the sha256 of what is in it."""

    location: str
    columns: Sequence[str]
    sha256: str


@dataclass(frozen=True)
class JudgeWork:
    """What a worker needs to know. Small and picklable."""

    work: Work
    settings: JudgeConfig
    references: ReferencesFile | None = None  # None: those of the source

    @property
    def made_by(self) -> bytes:
        """What scores depend on besides images and captions."""
        model, settings = self.work.model, self.settings
        parts = [model.sha256, model.settings_sha256, settings.num_others, settings.seed, ROWS]
        return json.dumps([*parts, *([self.references.sha256] if self.references else [])]).encode()


class JudgeEngine(Protocol):
    """Where captions are judged: in this process, or on Ray."""

    def judge_chunks(self, work: JudgeWork, chunks: list[Chunk]) -> Iterator[tuple[Chunk, pa.Table]]:
        """Yield each chunk with its rows of JUDGE_SCHEMA, in any order."""
        ...


class LocalJudgeEngine:
    """The engine of `--local`, without Ray: the next chunk is read and decoded while one is scored."""

    def judge_chunks(self, work: JudgeWork, chunks: list[Chunk]) -> Iterator[tuple[Chunk, pa.Table]]:
        reader = CaptionReader(work)
        with work.work.decoder() as decoder, one_ahead(reader.decode(chunk, decoder) for chunk in chunks) as decoded:
            with phase("loading the model", notify):
                encoder = open_encoder(work.work.model, work.work.device, work.settings.batch_size)
            for rows in decoded:
                yield rows.chunk, score(work, encoder, rows)


class CaptionReader:
    """Reads captions and their images. A chunk is a slice of the captions of a published part: `index` counts ROWS."""

    def __init__(self, work: JudgeWork) -> None:
        self._work, file = work.work, work.references
        ids = partial(image_ids, self._work.table)
        self._references = read_references(file.location, file.columns, ids) if file else None
        self._part, self._captions = -1, pa.table({})  # the part that was read last

    def decode(self, chunk: Chunk, decoder: GuardedDecoder) -> ChunkRows:
        """Return the captions of a chunk with the pixels of their images, see `pixels_of`."""
        if chunk.part != self._part:
            captions = read_captions(self._work.table, chunk.part)
            self._part, self._captions = chunk.part, _with_references(captions, self._references)
        return pixels_of(self._work, self._captions.slice(chunk.index * ROWS, ROWS), decoder, chunk)


def _with_references(captions: pa.Table, references: References | None) -> pa.Table:
    """Return captions with other reference captions than those of the source, where there are some."""
    if references is None:
        return captions
    index, column = captions.column_names.index("reference_captions"), captions.field("reference_captions")
    texts = [references.find(image_id) for image_id in captions["image_id"].to_pylist()]
    return captions.set_column(index, column, pa.array(texts, column.type))


def pixels_of(work: Work, captions: pa.Table, decoder: GuardedDecoder, chunk: Chunk | None = None) -> ChunkRows:
    """Return captions with the pixels of their images, read again. `chunk`: what they are called; not what is read.

    Of an image that cannot be decoded `error_code` says why; `captioned` is the sha256 of what was captioned. Raises
    SourceError where the source is gone.
    """
    started = time.perf_counter()
    planned, chunk = _planned(work.table, captions), chunk or Chunk(0, 0, 0, captions.num_rows)
    raws = read_rows(work, chunk, planned)
    decoded = decode(work, ReadChunk(chunk, planned, raws, time.perf_counter() - started), decoder)
    images = decoded.rows
    for caption_field, name in zip(_CAPTION, ("caption", "created_at", "sha256"), strict=True):
        images = images.append_column(caption_field, captions[name])
    references = images.column_names.index("reference_captions")
    images = images.set_column(references, "reference_captions", captions["reference_captions"])
    return replace(decoded, rows=images)


def image_errors(rows: pa.Table) -> list[str]:
    """Return for each row of `pixels_of` why the image that was captioned is not available; "" where it is."""
    columns = (rows[name].to_pylist() for name in ("error_code", "sha256", "captioned"))
    return [
        code or ("" if digest == captioned else "changed") for code, digest, captioned in zip(*columns, strict=True)
    ]


def read_captions(table: CaptionsTable, part: int) -> pa.Table:
    """Return the rows of a published part that have a caption."""
    plan = next(plan for plan in table.plans() if plan.adds_parts and part in plan.parts)
    rows = read_part(table, plan, part, _COLUMNS)
    return rows.filter(pc.equal(rows["status"], STATUS_OK))


def _planned(table: CaptionsTable, rows: pa.Table) -> pa.Table:
    """Return the planned row of each caption, in order, as the generation that captioned it has it."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, chunk_id in enumerate(rows["chunk_id"].to_pylist()):
        indices[chunk_id].append(index)
    chunk_rows, tables = rows["chunk_row"].to_numpy(), []
    for chunk_id, chunk_indices in indices.items():
        planned = read_planned(table, Chunk.from_id(chunk_id)).take(chunk_rows[chunk_indices])
        tables.append(without_replan_columns(planned))
    order = np.argsort(np.concatenate(list(indices.values())))
    planned = pa.concat_tables([table.replace_schema_metadata() for table in tables], promote_options="default")
    return planned.take(order).combine_chunks()


def score(work: JudgeWork, encoder: Encoder, decoded: ChunkRows) -> pa.Table:
    """Return the rows of JUDGE_SCHEMA of a decoded chunk."""
    rows = decoded.rows
    errors = image_errors(rows)
    scored = np.array([index for index, error in enumerate(errors) if not error], np.int64)
    columns: dict[str, Any] = {name: rows[name] for name in ("image_id", "created_at")} | {"error": errors}
    for name, values in _scores_of(work, encoder, decoded, scored).items():
        column: list[Any] = [None] * len(errors)
        for index, value in zip(scored, values, strict=True):
            column[index] = value
        columns[name] = column
    return pa.table(columns, schema=JUDGE_SCHEMA)


def _scores_of(
    work: JudgeWork, encoder: Encoder, decoded: ChunkRows, indices: npt.NDArray[np.int64]
) -> dict[str, list[Any]]:
    """Return the scores of the captions at `indices`, by column."""
    assert decoded.pixels is not None
    rows, chunk, settings = decoded.rows.take(indices), decoded.chunk, work.settings
    texts = encoder.embed_texts([PREFIX + caption for caption in rows["caption"].to_pylist()])
    seed = (settings.seed, chunk.part, chunk.index)
    images = encoder.embed_images(decoded.pixels[indices])
    scores = compare_with_images(texts, images, rows["sha256"].to_pylist(), settings.num_others, seed)
    has_others = [bool(count) for count in scores.num_others]
    others = [float(mean) if has else None for mean, has in zip(scores.others, has_others, strict=True)]
    own = scores.own.tolist()
    return {
        "clip_score": own,
        "clip_score_others": others,
        "lift": [None if mean is None else score - mean for score, mean in zip(own, others, strict=True)],
        "ref_clip_score": _ref_clip_scores(encoder, own, texts, rows["reference_captions"].to_pylist()),
        "retrieved": [
            bool(is_best) if has else None for is_best, has in zip(scores.retrieved, has_others, strict=True)
        ],
        "num_others": scores.num_others.tolist(),
    }


def _ref_clip_scores(
    encoder: Encoder, own: list[float], texts: Floats, references: list[list[str] | None]
) -> list[float | None]:
    """Return the RefCLIPScore of each caption; None of those without references."""
    flat = encoder.embed_texts([PREFIX + text for image_references in references for text in image_references or []])
    scores: list[float | None] = []
    first = 0
    for index, image_references in enumerate(references):
        last = first + len(image_references or [])
        cosines = (flat[first:last] @ texts[index]).tolist() if last > first else []
        scores.append(ref_clip_score(own[index], cosines) if cosines else None)
        first = last
    return scores


def judge(out: str, config: JudgeTableConfig, engine: JudgeEngine) -> dict[str, Any]:
    """Judge the captions of OUT that are not judged yet, and return the figures of all (judge.json).

    Raises UsageError where OUT is not finished, and CaptionerError as a run does.
    """
    if not config.judge.name:
        raise UsageError("judge needs --model: a CLIP or SigLIP model, such as openai/clip-vit-base-patch32")
    check_endpoint_settings(config.judge)
    check_cluster(config.cluster, "a CLIP or SigLIP model fits one GPU; give 1: more workers judge faster")
    with stoppable(f"progress is saved in {shown(out)}"), sole_writer(out) as check_held:
        table = open_finished(out)
        ref = resolve_judge(config.judge.name, config.judge.revision, notify)
        references = _references_file(table, config.judge)
        work = JudgeWork(open_work(table, config, ref), config.judge, references)
        with phase("looking for captions that are not judged yet", notify):
            counts = {part: read_captions(table, part).num_rows for part in _parts_to_judge(table, work)}
        _judge_parts(work, engine, counts, check_held)
        with phase("summing up", notify):
            figures = summarise(table, work)
        table.directory.write_json(JUDGE_FILE, figures, checksum=True)
        return figures


def check_cluster(cluster: ClusterConfig, on_one_gpu: str) -> None:
    """Raise UsageError for settings of a cluster that judging has no use for. `on_one_gpu`: why not several GPUs."""
    check_local_settings(cluster, "gpus_per_worker")
    if cluster.gpus_for_weights > 1:
        raise UsageError(f"--gpus-per-worker {cluster.gpus_for_weights}: {on_one_gpu}")


def _references_file(table: CaptionsTable, settings: JudgeConfig) -> ReferencesFile | None:
    """Return the references that are given now, or were before; None for those of the source.

    Raises UsageError where none of those given is of an image of the table.
    """
    with phase("reading the references", notify):
        references = references_of(table, settings)
        if references is None:
            remember_references(table, settings)
            return None
        for part in generation_of_parts(table):
            for image_id in read_captions(table, part)["image_id"].to_pylist():
                references.find(image_id)
    if references.unmatched()[0] == len(references.captions):
        raise UsageError(no_match_message(references, table))
    remember_references(table, settings)
    return ReferencesFile(absolute(references.name), list(references.columns), references.sha256)


def open_finished(out: str) -> CaptionsTable:
    """Return the table in OUT. Raises UsageError where its run is not finished."""
    table = open_table(out)
    if table.open_plans():
        raise UsageError(f"{shown(out)} is not finished; run its captioner caption command to the end first")
    return table


def open_work(table: CaptionsTable, config: JudgeTableConfig, model: ModelRef) -> Work:
    """Return what a worker needs to read the images of a table again, at the size that a model wants."""
    source, settings, cluster = SourceConfig.model_validate(table.info["source"]), config.judge, config.cluster
    return Work(
        table=table,
        source=reopen_source(table.info["source"]),
        max_pixels=source.max_pixels,
        model=model,
        run_id="",
        decode_timeout=source.decode_timeout,
        read_concurrency=cluster.read_concurrency,
        max_file_size=source.max_file_size,
        device=settings.device,
    )


def _parts_to_judge(table: CaptionsTable, work: JudgeWork) -> Iterator[int]:
    """Yield the parts whose captions, or some of them, have no scores of this model and these settings."""
    for part in generation_of_parts(table):
        captions = read_captions(table, part).select(["image_id", "created_at"])
        try:
            judged = table.directory.read_table(judge_name(part))
        except DamagedFileError:  # or missing
            yield part
            continue
        is_same_model = (judged.schema.metadata or {}).get(_MADE_BY) == work.made_by
        if not is_same_model or not judged.select(captions.column_names).equals(captions):
            yield part


def _judge_parts(work: JudgeWork, engine: JudgeEngine, counts: dict[int, int], check_held: Any) -> None:
    """Judge parts with so many captions; write each when all its chunks are there."""
    chunks = [
        Chunk(0, part, index, min(ROWS, count - first))
        for part, count in counts.items()
        for index, first in enumerate(range(0, count, ROWS))
    ]
    num_left = Counter(chunk.part for chunk in chunks)
    waiting: dict[int, dict[int, pa.Table]] = defaultdict(dict)
    for part in counts.keys() - num_left.keys():  # without captions
        _write_part(work, part, {})
    if not chunks:
        return
    with Progress(sum(counts.values()), verb="judged") as progress:
        for chunk, rows in engine.judge_chunks(work, chunks):
            check_held()
            waiting[chunk.part][chunk.index] = rows
            if len(waiting[chunk.part]) == num_left[chunk.part]:
                _write_part(work, chunk.part, waiting.pop(chunk.part))
            progress.add(rows.num_rows, rows["clip_score"].null_count)


def _write_part(work: JudgeWork, part: int, chunks: dict[int, pa.Table]) -> None:
    rows = pa.concat_tables([JUDGE_SCHEMA.empty_table(), *(chunks[index] for index in sorted(chunks))])
    rows = rows.replace_schema_metadata({_MADE_BY: work.made_by})
    work.work.table.directory.write_table(judge_name(part), rows)


@dataclass
class _Mean:
    """The mean of a score, and its 95 % interval by the normal approximation."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, column: pa.ChunkedArray) -> None:
        values = column.drop_null().cast(pa.float64()).to_numpy()
        self.count += len(values)
        self.total += float(values.sum())
        self.squares += float((values**2).sum())

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.count < 2 or self.value is None:
            return None
        variance = max(0.0, self.squares / self.count - self.value**2) / (self.count - 1)
        return self.value - 1.96 * math.sqrt(variance), self.value + 1.96 * math.sqrt(variance)


_SCORES = ("clip_score", "clip_score_others", "lift", "ref_clip_score", "retrieved", "num_others")


@dataclass
class _Summary:
    means: dict[str, _Mean] = field(default_factory=lambda: {name: _Mean() for name in _SCORES})
    by_chance: _Mean = field(default_factory=_Mean)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    weakest: LowestRanks[dict[str, Any]] = field(default_factory=lambda: LowestRanks(SHOWN))

    def add(self, judged: pa.Table, captions: pa.Table) -> None:
        """Add a part. `judged`: rows of JUDGE_SCHEMA; `captions`: the rows of the table that they are of."""
        for name, mean in self.means.items():
            mean.add(judged[name])
        self.by_chance.add(pc.divide(1.0, pc.add(pc.cast(judged["num_others"], pa.float64()), 1.0)))
        unscored = judged.filter(pc.not_equal(judged["error"], ""))
        for image_id, error in zip(unscored["image_id"].to_pylist(), unscored["error"].to_pylist(), strict=True):
            self.errors[error] += 1
            if len(self.examples[error]) < EXAMPLES:
                self.examples[error].append(image_id)
        lifts = pc.fill_null(judged["lift"], float("inf")).to_numpy()
        for index in np.argsort(lifts, kind="stable")[:SHOWN].tolist():
            if np.isfinite(lifts[index]):
                row = captions.slice(index, 1).select(["image_id", "caption", "chunk_id", "chunk_row"]).to_pylist()[0]
                scores = judged.slice(index, 1).select(["clip_score", "lift", "retrieved"]).to_pylist()[0]
                self.weakest.offer(round(float(lifts[index]) * 1e6), row["image_id"], row | scores)


def summarise(table: CaptionsTable, work: JudgeWork) -> dict[str, Any]:
    """Return the figures of all judged parts, as judge.json holds them."""
    summary = _Summary()
    for part in generation_of_parts(table):
        summary.add(table.directory.read_table(judge_name(part)), read_captions(table, part))
    means, model = summary.means, work.work.model
    return {
        "model": {"name": model.name, "revision": model.revision, "sha256": model.sha256},
        "num_judged": means["clip_score"].count,
        "not_judged": dict(summary.errors.most_common()),
        "not_judged_examples": dict(summary.examples),
        **{name: means[name].value for name in _SCORES},
        "lift_interval": means["lift"].interval,
        "num_with_references": means["ref_clip_score"].count,
        "retrieved_by_chance": summary.by_chance.value,
        "weakest": list(summary.weakest),
        "generations": [plan.generation for plan in table.plans()],
    }


def summary_lines(figures: dict[str, Any]) -> list[str]:
    """Return the figures as lines for the terminal."""
    if not figures["num_judged"]:
        return ["no caption could be judged", *_unjudged_lines(figures)]
    low, high = figures["lift_interval"] or (None, None)
    interval = "" if low is None else f"   95 % interval {low:.3f} to {high:.3f}"
    rows = [
        ("CLIPScore", f"{figures['clip_score']:.3f} of {counted(figures['num_judged'], 'caption')}"),
        ("on other images", _decimal(figures["clip_score_others"])),
        ("lift", f"{_decimal(figures['lift'])}{interval}"),
        ("RefCLIPScore", f"{_decimal(figures['ref_clip_score'])} of {figures['num_with_references']:,}"),
    ]
    if figures["retrieved"] is not None:
        shares = f"{figures['retrieved']:.1%} (by chance {figures['retrieved_by_chance']:.1%})"
        rows.append(("finds its image", f"{shares} among {figures['num_others']:.0f} others"))
    weakest = [f"  {row['lift']:+.3f}  {row['image_id']}: {row['caption']}" for row in figures["weakest"][:3]]
    return [f"{name:<18}{value}" for name, value in rows] + _unjudged_lines(figures) + ["weakest:", *weakest]


def _unjudged_lines(figures: dict[str, Any]) -> list[str]:
    """Return a line for each reason why captions have no score."""
    examples = figures["not_judged_examples"]
    return [
        f"not judged: {counted(count, 'image')} ({reason}), such as {examples[reason][0]!r}"
        for reason, count in figures["not_judged"].items()
    ]


def _decimal(value: float | None) -> str:
    return "no data" if value is None else f"{value:.3f}"
