"""The data types that the steps exchange, and the schema of the captions table.

    Chunk --read--> RawImage --decode--> ImageBatch --caption--> rows of CAPTIONS_SCHEMA --commit--> Receipt

Steps exchange Arrow tables and uint8 pixels of the model's input size, or of the largest size that its image processor
makes use of: never full images, never floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

STATUS_OK, STATUS_FAILED = "ok", "failed"

# All reasons why an image can have no caption.
ERROR_CODES = (
    "not_found",
    "permission",
    "timeout",
    "empty_file",
    "not_an_image",
    "truncated",
    "too_many_pixels",
    "unsupported_format",
    "decode_error",
    "decoder_crashed",
    "generate_error",
    "too_large",  # the file is above --max-file-size
    "changed",  # the file that holds the image is not the one that was planned
    "damaged",  # a part of a tar, or a whole tar or table, in which there is nothing to read
)

# Failures that may be gone when the same files are read again: of a network, of permissions, of memory, of a model. The
# others are of the file itself, or of a limit that a flag sets.
PASSING_ERROR_CODES = frozenset({"not_found", "permission", "timeout", "decoder_crashed", "generate_error", "changed"})


def retry_may_help(counts: Mapping[str, Any]) -> bool:
    """Return whether --retry-failed may caption an image that failed, or get an answer that lacks.

    `counts`: TableCounts as JSON; of earlier versions, and of runs that were stopped, some counts may be absent.
    """
    return bool(counts.get("failed_answers")) or not PASSING_ERROR_CODES.isdisjoint(counts.get("failed_by_reason", ()))


# The columns of the frozen plan: enough to read an image again without listing the source.
PLAN_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("file", pa.binary(), nullable=False),  # the file to open; bytes, because names need not be UTF-8
        pa.field("offset", pa.int64()),  # of a tar member's data; null: the whole file
        pa.field("size", pa.int64()),  # bytes from offset; null: the whole file
        pa.field("row", pa.int64()),  # row in a table; null: not from a table
        pa.field("reference_captions", pa.list_(pa.string())),  # null: there are none
        pa.field("page_at", pa.int64()),  # byte of a TIFF page's directory; null: the whole file
    ]
)
PAGE = "#page="  # between the name of a TIFF and the number of its page, from 1, in an image_id


def names_of(image_id: str) -> tuple[str, ...]:
    """Return the names that a glob may match: the id, and for a page also the id without its number."""
    file, mark, page = image_id.rpartition(PAGE)
    return (image_id, file) if mark and page.isdecimal() else (image_id,)


CAPTIONS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("num_tokens", pa.int32()),
        pa.field("logprob_mean", pa.float32()),
        pa.field("flags", pa.list_(pa.string())),
        pa.field("reference_captions", pa.list_(pa.string())),
        pa.field("duplicate_of", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_revision", pa.string()),
        pa.field("model_sha256", pa.string(), nullable=False),
        pa.field("training_run_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("chunk_id", pa.string(), nullable=False),
        pa.field("chunk_row", pa.int32(), nullable=False),
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),  # just before its file was read
    ]
)

# A column of plans of --only, and of --retry-failed where a model is asked several questions: the row as it was, where
# something of it may be kept (see `captioner.store.previous`).
PREVIOUS = "_previous"
SAMPLES_FIELD = pa.field("captions", pa.list_(pa.string()))  # a column of tables with --num-captions


@dataclass(frozen=True, slots=True)
class Chunk:
    """The unit of work, of commit and of resume: one row group of one plan file.

    A generation is a frozen plan and its rows: the first listing of the source, an addition by `--extend`, or the rows
    repeated by `--retry-failed` or `--only`. `part`: the number of the plan file and of the published file.
    """

    generation: int
    part: int
    index: int
    num_rows: int

    @property
    def chunk_id(self) -> str:
        return f"g{self.generation:03d}-{self.part:05d}-{self.index:04d}"

    @classmethod
    def from_id(cls, chunk_id: str) -> Chunk:
        """Return the chunk with this id; its number of rows is not known."""
        generation, part, index = (int(text) for text in chunk_id.removeprefix("g").split("-"))
        return cls(generation, part, index, num_rows=0)


@dataclass(frozen=True, slots=True)
class Listing:
    """One batch of the listing of a source.

    `rows`: images, with PLAN_SCHEMA and the kept columns of the source. `ignored`: names of files that are not images
    by their name, such as documents and hidden files. `notes`: what a person
    should know about the source as it was listed, one line each.
    """

    rows: pa.Table
    ignored: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RawImage:
    """The bytes of one planned image's file, or an error code where they cannot be read."""

    image_id: str
    uri: str
    data: bytes | None
    error_code: str = ""
    error_message: str = ""


