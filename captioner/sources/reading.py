"""Reading planned images: many at once, with retries, and telling a bad image from a bad archive."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import pyarrow as pa

from captioner.data import RawImage
from captioner.errors import SourceError
from captioner.sources.root import Root, readable

RETRY_SECONDS = (0.2, 0.8, 3.2)  # before the second, third and fourth try

T = TypeVar("T")
_concurrency = ContextVar("concurrency", default=32)
_sleep = time.sleep  # replaced in tests

# Trying again gives the same answer.
_FINAL_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_FINAL_NUMBERS = {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EBADMSG}
# What stores and Parquet say: pyarrow gives their answers as OSErrors without a number.
_REFUSED = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|ExpiredToken|"
    r"EXPIRED_TOKEN|TokenExpired|PERMISSION_DENIED|UNAUTHENTICATED|Unauthorized|Forbidden|HTTP status 40[13]|"
    r"(?i:credentials)"
)
_DAMAGED = re.compile(r"(?i:corrupt|deserialize thrift|unexpected end of stream|page was smaller|decompress)")


def concurrency() -> int:
    """How many reads this thread should have under way at once."""
    return _concurrency.get()


@contextmanager
def reads_at_once(number: int) -> Iterator[None]:
    """Inside, this thread's sources have so many reads under way at once.

    pyarrow's client of a store opens 25 connections, or as many as pyarrow has threads for input and output when the
    client is made.
    """
    if pa.io_thread_count() < number:
        pa.set_io_thread_count(number)
    token = _concurrency.set(number)
    try:
        yield
    finally:
        _concurrency.reset(token)


def with_retry(action: Callable[[], T]) -> T:
    """`action()`, tried again after each of RETRY_SECONDS while it raises an OSError that may pass."""
    for seconds in RETRY_SECONDS:
        try:
            return action()
        except OSError as error:
            if _reason(error) != "timeout":
                raise
        _sleep(seconds)
    return action()


def read_all(tasks: Sequence[Callable[[], RawImage]], root: Root, *, in_archives: bool = False) -> list[RawImage]:
    """Run reads side by side; their answers in order. Raises SourceError where the fault is the archive's.

    `in_archives`: the images are inside files, so that none of them can be missing by itself.
    """
    images = run_reads(tasks)
    check_archive(images, root, in_archives)
    return images


def run_reads(tasks: Sequence[Callable[[], RawImage]]) -> list[RawImage]:
    """Reads side by side; their answers in order."""
    with ThreadPoolExecutor(min(concurrency(), len(tasks)) or 1) as pool:
        return list(pool.map(lambda task: task(), tasks))


def read_rows(rows: pa.Table, root: Root) -> list[RawImage]:
    """The images of PLAN_SCHEMA rows that are files, or parts of files (members of tars)."""
    return read_all(reads_of(rows, root), root, in_archives=rows.column("offset").null_count == 0)


def reads_of(rows: pa.Table, root: Root) -> list[Callable[[], RawImage]]:
    """What reads each of the rows."""
    columns = (rows.column(name).to_pylist() for name in ("image_id", "file", "offset", "size"))
    return [partial(_read_file, root, *row) for row in zip(*columns, strict=True)]


def _read_file(root: Root, image_id: str, file: bytes, offset: int | None, size: int | None) -> RawImage:
    uri = root.uri(file)
    if offset is not None:
        uri += image_id.removeprefix(readable(file))  # the member's name
    if not file:
        return RawImage(image_id, uri, None, "not_found", "the table names no file here")
    try:
        data = with_retry(lambda: root.read(file, offset, size))
    except OSError as error:
        return failed_read(image_id, uri, error)
    if size is not None and len(data) < size:
        return RawImage(image_id, uri, None, "truncated", f"the tar ends {size - len(data)} bytes before the image")
    return raw_image(image_id, uri, data)


def raw_image(image_id: str, uri: str, data: bytes) -> RawImage:
    """The image, unless there is not one byte of it."""
    return RawImage(image_id, uri, data) if data else RawImage(image_id, uri, None, "empty_file", "0 bytes")


def failed_read(image_id: str, uri: str, error: OSError) -> RawImage:
    """The row of an image that cannot be read, with its reason."""
    message = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return RawImage(image_id, uri, None, _reason(error), message)


def check_archive(images: Sequence[RawImage], root: Root, in_archives: bool) -> None:
    """Raise SourceError where all failed together, and for a reason that no image has by itself."""
    codes = {image.error_code for image in images}
    if codes == {"not_found"} and (in_archives or not root.has_anything()):
        raise SourceError(f"{root.uri(b'')}: the source is gone; bring it back and run the same command")
    if len(images) >= 2 and codes <= {"permission", "timeout"}:
        raise SourceError(
            f"{root.uri(b'')}: every one of {len(images)} reads was refused, the first with: "
            f"{images[0].error_message}; check credentials and permissions, then run the same command"
        )


def _reason(error: OSError) -> str:
    """The error code; "timeout" is whatever may pass."""
    said = str(error) if error.errno is None else ""
    if isinstance(error, PermissionError) or _REFUSED.search(said):
        return "permission"
    if error.errno == errno.EBADMSG or _DAMAGED.search(said):
        return "decode_error"
    return "not_found" if isinstance(error, _FINAL_ERRORS) or error.errno in _FINAL_NUMBERS else "timeout"
