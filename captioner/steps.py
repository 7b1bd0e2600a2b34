"""Process one chunk: read, decode, caption, commit. The same functions run in one process and on a cluster."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import SourceConfig
from captioner.console.text import counted, valid_unicode
from captioner.data import (
    CAPTIONS_SCHEMA,
    NO_USAGE,
    PREVIOUS,
    SAMPLES_FIELD,
    STATUS_FAILED,
    STATUS_OK,
    Captioner,
    Captions,
    Chunk,
    ImageBatch,
    Pixels,
    Prompts,
    RawImage,
    Receipt,
    Source,
    Usage,
    error_column,
)
from captioner.errors import ModelError
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import ModelRef
from captioner.models.questions import asked_columns, blank_columns, prompts_of, same_prompts, unanswered
from captioner.run.dedupe import CaptionMemory, find_copies
from captioner.scoring.flags import caption_flags
from captioner.scoring.running_wer import Sample, score_sampled
from captioner.sources.copies import KNOWN_SHA256
from captioner.sources.reading import NOT_YET, ReadLimits, limited_to, read_part, reads_at_once
from captioner.store.plan import read_planned
from captioner.store.previous import with_previous, without_answered
from captioner.store.publish import commit_chunk
from captioner.store.table import CaptionsTable

READ_BYTES = 1 << 30  # of the files of a chunk that are in memory at once; but a single one may be larger
MAX_REASON = 200  # characters of an error_message
ROWS_ELSEWHERE = 16  # rows of other chunks; where no image of a chunk is there, they show whether the source is


@dataclass(frozen=True)
class Work:
    """What a worker needs to know about a run. Small and picklable; models and connections are opened by the worker."""

    table: CaptionsTable
    source: Source
    max_pixels: int
    model: ModelRef
    run_id: str
    decode_timeout: float
    sample: Sample = field(default_factory=dict)  # rows whose captions are scored when they are committed
    trained: frozenset[str] = frozenset()  # sha256 of images the model was trained on, which are not scored
    read_concurrency: int = 32
    max_file_size: int = SourceConfig().max_file_size
    dedupe: bool = True  # byte-equal images are captioned once
    device: str = "auto"  # a --device (see `captioner.models.devices`)
    num_gpus: int = 1  # of a worker, that share the weights

    def new_memory(self) -> CaptionMemory[Caption] | None:
        """Return the memory in which a worker looks up copies; None where every image is captioned."""
        return CaptionMemory() if self.dedupe else None

    def decoder(self) -> GuardedDecoder:
        """Return a decoder for the images of this run, in a child process that is not started yet."""
        return GuardedDecoder(self.model.spec, self.max_pixels, self.decode_timeout)

    def planned_rows(self, chunk: Chunk) -> pa.Table:
        """Return the planned rows of a chunk. Raises DamagedFileError."""
        return read_planned(self.table, chunk)

    def rows_elsewhere(self, chunk: Chunk) -> Iterator[pa.Table]:
        """Yield single planned rows of other chunks, from all over the plan: they show whether the source is there."""
        others = [other for plan in self.table.plans() for other in plan.chunks() if other != chunk]
        for other in others[:: max(1, len(others) // ROWS_ELSEWHERE)]:
            planned = self.planned_rows(other)
            yield planned.slice(planned.num_rows // 2, 1)


@dataclass(frozen=True)
class ReadChunk:
    """The planned rows of a chunk, a RawImage for each, and the seconds spent reading.

    `read_at`: when reading began, in seconds since the epoch: a file that changes after that is not what is captioned.
    """

    chunk: Chunk
    planned: pa.Table
    raws: list[RawImage]
    seconds: float
    read_at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class ChunkRows:
    """A chunk between two steps.

    `rows`: its columns so far. `pixels`: of its images, None once they are captioned. `seconds`: spent in each step.
    `engine`, `device`: what captioned it (see `captioner.models.base`), or "". `usage`: tokens that were counted.
    `read_at`: see ReadChunk.
    """

    chunk: Chunk
    rows: pa.Table
    pixels: Pixels | None
    seconds: dict[str, float]
    engine: str = ""
    device: str = ""
    usage: Usage = NO_USAGE
    read_at: float = field(default_factory=time.time)


def read(work: Work, chunk: Chunk) -> ReadChunk:
    """Read the files of a chunk. Raises SourceError where the source as a whole is at fault."""
    started, read_at = time.perf_counter(), time.time()
    planned = work.planned_rows(chunk)
    raws = read_rows(work, chunk, planned)
    return ReadChunk(chunk, planned, raws, time.perf_counter() - started, read_at)


def read_rows(work: Work, chunk: Chunk, planned: pa.Table) -> list[RawImage]:
    """Read planned rows of a chunk, up to READ_BYTES; rows that must be read later have the code NOT_YET."""
    with reads_at_once(work.read_concurrency), limited_to(ReadLimits(work.max_file_size, READ_BYTES)):
        # A run that captions every copy must read every copy: the source must not share the bytes of the first one.
        unused = {PREVIOUS} if work.dedupe else {PREVIOUS, KNOWN_SHA256.name}
        names = [name for name in planned.column_names if name not in unused]
        elsewhere = (
            rows.select([name for name in names if name in rows.column_names]) for rows in work.rows_elsewhere(chunk)
        )
        return read_part(work.source, planned.select(names), elsewhere)


def decode(work: Work, read: ReadChunk, decoder: GuardedDecoder) -> ChunkRows:
    """Decode the images of a chunk to the pixels the model wants. Bad images have an `error_code`."""
    from captioner.imaging import decode_images

    decoder.wait()  # for its start, which is not part of decoding
    started = time.perf_counter()
    batch = _decode_all(
        work, read, partial(decode_images, spec=work.model.spec, max_pixels=work.max_pixels, decode_each=decoder)
    )
    rows = batch.rows.append_column(CAPTIONS_SCHEMA.field("reference_captions"), read.planned["reference_captions"])
    for field_ in work.table.kept_fields:
        rows = rows.append_column(field_, read.planned[field_.name])
    if PREVIOUS in read.planned.column_names:
        rows = rows.append_column(PREVIOUS, read.planned[PREVIOUS])
    seconds = {"read": read.seconds, "decode": time.perf_counter() - started}
    return ChunkRows(read.chunk, rows, batch.pixels, seconds, read_at=read.read_at)


def _decode_all(work: Work, read: ReadChunk, decode_images: Callable[[Sequence[RawImage]], ImageBatch]) -> ImageBatch:
    """Decode the images of a chunk; those for which there was no memory are read once the others are decoded."""
    raws, indices = read.raws, np.arange(len(read.raws))
    batches: list[ImageBatch] = []
    decoded: list[npt.NDArray[np.int64]] = []
    while True:
        later = np.array([raw.error_code == NOT_YET for raw in raws])
        if not batches and not later.any():
            return decode_images(raws)
        batches.append(decode_images([raw for raw in raws if raw.error_code != NOT_YET]))
        decoded.append(indices[~later])
        if not later.any():
            break
        indices = indices[later]
        raws = read_rows(work, read.chunk, read.planned.take(indices))
    order = np.argsort(np.concatenate(decoded))
    rows = pa.concat_tables([batch.rows for batch in batches]).take(order).combine_chunks()
    return ImageBatch(rows, np.concatenate([batch.pixels for batch in batches])[order])


def caption(
    work: Work, captioner: Captioner, decoded: ChunkRows, memory: CaptionMemory[Caption] | None = None
) -> ChunkRows:
    """Caption a chunk and return its rows with all columns of the table. With a `memory`, copies are captioned once."""
    started = time.perf_counter()
    usages: list[Usage] = []
    prompts = _prompts(work, decoded.rows)
    results = _caption_rows(work, captioner, decoded, prompts, memory, usages)
    rows = _finished_rows(work, decoded, results, prompts)
    if PREVIOUS in decoded.rows.column_names:
        rows = with_previous(work.table, decoded.rows, rows, work.model.fingerprint)
    seconds = decoded.seconds | {"generate": time.perf_counter() - started}
    engine, device = getattr(captioner, "engine", "generic"), getattr(captioner, "device_name", "cpu")
    return ChunkRows(decoded.chunk, rows, None, seconds, engine, device, Usage.total(usages))


def _prompts(work: Work, rows: pa.Table) -> list[Prompts] | None:
    """Return what each of N decoded rows is asked, [N][questions]; None where that is the same for all."""
    prompts = prompts_of(work.model, rows)
    if PREVIOUS not in rows.column_names or not work.table.answer_columns:
        return prompts
    prompts = prompts or [same_prompts(work.model)] * rows.num_rows
    names = [question.name for question in work.model.questions]
    return without_answered(work.table, rows, prompts, names, work.model.fingerprint)


def commit(work: Work, captioned: ChunkRows) -> Receipt:
    """Write the rows of a chunk to the table, and return the receipt."""
    started = time.perf_counter()
    commit_chunk(work.table, captioned.chunk, captioned.rows)
    reasons = captioned.rows["error_code"].drop_null().value_counts().to_pylist()
    failed = {item["values"]: item["counts"] for item in reasons}
    spent, captions = captioned.seconds, _column_of(captioned, "caption")
    is_copy = captioned.rows["duplicate_of"].is_valid().to_pylist()
    different = Counter(text for text, copy in zip(captions, is_copy, strict=True) if text is not None and not copy)
    return Receipt(
        chunk_id=captioned.chunk.chunk_id,
        num_rows=captioned.chunk.num_rows,
        num_ok=captioned.chunk.num_rows - sum(failed.values()),
        failed_by_reason=failed,
        read_seconds=spent["read"],
        decode_seconds=spent["decode"],
        generate_seconds=spent["generate"],
        commit_seconds=time.perf_counter() - started,
        num_duplicates=captioned.chunk.num_rows - captioned.rows["duplicate_of"].null_count,
        flags=dict(Counter(flag for flags in _column_of(captioned, "flags") for flag in flags)),
        commonest=max(different.items(), key=lambda item: item[1], default=("", 0)),
        engine=captioned.engine,
        device=captioned.device,
        scored=score_sampled(work.sample, captioned.rows, work.trained),
        blank_columns=blank_columns(work.model, captioned.rows),
        unanswered=unanswered(work.model, captioned.rows),
        **captioned.usage._asdict(),
    )


def _column_of(rows: ChunkRows, name: str) -> list[Any]:
    return list(rows.rows[name].to_pylist())


@dataclass(frozen=True, slots=True)
class Caption:
    """The columns that a model fills for one image. `answers`: to the questions besides the caption, by column."""

    text: str
    num_tokens: int | None
    logprob_mean: float | None
    flags: list[str]
    samples: Sequence[str | None] | None = None  # all of them, with --num-captions
    answers: Mapping[str, Any] = field(default_factory=dict)


def caption_or_reasons(
    captioner: Captioner,
    pixels: Pixels,
    usages: list[Usage] | None = None,
    question: str = "",
    prompts: Sequence[Prompts] | None = None,
) -> list[Caption | str]:
    """Return a caption for each image, or the reason why it has none.

    A batch that fails is tried again in halves, so that one image does not fail the others. `usages`: a list to which
    the tokens that were counted are appended. `question`: what a chat model is asked, see `ModelRef`.
    `prompts`: see `Captioner.caption`. Raises ModelError where the model itself, or its server, cannot be used.
    """
    if not len(pixels):
        return []
    try:
        captions = captioner.caption(pixels) if prompts is None else captioner.caption(pixels, prompts)
        if usages is not None:
            usages.extend(captions.usage)
        questions = [question] * len(pixels)
        if question and prompts is not None:  # a chat model: each image has a question of its own
            questions = [image_prompts[0] or "" for image_prompts in prompts]
        return _as_list(captions, questions)
    except ModelError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON]
    # Outside the except clause, because the exception keeps the failed call's tensors alive.
    if len(pixels) == 1:
        return [reason]
    half = len(pixels) // 2
    first = caption_or_reasons(captioner, pixels[:half], usages, question, prompts and prompts[:half])
    return first + caption_or_reasons(captioner, pixels[half:], usages, question, prompts and prompts[half:])


def _as_list(captions: Captions, questions: Sequence[str]) -> list[Caption | str]:
    """Return the captions one by one. Raises ValueError, or an Arrow error, where they do not fit the table."""
    pa.array(captions.texts, CAPTIONS_SCHEMA.field("caption").type)
    pa.array(captions.num_tokens, CAPTIONS_SCHEMA.field("num_tokens").type)
    num_images = len(questions)
    if len(captions.texts) != num_images:
        raise ValueError(f"the model gave {counted(len(captions.texts), 'caption')} for {counted(num_images, 'image')}")
    errors, answers = captions.errors or [""] * num_images, captions.answers or [{}] * num_images
    samples: Sequence[Sequence[str | None] | None] = captions.samples or [None] * num_images
    pa.array(samples, SAMPLES_FIELD.type)
    numbers = zip(captions.num_tokens, captions.logprob_mean, captions.finished, strict=True)
    columns = zip(captions.texts, numbers, questions, errors, samples, answers, strict=True)
    return [
        error[:MAX_REASON]
        or Caption(text, tokens, _finite(logprob), caption_flags(text, logprob, finished, question), sampled, more)
        for text, (tokens, logprob, finished), question, error, sampled, more in columns
    ]


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is not None and math.isfinite(logprob) else None


@dataclass(frozen=True, slots=True)
class RowResult:
    """The caption of one row, or why it has none. `duplicate_of`: id of the image that was captioned instead of it."""

    caption: Caption | None = None
    error_code: str = ""
    error_message: str = ""
    duplicate_of: str | None = None


def _caption_rows(
    work: Work,
    captioner: Captioner,
    decoded: ChunkRows,
    prompts: list[Prompts] | None,
    memory: CaptionMemory[Caption] | None,
    usages: list[Usage],
) -> list[RowResult]:
    """Return a result for each row, in order: of images that were not decoded, their error."""
    rows, pixels = decoded.rows, decoded.pixels
    assert pixels is not None
    errors = zip(rows["error_code"].to_pylist(), rows["error_message"].to_pylist(), strict=True)
    results = [RowResult(error_code=code, error_message=message) for code, message in errors]
    ids, keys = rows["image_id"].to_pylist(), _copy_keys(rows["sha256"].to_pylist(), prompts)
    copies = find_copies([index for index, row in enumerate(results) if not row.error_code], keys, memory)
    all_unique = len(copies.unique) == len(pixels)
    unique_pixels = pixels if all_unique else pixels[copies.unique]  # indexing copies them
    unique_prompts = prompts and [prompts[index] for index in copies.unique]
    captions = caption_or_reasons(captioner, unique_pixels, usages, work.model.question, unique_prompts)
    for index, outcome in zip(copies.unique, captions, strict=True):
        if isinstance(outcome, str):
            results[index] = RowResult(error_code="generate_error", error_message=outcome)
            continue
        results[index] = RowResult(outcome)
        key = keys[index]
        if memory is not None and key:
            memory.add(key, ids[index], outcome)
    for index, first in copies.first_of.items():
        results[index] = replace(results[first], duplicate_of=ids[first] if results[first].caption else None)
    for index, (image_id, remembered) in copies.remembered.items():
        results[index] = RowResult(remembered, duplicate_of=image_id if image_id != ids[index] else None)
    return results


def _copy_keys(sha256s: list[str | None], prompts: list[Prompts] | None) -> list[str | None]:
    """Return a key for each image; images with equal keys have the same bytes and prompts, and share a caption."""
    if prompts is None:
        return sha256s
    digests = [hashlib.sha256(json.dumps(image_prompts).encode()).hexdigest() for image_prompts in prompts]
    return [sha256 and sha256 + digest for sha256, digest in zip(sha256s, digests, strict=True)]


def _finished_rows(work: Work, decoded: ChunkRows, results: list[RowResult], prompts: list[Prompts] | None) -> pa.Table:
    """Return the rows with all columns of the table."""
    count, chunk, model = decoded.chunk.num_rows, decoded.chunk, work.model
    captions = [result.caption for result in results]
    error_columns = [error_column(question.name) for question in model.more_questions]
    answers: list[Mapping[str, Any]] = [caption.answers if caption else {} for caption in captions]
    columns: dict[str, object] = {name: decoded.rows[name] for name in decoded.rows.column_names}
    columns |= {
        "status": [STATUS_FAILED if result.error_code else STATUS_OK for result in results],
        "error_code": [result.error_code or None for result in results],
        "error_message": _valid(result.error_message or None for result in results),
        "caption": [caption and caption.text for caption in captions],
        "captions": [caption and caption.samples for caption in captions],
        "num_tokens": [caption and caption.num_tokens for caption in captions],
        "logprob_mean": [caption and caption.logprob_mean for caption in captions],
        "flags": [caption.flags if caption else [] for caption in captions],
        "duplicate_of": [result.duplicate_of for result in results],
        "chunk_row": range(count),
    }
    columns |= {field.name: [answer.get(field.name) for answer in answers] for field in work.table.answer_fields}
    columns |= {name: _valid(answer.get(name) for answer in answers) for name in error_columns}
    columns |= asked_columns(model, prompts, count)
    same_for_all = {
        "model": model.name,
        "model_revision": model.revision,
        "model_sha256": model.sha256,
        "training_run_id": model.training_run_id,
        "fingerprint": model.fingerprint,
        "generation": chunk.generation,
        "run_id": work.run_id,
        "chunk_id": chunk.chunk_id,
        "created_at": datetime.fromtimestamp(decoded.read_at, UTC),
    }
    schema = work.table.schema
    columns |= {
        name: pa.chunked_array([pa.repeat(pa.scalar(value, schema.field(name).type), count)])
        for name, value in same_for_all.items()
    }
    arrays = [_column(columns[field.name], field) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _column(values: object, field: pa.Field) -> pa.Array | pa.ChunkedArray:
    return pc.cast(values, field.type) if isinstance(values, pa.ChunkedArray) else pa.array(values, field.type)


def _valid(messages: Iterable[str | None]) -> list[str | None]:
    """Return messages as the table takes them: servers' words, and models', may be no valid Unicode."""
    return [message and valid_unicode(message) for message in messages]
