"""Looking at a directory, or a glob, to tell what kind of archive it is."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator

from pyarrow.fs import FileType

from captioner.errors import SourceError
from captioner.files import is_uri
from captioner.sources.root import Root, is_hidden, is_ignored
from captioner.sources.webdataset import COMPRESSED_SUFFIXES


def look_at(root: Root) -> list[bytes]:
    """The tars of a directory without images, or else its Parquet files if it has any; sorted. Empty where it holds
    images or nothing. Stops at the first image, so a folder of images costs one directory at most.
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


def matching(pattern: str) -> tuple[Root, list[bytes]]:
    """The files that a glob matches, sorted, and the directory they are under: the part of the glob before any magic.

    Raises SourceError where it matches nothing.
    """
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    root = Root.at(fixed or ("/" if pattern.startswith("/") else "."))
    if is_uri(pattern):
        wanted = re.compile(os.fsencode(fnmatch.translate(pattern[len(fixed) + 1 :])))
        files = [file for file in _visible_files(root) if wanted.match(file)]
    else:
        wanted_below = os.fsencode(pattern[len(fixed) :].lstrip("/"))
        found = glob.iglob(wanted_below, root_dir=os.fsencode(root.location), recursive=True)
        files = [file for file in found if root.kind(file) == FileType.File]
    if not files:
        raise SourceError(f"{pattern}: no file matches")
    return root, sorted(files)


def _visible_files(root: Root) -> Iterator[bytes]:
    """Every file below, in no order; hidden ones and what is in hidden directories left out."""
    stack, seen = [b""], set()
    while stack:
        directory = stack.pop()
        identity = root.identity(directory)
        if identity in seen:
            continue
        seen.add(identity)
        for name, kind in root.scan_names(directory):
            if is_hidden(name):
                continue
            if kind == FileType.Directory:
                stack.append(os.path.join(directory, name))
            elif kind == FileType.File:
                yield os.path.join(directory, name)
