"""The verbs of the flow, for one chunk: read, decode, caption, commit. One process and a cluster call the same."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import (
    CAPTIONS_SCHEMA,
    STATUS_FAILED,
    STATUS_OK,
    Captioner,
    Captions,
    Chunk,
    ImageBatch,
    Pixels,
    RawImage,
    Receipt,
    Source,
)
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import ModelRef
from captioner.run.dedupe import CaptionMemory, find_copies
from captioner.scoring.flags import caption_flags
from captioner.scoring.running_wer import Sample, score_sampled
from captioner.sources.copies import KNOWN_SHA256
from captioner.sources.reading import reads_at_once
from captioner.store.plan import read_planned
from captioner.store.publish import commit_chunk
from captioner.store.table import CaptionsTable


@dataclass(frozen=True)
class Work:
    """What a worker needs to know of a run. Small and picklable; everything heavy is opened where it is used."""

    table: CaptionsTable
    source: Source
    max_pixels: int
    model: ModelRef
    run_id: str
    decode_timeout: float
    sample: Sample = field(default_factory=dict)  # the rows to spot-check
    read_concurrency: int = 32
    dedupe: bool = True  # byte-equal images are captioned once
    device: str = "auto"  # what captions (see `captioner.models.devices`)

    def new_memory(self) -> CaptionMemory[Caption] | None:
        """What a worker remembers of the captions it made; None where every image is captioned."""
        return CaptionMemory() if self.dedupe else None

    def decoder(self) -> GuardedDecoder:
        """A decoder of this run's images, in a child process that is not started yet."""
        return GuardedDecoder(self.model.spec, self.max_pixels, self.decode_timeout)


@dataclass(frozen=True)
class ReadChunk:
    """A chunk's planned rows, a RawImage for each, and the seconds that reading them took."""

    chunk: Chunk
    planned: pa.Table
    raws: list[RawImage]
    seconds: float


@dataclass(frozen=True)
class ChunkRows:
    """A chunk on its way through the steps: its rows so far, the pixels until it is captioned, and seconds spent.

    `engine`, `device`: what captioned it (see `captioner.models.base`); "" before.
    """

    chunk: Chunk
    rows: pa.Table
    pixels: Pixels | None
    seconds: dict[str, float]
    engine: str = ""
    device: str = ""


def read(work: Work, chunk: Chunk) -> ReadChunk:
    """The chunk's images as files' bytes, or reasons. Raises SourceError where the archive as a whole has a fault."""
    started = time.perf_counter()
    with reads_at_once(work.read_concurrency):
        planned = read_planned(work.table, chunk)
        # What a manifest knows of copies is no use to a run that captions each.
        names = [name for name in planned.column_names if work.dedupe or name != KNOWN_SHA256.name]
        raws = work.source.read(planned.select(names))
    return ReadChunk(chunk, planned, raws, time.perf_counter() - started)


def decode(work: Work, read: ReadChunk, decoder: GuardedDecoder) -> ChunkRows:
    """The images as rows, and as pixels as the model wants them. Bad images have an `error_code`."""
    from captioner.imaging import decode_images

    decoder.wait()  # for its start, which is no part of decoding
    started = time.perf_counter()
    batch: ImageBatch = decode_images(read.raws, work.model.spec, work.max_pixels, decoder)
    rows = batch.rows.append_column(CAPTIONS_SCHEMA.field("reference_captions"), read.planned["reference_captions"])
    for kept in work.table.kept_fields:
        rows = rows.append_column(kept, read.planned[kept.name])
    return ChunkRows(read.chunk, rows, batch.pixels, {"read": read.seconds, "decode": time.perf_counter() - started})


