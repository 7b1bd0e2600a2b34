"""Read planned images in parallel, and tell a bad image from a bad source."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial

import pyarrow as pa

from captioner.data import RawImage, Source
from captioner.errors import CaptionerError, SourceError
from captioner.run.prefetch import in_background
from captioner.sources.root import HEAD_BYTES, RefusedFileError, Root, admitting, assigned, error_code_of, readable
from captioner.sources.tar_members import header_room, is_member

NOT_YET = "not_yet"  # the code of an image that is read later, when there is memory for it; never in a table
SNIFF_ABOVE = 16 << 20  # bytes; of a larger file the first ones must be those of an image
# When a read is late (see `run_reads`): the least seconds, and how many times those of half of the reads.
LATE, VERY_LATE = (0.3, 4), (1.0, 10)
SECOND_READS = 0.01  # of the reads, the share that is started a second time when they are no more than LATE
STAMP = pa.field("stamp", pa.string())  # a column of the plan beside PLAN_SCHEMA, of images that share a file

_concurrency = ContextVar("concurrency", default=32)
_suspicious = ContextVar("suspicious", default=True)  # whether reads that all fail are a fault of the source


def concurrency() -> int:
    """Return how many reads the sources of this thread run in parallel."""
    return _concurrency.get()


class ReadLimits:
    """What one call of `Source.read` may hold.

    `max_file_size`: bytes of one image's file; a larger one is refused. `max_bytes`: of all images together; those
    above it are not read, and their code is NOT_YET. None: no limit. The first image is always read.
    """

    def __init__(self, max_file_size: int = 1 << 30, max_bytes: int | None = None) -> None:
        self.max_file_size, self._max_bytes = max_file_size, max_bytes
        self._num_bytes, self._lock = 0, threading.Lock()

    def admit(self, size: int, read_head: Callable[[], bytes]) -> None:
        """Count a file of `size` bytes. Raises RefusedFileError where it must not be read, or not yet."""
        self.check(size)
        if size > SNIFF_ABOVE:
            from captioner.imaging.formats import why_not_an_image

            if reason := why_not_an_image(read_head()):
                raise RefusedFileError(reason.code, f"{reason.message}; {size:,} bytes")
        if self._max_bytes is None:
            return
        with self._lock:
            if self._num_bytes and self._num_bytes + size > self._max_bytes:
                raise RefusedFileError(NOT_YET, "")
            self._num_bytes += max(size, 1)

    def check(self, size: int) -> None:
        """Raise RefusedFileError where one file is too large."""
        if size > self.max_file_size:
            message = f"{size:,} bytes are more than the limit of {self.max_file_size:,} (--max-file-size)"
            raise RefusedFileError("too_large", message)


_limits: ContextVar[ReadLimits | None] = ContextVar("limits", default=None)


def read_limits() -> ReadLimits:
    """Return the limits of the reads of this thread."""
    return _limits.get() or ReadLimits()


def limited_to(limits: ReadLimits) -> AbstractContextManager[None]:
    """Let the reads of this thread have these limits."""
    return assigned(_limits, limits)


def reads_at_once(number: int) -> AbstractContextManager[None]:
    """Let the sources of this thread run `number` reads in parallel.

    pyarrow's client of a store opens 25 connections, or as many as pyarrow has I/O threads when the client is created.
    """
    if pa.io_thread_count() < number:
        pa.set_io_thread_count(number)
    return assigned(_concurrency, number)


class SuspectedSourceError(SourceError):
    """Every read of some rows failed, as when the source is gone; or only these rows are."""


def rows_may_all_fail() -> AbstractContextManager[None]:
    """Make reads of this thread that all fail failed rows, where the source is known to exist or is judged later."""
    return assigned(_suspicious, False)


def read_part(source: Source, rows: pa.Table, elsewhere: Iterable[pa.Table]) -> list[RawImage]:
    """Return one RawImage for each planned row of a part of the source, as `read_images` does.

    Where every read of the part fails, single rows from `elsewhere` are read: one that is there shows that the source
    is, and then the part is read once more. Raises SourceError where none of them can be read either.
    """
    try:
        return read_images(source, rows)
    except SuspectedSourceError as error:
        with rows_may_all_fail():
            if not any(_is_there(source, others) for others in elsewhere):
                raise SourceError(str(error)) from error
            return read_images(source, rows)


def _is_there(source: Source, rows: pa.Table) -> bool:
    return any(image.error_code not in ("not_found", "permission", "timeout") for image in read_images(source, rows))


def read_images(source: Source, rows: pa.Table) -> list[RawImage]:
    """Return `source.read` of planned rows, one RawImage for each, in order.

    Where it raises for a row, the rows are read in halves until that row is alone, and only it fails. Raises
    SourceError where the source is at fault.
    """
    try:
        return source.read(rows)
    except CaptionerError:
        raise
    except Exception as error:  # of a library, for an unforeseen name or file
        if rows.num_rows == 1:
            image_id = rows["image_id"][0].as_py()
            message = " ".join(f"{type(error).__name__}: {error}".split())
            return [RawImage(image_id, image_id, None, "decode_error", f"it cannot be read: {message}")]
    half = rows.num_rows // 2
    with rows_may_all_fail():  # the fault that was raised is not a fault of the source
        return read_images(source, rows.slice(0, half)) + read_images(source, rows.slice(half))


def read_all(tasks: Sequence[Callable[[], RawImage]], root: Root, *, in_archives: bool = False) -> list[RawImage]:
    """Run reads in parallel; return their images in order. Raises SourceError where the source is at fault.

    `in_archives`: the images are inside other files, so that a single one cannot be missing.
    """
    images = run_reads(tasks)
    raise_if_source_failed(images, root, in_archives)
    return images


def run_reads(tasks: Sequence[Callable[[], RawImage]]) -> list[RawImage]:
    """Run reads in parallel; return their images in order.

    Once half of them have returned, a read that is LATE is started a second time, and the first answer counts: a store
    that lets one request in a thousand hang would otherwise hold up every second chunk until the request times out.
    After SECOND_READS of them only those that are VERY_LATE are started again, as some are slow because they are large.
    """
    reads = [_TimedRead(task) for task in tasks]
    pool = ThreadPoolExecutor(min(concurrency(), len(tasks)) or 1)
    try:
        calls, num_second = [[pool.submit(read)] for read in reads], 0
        while waiting := [index for index, futures in enumerate(calls) if not any(map(Future.done, futures))]:
            wait([future for index in waiting for future in calls[index]], timeout=LATE[0] / 4)
            late, very_late = _seconds_until(LATE, reads), _seconds_until(VERY_LATE, reads)
            for index in waiting:
                limit = late if num_second < SECOND_READS * len(tasks) else very_late
                if len(calls[index]) == 1 and reads[index].elapsed() > limit:
                    calls[index].append(in_background(tasks[index]))
                    num_second += 1
        return [next(future for future in futures if future.done()).result() for futures in calls]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class _TimedRead:
    """A read that notes when it began, and how long it took."""

    def __init__(self, task: Callable[[], RawImage]) -> None:
        self._task, self._started = task, math.inf
        self.seconds: float | None = None

    def __call__(self) -> RawImage:
        self._started = time.monotonic()
        image = self._task()
        self.seconds = self.elapsed()
        return image

    def elapsed(self) -> float:
        """Return the seconds since it began; none where it has not."""
        return time.monotonic() - self._started


def _seconds_until(late: tuple[float, int], reads: Sequence[_TimedRead]) -> float:
    """Return after how many seconds a read is `late`; infinity before half of the reads have returned."""
    least, times = late
    seconds = [read.seconds for read in reads if read.seconds is not None]
    if 2 * len(seconds) < len(reads):
        return math.inf
    return max(least, times * statistics.median(seconds)) if seconds else math.inf


def with_stamp(rows: pa.Table, stamp: str | None) -> pa.Table:
    """Add the STAMP column: `Root.stamp` of the file that holds these images, from when it was listed."""
    return rows.append_column(STAMP, pa.repeat(pa.scalar(stamp, STAMP.type), rows.num_rows))


def have_changed(rows: pa.Table, stamp_of: Callable[[bytes], str | None]) -> list[bool]:
    """Return for each row whether its file has changed since the row was planned.

    `stamp_of`: returns the present stamp of a file; called once for each file. A file that is gone or cannot be asked
    for has not changed.
    """
    if STAMP.name not in rows.column_names:
        return [False] * rows.num_rows  # a plan of an earlier version, or of files that each are one image
    files, stamps = rows["file"].to_pylist(), rows[STAMP.name].to_pylist()
    now = {file: stamp_of(file) for file, stamp in set(zip(files, stamps, strict=True)) if stamp}
    return [bool(stamp) and now[file] not in (None, stamp) for file, stamp in zip(files, stamps, strict=True)]


def as_planned(images: Sequence[RawImage], rows: pa.Table, root: Root) -> list[RawImage]:
    """Return the images; those whose files changed after they were planned are failed, without their bytes.

    Call it after reading, so that a file that is replaced meanwhile is noticed too.
    """
    return [
        changed_image(image, f"{readable(file)} is not the file that was planned") if has_changed else image
        for image, file, has_changed in zip(
            images, rows["file"].to_pylist(), have_changed(rows, root.stamp), strict=True
        )
    ]


def changed_image(image: RawImage, reason: str) -> RawImage:
    return replace(image, data=None, error_code="changed", error_message=f"{reason}; --retry-failed plans it anew")


def read_rows(rows: pa.Table, root: Root) -> list[RawImage]:
    """Read the images of PLAN_SCHEMA rows that are files, or parts of files (members of tars)."""
    images = read_all(reads_of(rows, root), root, in_archives=rows.column("offset").null_count == 0)
    return as_planned(images, rows, root)


def reads_of(rows: pa.Table, root: Root) -> list[Callable[[], RawImage]]:
    """Return for each row a function that reads its image."""
    columns = (rows.column(name).to_pylist() for name in ("image_id", "file", "offset", "size"))
    return [partial(read_file, root, read_limits(), *row) for row in zip(*columns, strict=True)]


def read_file(
    root: Root, limits: ReadLimits, image_id: str, file: bytes, offset: int | None = None, size: int | None = None
) -> RawImage:
    """Read an image that is a file, or the member of a tar at `offset`. A fault of it is an error code."""
    uri = root.uri(file)
    if offset is not None:
        uri += image_id.removeprefix(readable(file))  # the name of the tar member
    if not file:
        return RawImage(image_id, uri, None, "not_found", "the table names no file here")
    try:
        if size is not None and offset is not None:
            return _read_member(root, limits, RawImage(image_id, uri, None), file, offset, size)
        with admitting(limits.admit):
            data = root.retry(lambda: root.read(file))
    except RefusedFileError as refused:
        return RawImage(image_id, uri, None, refused.code, refused.message)
    except OSError as error:
        return failed_read(image_id, uri, error)
    return raw_image(image_id, uri, data)


def _read_member(root: Root, limits: ReadLimits, image: RawImage, file: bytes, offset: int, size: int) -> RawImage:
    """Read a member of a tar together with its header, which tells whether it is still the member that was planned."""
    name = image.image_id.removeprefix(f"{readable(file)}/")
    if size < 0:
        message = f"the tar is damaged: no readable member from byte {offset} to {offset - size}"
        return replace(image, error_code="damaged", error_message=message)
    room = header_room(name, offset)
    limits.admit(size, lambda: root.retry(lambda: root.read(file, offset, HEAD_BYTES)))
    data = root.retry(lambda: root.read(file, offset - room, room + size))
    if not is_member(data[:room], name, size):
        return changed_image(image, "the tar has another member at this position, or none")
    missing = room + size - len(data)
    if missing:
        message = f"the tar ends {missing} bytes before the image"
        return replace(image, error_code="truncated", error_message=message)
    return raw_image(image.image_id, image.uri, data[room:])


def raw_image(image_id: str, uri: str, data: bytes) -> RawImage:
    """Return the image, or an error where it has 0 bytes."""
    return RawImage(image_id, uri, data) if data else RawImage(image_id, uri, None, "empty_file", "0 bytes")


def failed_read(image_id: str, uri: str, error: OSError) -> RawImage:
    """Return an image that could not be read, with the reason."""
    message = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return RawImage(image_id, uri, None, error_code_of(error), message)


def raise_if_source_failed(images: Sequence[RawImage], root: Root, in_archives: bool) -> None:
    """Raise SuspectedSourceError where every read failed for a reason that may lie with the source."""
    if not _suspicious.get():
        return
    codes = {image.error_code for image in images}
    if codes == {"not_found"} and (in_archives or not root.has_anything()):
        raise SuspectedSourceError(f"{root.uri(b'')}: the source is missing; restore it and run the same command")
    if len(images) >= 2 and codes <= {"permission", "timeout"}:
        raise SuspectedSourceError(
            f"{root.uri(b'')}: every one of {len(images)} reads was refused, the first with: "
            f"{images[0].error_message}; check credentials and permissions, then run the same command"
        )