# Images for a model: uint8 [N, height, width, 3]; for a model of variable-size images an object array [N] of uint8
# [height, width, 3].
Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.object_]


def object_array(images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.object_]:
    """Return images of any sizes as an object array [N]; `numpy.array` would stack images of equal sizes."""
    array = np.empty(len(images), object)
    for index, image in enumerate(images):
        array[index] = image
    return array


_MAX_TRIAL_SIDE, _SMALL_SIDE = 1024, 512  # pixels


@dataclass(frozen=True, slots=True)
class PixelSpec:
    """How to make pixels for a model: its image processor's settings, read without loading the model.

    `resize`, before the centre is cropped to `height` x `width`, or padded to it with black:
        "exact"          to `resized` (height, width; (0, 0): `height` x `width`), whatever the aspect
        "shortest_edge"  the shorter side to `shortest_edge`
        "inside"         as large as fits into `resized`; padded at the right and below with the colour `fill`
        "none"           not at all
    Models with an image processor that does more take variable-size images:
        "own_edge"       only images larger than that processor can make use of are shrunk, so that the longer side is
                         `limit` pixels, both sides multiples of `multiple`
        "tiles"          the longer side to `limit` pixels, then both sides up to multiples of `multiple`, the side of a
                         tile; below it, at the left, the whole image as one tile, unless it is one already
        "patches"        both sides to multiples of `multiple`, with `least` to `limit` pixels in all

    `height`, `width`: of variable-size images the likely maximum. `mean`, `std`: for values scaled to 0..1,
    applied on the device. `preprocess`: "processor" gives exactly the pixels of the model's image processor; "fast"
    computes nearly the same pixels in less time.
    """

    height: int
    width: int
    resize: Literal["exact", "shortest_edge", "inside", "none", "own_edge", "tiles", "patches"] = "exact"
    shortest_edge: int = 0
    resample: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    preprocess: Literal["fast", "processor"] = "fast"
    resized: tuple[int, int] = (0, 0)
    fill: tuple[int, int, int] = (0, 0, 0)
    limit: int = 0
    multiple: int = 1
    least: int = 0

    @property
    def variable_size(self) -> bool:
        """Whether the images of a batch differ in size."""
        return self.resize in ("own_edge", "tiles", "patches")

    @property
    def trial_size(self) -> tuple[int, int]:
        """The height and width of images to try out batch sizes with; few images of variable size are larger."""
        return self._size_up_to(_MAX_TRIAL_SIDE)

    @property
    def small_size(self) -> tuple[int, int]:
        """The height and width of an image that every device which is large enough for the model has room for."""
        return self._size_up_to(_SMALL_SIDE)

    def _size_up_to(self, longest: int) -> tuple[int, int]:
        """Return a height and width of at most `longest` pixels, if the model takes images of that size."""
        if self.resize == "own_edge":
            return min(self.height, longest), min(self.width, longest)
        if self.resize == "patches":
            side = max(1, min(longest, math.isqrt(self.limit)) // self.multiple) * self.multiple
            return side, side
        return self.height, self.width

    @property
    def max_bytes(self) -> int:
        """The most bytes that the pixels of one image can have."""
        return 3 * self.height * self.width


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """One image ready for the model, or the reason why not (`error_code`; "" = fine).

    `pixels`: uint8 [height, width, 3] by the PixelSpec, None on failure. `width`, `height`: of the image with EXIF
    orientation applied, 0 where unknown. `descriptions`: texts that people wrote into the file, where they are read.
    """

    pixels: npt.NDArray[np.uint8] | None
    width: int = 0
    height: int = 0
    format: str = ""
    error_code: str = ""
    error_message: str = ""
    descriptions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Decoded images of one chunk, in chunk order.

    `rows`: Arrow table [N] with the columns of CAPTIONS_SCHEMA that do not need a caption. `pixels`: of N images; where
    `error_code` is set, zeros, or for variable-size images a single black pixel.
    """

    rows: pa.Table
    pixels: Pixels


class Usage(NamedTuple):
    """Tokens that were counted.

    `prompt_tokens`, `completion_tokens`: by model servers, also for answers that are not captions. `input_tokens`: of
    the batches of a chat model in this process, images and question; `padding_tokens` of them fill shorter rows.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    padding_tokens: int = 0

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """Return the sum."""
        return cls(*map(sum, zip(cls(), *usages, strict=True)))


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked about each image.

    `name`: of the column with the answers; CAPTION for the question whose answer is the caption. `prompt`: may hold
    columns of the image's row, in braces (see `captioner.models.questions`). `schema`: the JSON Schema of the answer,
    as JSON; None for text.
    """

    name: str
    prompt: str | None
    max_new_tokens: int
    schema: str | None = None


CAPTION = "caption"
# What is asked about one image: the prompt of each question; None for one that is not asked, since it is answered.
Prompts = tuple[str | None, ...]


def prompt_column(question: str) -> str:
    """Return the name of the column with what an image was asked."""
    return "prompt" if question == CAPTION else f"{question}_prompt"


def error_column(question: str) -> str:
    """Return the name of the column with the reason why a question has no answer, or one that was cut."""
    return f"{question}_error"


@dataclass(frozen=True, slots=True)
class Captions:
    """The captions of N images, in order.

    `num_tokens`: generated tokens, the end token included; None where a model server does not count them.
    `logprob_mean`: mean natural-log probability of those tokens; NaN where there are none, None where a model server
    gives none. `finished`: whether the end token was reached within the limit. `errors`: why an image has no caption,
    "" where it has one; empty where all have one. `usage`: tokens that were counted, for each image or all; or empty.
    `samples`: all captions of each image with --num-captions, of which `texts` has the first, None for an answer that
    is not a caption; else empty.
    `answers`: to the other questions about each image, by column; empty where there are none.
    """

    texts: list[str]
    num_tokens: Sequence[int | None]
    logprob_mean: Sequence[float | None]
    finished: list[bool]
    errors: Sequence[str] = ()
    usage: Sequence[Usage] = ()
    samples: Sequence[Sequence[str | None]] = ()
    answers: Sequence[Mapping[str, Any]] = ()


class Captioner(Protocol):
    """Turns pixels into captions: a model of `captioner.models`, or the fake of `captioner.testing`."""

    def caption(self, pixels: Pixels, prompts: Sequence[Prompts] | None = None) -> Captions:
        """Return the captions of N >= 1 images, and the answers to the model's other questions about them.

        `prompts`: what to ask about each image; None where the prompts are the same for all.
        """
        ...


class Source(Protocol):
    """A collection of images. Cheap to create and picklable: every worker has its own copy.

    It is listed in independent `units`, so that listing runs in parallel and resumes. Their order, and the order of the
    rows in each, is the same at every listing of an unchanged collection.
    """

    @property
    def name(self) -> str:
        """The location as the user wrote it."""
        ...

    def units(self) -> Sequence[str]:
        """Return the names of the parts that are listed independently: sub-folders, tars, tables."""
        ...

    def kept_fields(self) -> list[pa.Field]:
        """Return the columns of the source that are copied to the captions table (`--keep-columns`)."""
        ...

    def list_unit(self, unit: str) -> Iterator[Listing]:
        """Yield the images of one unit, in batches of a few thousand.

        Never opens an image; with --pages all it reads the directories of TIFFs, to count their pages.
        """
        ...

    def read(self, rows: pa.Table) -> list[RawImage]:
        """Return one RawImage for each planned row (a slice of the plan), in order.

        An image that cannot be read is a RawImage with an error code. Raises SourceError for a fault of the whole
        collection (root gone, credentials expired), which must never become failed rows.
        """
        ...


@dataclass(frozen=True, slots=True)
class Receipt:
    """Counts and seconds of a committed chunk, for the driver."""

    chunk_id: str
    num_rows: int
    num_ok: int
    failed_by_reason: dict[str, int]
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    generate_seconds: float = 0.0
    commit_seconds: float = 0.0
    num_duplicates: int = 0  # rows that took the caption of a byte-equal image
    flags: dict[str, int] = field(default_factory=dict)  # captions by flag (see `captioner.scoring.flags`)
    commonest: tuple[str, int] = ("", 0)  # the most frequent caption of different images, and its number
    engine: str = ""  # "fast" or "generic", of a model; "endpoint" for a model server
    device: str = ""  # "cpu", "mps", or a GPU's name and memory
    scored: Sequence[Sequence[int]] = ()  # (edits, words) of each row that was spot-checked
    prompt_tokens: int = 0  # these four: see Usage
    completion_tokens: int = 0
    blank_columns: dict[str, int] = field(default_factory=dict)  # images without a value in a column of the prompt
    unanswered: dict[str, int] = field(default_factory=dict)  # images by question, other than the caption
    input_tokens: int = 0
    padding_tokens: int = 0
