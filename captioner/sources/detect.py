"""Detect what kind of source a directory or a glob is."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pyarrow.fs import FileType

from captioner.console.text import counted
from captioner.errors import SourceError, UsageError
from captioner.files import is_uri, shown
from captioner.sources.root import (
    TABLE_FILE,
    Root,
    UnlistableError,
    is_captions_table,
    is_excluded,
    is_hidden,
    is_ignored,
    readable,
)
from captioner.sources.webdataset import COMPRESSED_SUFFIXES, IMAGE_SUFFIXES

# Files beside tars and tables that belong to them, as do those of Spark and Hadoop, such as `_SUCCESS`.
COMPANION_SUFFIXES = (b".idx", b".index", b".crc", b".md5", b".sha1", b".sha256", b".log", b".lock", b".yaml", b".yml")
LOOK_AT = 10_000  # files, of a folder that has more


@dataclass
class Content:
    """What a directory holds, with all below it: tars, Parquet files, images by their suffix, and other files.

    Of more than LOOK_AT files only as many are counted. Documents, hidden files and companions are not.
    """

    tars: list[bytes] = field(default_factory=list)
    tables: list[bytes] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    others: list[bytes] = field(default_factory=list)

    @property
    def archives(self) -> list[bytes]:
        """The tars or else the tables, sorted, where the directory holds mostly them; empty where it is a folder."""
        return sorted(self.tars or self.tables) if self.is_mostly_archives else []

    @property
    def is_mostly_archives(self) -> bool:
        num_archives = len(self.tars or self.tables)
        return len(self.images) < num_archives and len(self.others) <= 10 * num_archives

    @property
    def reason(self) -> str:
        """Why the directory is taken for what it is taken for, for a person."""
        counts = (("tar", self.tars), ("Parquet file", self.tables), ("image file", self.images))
        parts = [counted(len(files), name) for name, files in counts if files]
        if self.others:
            parts.append(f"{counted(len(self.others), 'other file')}, e.g. {readable(self.others[0])!r}")
        return f"it holds {', '.join(parts) or 'no files'}"


def look_into(root: Root, exclude: Sequence[str] = ()) -> Content:
    """Count what a directory holds. Stops when it is clearly a folder of images, or after LOOK_AT files."""
    content = Content()
    for number, file in enumerate(_visible_files(root)):
        base, lower = os.path.basename(file), file.lower()
        if is_excluded(file, exclude) or is_excluded(file + b"/", exclude):
            continue
        if lower.endswith((b".tar", *COMPRESSED_SUFFIXES)):
            content.tars.append(file)
        elif lower.endswith(b".parquet"):
            if not file.startswith(b"_") and b"/_" not in file:  # else of Spark, Hadoop or Delta: no data
                content.tables.append(file)
        elif _has_image_suffix(file):
            content.images.append(file)
        elif not is_ignored(base) and not base.startswith(b"_") and not lower.endswith(COMPANION_SUFFIXES):
            content.others.append(file)
        if number >= LOOK_AT and not content.is_mostly_archives:
            break
    return content


def is_glob(location: str) -> bool:
    """Return whether a path or URI has wildcards; the question mark before the options of a URI is none."""
    return glob.has_magic(_pattern_and_options(location)[0])


def match_glob(location: str) -> tuple[Root, list[bytes]]:
    """Return the directory of a glob, the part before its first wildcard, and the files that it matches, sorted.

    Raises SourceError where it matches nothing, and UsageError where it matches images: a folder is given for them.
    """
    pattern, options = _pattern_and_options(location)
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    root = Root.at((fixed or ("/" if pattern.startswith("/") else ".")) + options)
    relative = pattern[len(fixed) :].lstrip("/")
    if is_uri(pattern):
        regex = re.compile(os.fsencode(fnmatch.translate(relative)))
        files = [file for file in _visible_files(root) if regex.match(file)]
    else:
        matches = glob.iglob(os.fsencode(relative), root_dir=os.fsencode(root.location), recursive=True)
        files = [file for file in matches if root.kind(file) == FileType.File]
    if not files:
        raise SourceError(f"{pattern}: no file matches")
    if all(_has_image_suffix(file) for file in files):
        folder, include = shown(root.location), relative.replace("**/", "*")
        raise UsageError(f"{pattern}: a glob of images; give the folder {folder} with --include '{include}'")
    return root, sorted(files)


def _pattern_and_options(location: str) -> tuple[str, str]:
    """Return a glob and the options of the connection that follow it in a URI: `s3://b/*.tar` and `?scheme=http`."""
    options = re.search(r"\?\w+=.*", location, re.DOTALL) if is_uri(location) else None
    return (location[: options.start()], options[0]) if options else (location, "")


def _has_image_suffix(file: bytes) -> bool:
    return os.path.splitext(file.lower())[1][1:] in IMAGE_SUFFIXES


def _visible_files(root: Root) -> Iterator[bytes]:
    """Yield every file below the root, in no order, without hidden ones and those in hidden directories."""
    stack, seen = [b""], set()
    while stack:
        directory = stack.pop()
        try:
            identity = root.identity(directory)
            if identity in seen:
                continue
            seen.add(identity)
            entries = list(root.scan_names(directory))
        except UnlistableError:
            if not directory:
                raise
            continue  # the listing tells of it
        table_files, directories = list[bytes](), list[bytes]()
        for name, kind in entries:
            if is_hidden(name):
                continue
            if kind == FileType.Directory:
                directories.append(name)
            elif kind == FileType.File:
                table_files += [name] if name == TABLE_FILE else []
                yield os.path.join(directory, name)
        if not directory or not is_captions_table(table_files, directories):
            stack += [os.path.join(directory, name) for name in directories]
