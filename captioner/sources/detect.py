"""Detect what kind of source a directory or a glob is."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator

from pyarrow.fs import FileType

from captioner.errors import SourceError
from captioner.files import is_uri
from captioner.sources.root import TABLE_FILE, Root, is_captions_table, is_hidden, is_ignored
from captioner.sources.webdataset import COMPRESSED_SUFFIXES


def find_archives(root: Root) -> list[bytes]:
    """Return the tars of a directory without images, or else its Parquet files; sorted.

    Empty where the directory holds images or nothing. Stops at the first image, so of a folder of images at most one
    directory is listed.
    """
    tars, tables = [], []
    for file in _visible_files(root):
        if file.lower().endswith((b".tar", *COMPRESSED_SUFFIXES)):
            tars.append(file)
        elif file.lower().endswith(b".parquet"):
            tables.append(file)
        elif not is_ignored(os.path.basename(file)):
            return []
    return sorted(tars) or sorted(tables)


def match_glob(pattern: str) -> tuple[Root, list[bytes]]:
    """Return the directory of a glob, the part before its first wildcard, and the files that it matches, sorted.

    Raises SourceError where it matches nothing.
    """
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    root = Root.at(fixed or ("/" if pattern.startswith("/") else "."))
    if is_uri(pattern):
        regex = re.compile(os.fsencode(fnmatch.translate(pattern[len(fixed) + 1 :])))
        files = [file for file in _visible_files(root) if regex.match(file)]
    else:
        relative = os.fsencode(pattern[len(fixed) :].lstrip("/"))
        matches = glob.iglob(relative, root_dir=os.fsencode(root.location), recursive=True)
        files = [file for file in matches if root.kind(file) == FileType.File]
    if not files:
        raise SourceError(f"{pattern}: no file matches")
    return root, sorted(files)


def _visible_files(root: Root) -> Iterator[bytes]:
    """Yield every file below the root, in no order, without hidden ones and those in hidden directories."""
    stack, seen = [b""], set()
    while stack:
        directory = stack.pop()
        identity = root.identity(directory)
        if identity in seen:
            continue
        seen.add(identity)
        table_files, directories = list[bytes](), list[bytes]()
        for name, kind in root.scan_names(directory):
            if is_hidden(name):
                continue
            if kind == FileType.Directory:
                directories.append(name)
            elif kind == FileType.File:
                table_files += [name] if name == TABLE_FILE else []
                yield os.path.join(directory, name)
        if not directory or not is_captions_table(table_files, directories):
            stack += [os.path.join(directory, name) for name in directories]
