"""Open a source of images of any kind."""

from __future__ import annotations

import glob
import os
import re

import pyarrow as pa
from pyarrow.fs import FileType

from captioner.config import SourceConfig
from captioner.data import Source
from captioner.errors import SourceError, UsageError
from captioner.files import is_uri
from captioner.sources.columns import choose_columns
from captioner.sources.detect import look_into, match_glob
from captioner.sources.folder import FolderSource
from captioner.sources.huggingface import HuggingFaceSource
from captioner.sources.manifest import ManifestSource
from captioner.sources.pages import PagedSource
from captioner.sources.parquet import ParquetSource
from captioner.sources.plan_rows import FilteredSource, WrappedSource
from captioner.sources.root import FETCH_FIRST, Root, is_excluded
from captioner.sources.tables import TABLE_SUFFIXES, UnreadableTableError, open_table
from captioner.sources.webdataset import COMPRESSED_SUFFIXES, WebDatasetSource

__all__ = ["describe", "open_source"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(config: SourceConfig) -> Source:
    """Open the source at `config.path`; its kind follows from its name and its files.

    A table file is a manifest, or a table of images; a tar, a glob of tars or a folder of tars is a WebDataset, and the
    same for Parquet; a saved dataset is recognised by its JSON files; a name that is no path is a hub id; everything
    else is a folder. Raises SourceError where there is nothing, UsageError where a flag has no meaning for that kind.
    """
    source = _open(config)
    if config.pages == "all":
        if not isinstance(source, FolderSource | WebDatasetSource | ManifestSource):
            raise UsageError(f"--pages all: {config.path} holds images in a table; unpack them into files first")
        source = PagedSource(source)
    if config.include or config.exclude:
        return FilteredSource(source, tuple(config.include), tuple(config.exclude))
    return source


def _open(config: SourceConfig) -> Source:
    path = config.path
    if not path:
        raise UsageError("no source is given: name a folder, tar, table, dataset or manifest")
    if path.lower().startswith(("http://", "https://")):
        raise SourceError(f"{path}: {FETCH_FIRST}")
    root = Root.at(path)
    if glob.has_magic(path) and not root.exists():
        return _open_files(config, *match_glob(path))
    hub_id = path.removeprefix("hf://datasets/").rstrip("/")
    is_hub_id = bool(_HUB_ID.fullmatch(hub_id)) and not path.startswith(".")
    kind = FileType.NotFound if is_hub_id and is_uri(path) else root.kind()
    if kind == FileType.File:
        folder, _, name = os.fsencode(root.location).rpartition(b"/")
        return _open_files(config, Root(os.fsdecode(folder or b"/")), [name])
    if kind == FileType.Directory:
        return _open_directory(config, root)
    if is_hub_id:
        return HuggingFaceSource.open(config, hub_id)
    raise SourceError(f"{path}: no such file or directory")


def _open_directory(config: SourceConfig, root: Root) -> Source:
    kind = config.take_as
    if kind == "dataset" or (kind == "auto" and not is_uri(root.location) and _is_saved_dataset(root)):
        return HuggingFaceSource.open(config, root.location)
    if kind == "manifest":
        raise UsageError(f"--as manifest: {config.path} is a folder; name the table in it")
    content = look_into(root, config.exclude)
    files = {"tars": sorted(content.tars), "parquet": sorted(content.tables), "folder": []}.get(kind, content.archives)
    if kind in ("tars", "parquet") and not files:
        raise UsageError(f"--as {kind}: {config.path} holds none: {content.reason}")
    reason = f"--as {kind}" if kind != "auto" else content.reason
    if files:
        return _open_files(config, root, files, reason)
    _refuse_column_flags(config, "a folder of images")
    return FolderSource(config.path, root, config.reference_column, tuple(config.exclude), reason)


def _is_saved_dataset(root: Root) -> bool:
    """Return whether `datasets` saved a dataset here: a single file of one of these names may be anybody's."""
    has_dict = root.exists(b"dataset_dict.json")
    return has_dict or all(root.exists(name) for name in (b"state.json", b"dataset_info.json"))


def _open_files(config: SourceConfig, root: Root, files: list[bytes], reason: str = "its name says so") -> Source:
    """Open files that are all tars, or all tables."""
    files = [file for file in files if not is_excluded(file + b"/", config.exclude)] or files
    suffixes = {os.path.splitext(file.lower())[1] for file in files}
    if suffixes == {b".tar"} or all(file.lower().endswith(COMPRESSED_SUFFIXES) for file in files):
        _refuse_column_flags(config, "a WebDataset")
        return WebDatasetSource(config.path, root, tuple(files), config.reference_column, reason)
    if len(suffixes) != 1 or not suffixes <= set(TABLE_SUFFIXES):
        names = b", ".join(sorted(suffixes)).decode("utf-8", "replace")
        raise SourceError(f"{config.path}: expected files of one kind, but there are {names}")
    file, schema = _first_schema(root, files)
    columns = choose_columns(schema, config, root.uri(file))
    kind = ManifestSource if columns.kind == "path" else ParquetSource
    wanted = {"parquet": ParquetSource, "manifest": ManifestSource}.get(config.take_as, kind)
    if wanted is not kind:
        held = schema.field(columns.image).type
        raise UsageError(f"--as {config.take_as}: column {columns.image!r} of {config.path} is {held}")
    return kind(config.path, root, tuple(files), columns, reason)


def describe(source: Source) -> str:
    """Return what a source was taken for, and why, in one line."""
    while isinstance(source, WrappedSource):
        source = source.source
    match source:
        case FolderSource():
            return f"taken for a folder of images: {source.reason}"
        case WebDatasetSource():
            return f"taken for WebDataset, {len(source.tars):,} tars: {source.reason}"
        case ParquetSource():
            where = f"images in column {source.columns.image!r}"
            return f"taken for {len(source.files):,} tables with {where}: {source.reason}"
        case ManifestSource():
            where = f"paths in column {source.columns.image!r}"
            return f"taken for a manifest, {len(source.files):,} tables with {where}: {source.reason}"
    return "taken for a Hugging Face dataset"


def _first_schema(root: Root, files: list[bytes]) -> tuple[bytes, pa.Schema]:
    """Return the first table that can be opened, and its schema. Raises SourceError where none can."""
    for file in files[:-1]:
        try:
            return file, open_table(root, file).schema
        except UnreadableTableError:
            continue
    return files[-1], open_table(root, files[-1]).schema


def _refuse_column_flags(config: SourceConfig, kind: str) -> None:
    given = {
        "--image-column": config.image_column,
        "--id-column": config.id_column,
        "--keep-columns": config.keep_columns,
    }
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag}: {config.path} is {kind} and has no columns")