def caption(
    work: Work, captioner: Captioner, decoded: ChunkRows, memory: CaptionMemory[Caption] | None = None
) -> ChunkRows:
    """The chunk's rows of the captions table. With a `memory`, byte-equal images are captioned once."""
    started = time.perf_counter()
    assert decoded.pixels is not None
    codes, messages = decoded.rows["error_code"].to_pylist(), decoded.rows["error_message"].to_pylist()
    ids, sha256s = decoded.rows["image_id"].to_pylist(), decoded.rows["sha256"].to_pylist()
    copies = find_copies([place for place, code in enumerate(codes) if not code], sha256s, memory)
    every = len(copies.new) == len(decoded.pixels)
    pixels = decoded.pixels if every else decoded.pixels[copies.new]  # which copies them
    made = dict(zip(copies.new, caption_or_reasons(captioner, pixels), strict=True))
    made |= {place: made[first] for place, first in copies.of.items()}
    made |= {place: known for place, (_, known) in copies.known.items()}
    written: dict[int, Caption] = {}
    for place, result in made.items():
        if isinstance(result, str):
            codes[place], messages[place] = "generate_error", result
        else:
            written[place] = result
    for place in copies.new:
        if memory is not None and place in written and sha256s[place]:
            memory.add(sha256s[place], ids[place], written[place])
    originals = {place: ids[first] for place, first in copies.of.items() if place in written}
    originals |= {place: image_id for place, (image_id, _) in copies.known.items() if image_id != ids[place]}
    rows = _finished_rows(work, decoded, codes, messages, written, originals)
    seconds = decoded.seconds | {"generate": time.perf_counter() - started}
    engine, device = getattr(captioner, "engine", "generic"), getattr(captioner, "device_name", "cpu")
    return ChunkRows(decoded.chunk, rows, None, seconds, engine, device)


def commit(work: Work, captioned: ChunkRows) -> Receipt:
    """Make the rows durable."""
    started = time.perf_counter()
    commit_chunk(work.table, captioned.chunk, captioned.rows)
    reasons = captioned.rows["error_code"].drop_null().value_counts().to_pylist()
    failed = {item["values"]: item["counts"] for item in reasons}
    spent = captioned.seconds
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
        engine=captioned.engine,
        device=captioned.device,
        scored=score_sampled(work.sample, _column_of(captioned, "image_id"), _column_of(captioned, "caption")),
    )


def _column_of(rows: ChunkRows, name: str) -> list[Any]:
    values: list[Any] = rows.rows[name].to_pylist()
    return values


@dataclass(frozen=True, slots=True)
class Caption:
    text: str
    num_tokens: int
    logprob_mean: float | None
    flags: list[str]


def caption_or_reasons(captioner: Captioner, pixels: Pixels) -> list[Caption | str]:
    """A caption for each image, or why the model could not. What fails together is tried again in halves, so that
    one image takes no neighbour with it."""
    if not len(pixels):
        return []
    try:
        return _as_list(captioner.caption(pixels))
    except Exception as error:
        if len(pixels) == 1:
            return [f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]]
        half = len(pixels) // 2
        return caption_or_reasons(captioner, pixels[:half]) + caption_or_reasons(captioner, pixels[half:])


def _as_list(captions: Captions) -> list[Caption | str]:
    columns = zip(captions.texts, captions.num_tokens, captions.logprob_mean, captions.finished, strict=True)
    return [
        Caption(text, tokens, logprob if math.isfinite(logprob) else None, caption_flags(text, logprob, finished))
        for text, tokens, logprob, finished in columns
    ]


def _finished_rows(
    work: Work,
    decoded: ChunkRows,
    codes: list[str],
    messages: list[str],
    written: dict[int, Caption],
    originals: dict[int, str],
) -> pa.Table:
    count, chunk, model = decoded.chunk.num_rows, decoded.chunk, work.model
    captions = [written.get(place) for place in range(count)]
    columns: dict[str, object] = {name: decoded.rows[name] for name in decoded.rows.column_names}
    columns |= {
        "status": [STATUS_FAILED if code else STATUS_OK for code in codes],
        "error_code": [code or None for code in codes],
        "error_message": [message or None for message in messages],
        "caption": [c and c.text for c in captions],
        "num_tokens": [c and c.num_tokens for c in captions],
        "logprob_mean": [c and c.logprob_mean for c in captions],
        "flags": [c.flags if c else [] for c in captions],
        "duplicate_of": [originals.get(place) for place in range(count)],
        "chunk_row": range(count),
    }
    same_for_all = {
        "model": model.name,
        "model_revision": model.revision,
        "model_sha256": model.sha256,
        "training_run_id": model.training_run_id,
        "prompt": model.prompt,
        "fingerprint": model.fingerprint,
        "generation": chunk.generation,
        "run_id": work.run_id,
        "chunk_id": chunk.chunk_id,
        "created_at": datetime.now(UTC),
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
