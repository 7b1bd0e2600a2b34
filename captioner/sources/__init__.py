"""Open a source of images of any kind."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileType

from captioner.config import CaptionConfig, SourceConfig, settings_of
from captioner.console.text import counted
from captioner.data import Source
from captioner.errors import SourceError, UsageError
from captioner.files import did_you_mean, is_uri
from captioner.sources.columns import Columns, choose_columns, untyped_columns
from captioner.sources.detect import is_glob, look_into, match_glob
from captioner.sources.folder import FolderSource
from captioner.sources.huggingface import HuggingFaceSource
from captioner.sources.manifest import ManifestSource
from captioner.sources.pages import PagedSource
from captioner.sources.parquet import ParquetSource
from captioner.sources.plan_rows import FilteredSource, WrappedSource
from captioner.sources.root import FETCH_FIRST, HEAD_BYTES, Root, is_excluded, is_ignored
from captioner.sources.splits import choose_split, splits_of
from captioner.sources.tables import TABLE_SUFFIXES, open_table
from captioner.sources.webdataset import COMPRESSED_SUFFIXES, IMAGE_SUFFIXES, WebDatasetSource

__all__ = ["FLAGS_OF_KINDS", "check_exists", "describe", "open_source", "reopen_source"]

LOOK_FOR_TYPES = 100  # tables, where the columns of the first one hold only nulls
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


_KINDS = {
    FolderSource: "folder",
    WebDatasetSource: "tars",
    ParquetSource: "parquet",
    HuggingFaceSource: "dataset",
    ManifestSource: "manifest",
}
_NAMES = {
    "folder": "a folder of images",
    "tars": "a WebDataset (tars)",
    "parquet": "a table of images",
    "dataset": "a Hugging Face dataset",
    "manifest": "a manifest (a table of paths)",
}
_TABLES = ("parquet", "dataset", "manifest")
# Flags that only some kinds of source take, by their fields, and the way out for the others. Every kind takes the rest.
FLAGS_OF_KINDS = {
    "split": (("tars", *_TABLES), "choose images with --include"),
    "image_column": (_TABLES, "it has no columns"),
    "id_column": (_TABLES, "it has no columns"),
    "keep_columns": (_TABLES, "it has no columns"),
    "pages": (("folder", "tars", "manifest"), "unpack its images into files first"),
}


def open_source(config: SourceConfig, refuse_flags: bool = True) -> Source:
    """Open the source at `config.path`; its kind follows from its name and its files.

    A table file is a manifest, or a table of images; a tar, a glob of tars or a folder of tars is a WebDataset, and the
    same for Parquet; a saved dataset is recognised by its JSON files; a name that is not a path is a hub id; everything
    else is a folder. Raises SourceError where there is nothing, and UsageError where a flag has no meaning for that
    kind; without `refuse_flags` such flags are ignored.
    """
    source = _open(config, refuse_flags)
    if refuse_flags:
        _refuse_flags(config, _KINDS[type(source)])
    if config.pages == "all" and isinstance(source, FolderSource | WebDatasetSource | ManifestSource):
        source = PagedSource(source)
    if config.include or config.exclude:
        return FilteredSource(source, tuple(config.include), tuple(config.exclude))
    return source


def reopen_source(settings: Mapping[str, Any]) -> Source:
    """Open the source of a table by the settings in its table.json. Those of earlier versions always have a split."""
    return open_source(SourceConfig.model_validate(settings), refuse_flags=False)


def _refuse_flags(config: SourceConfig, kind: str) -> None:
    """Raise UsageError for a flag that has no meaning for a kind of source."""
    for setting in settings_of(CaptionConfig):
        if setting.group == "source" and setting.field in FLAGS_OF_KINDS:
            kinds, way_out = FLAGS_OF_KINDS[setting.field]
            value = getattr(config, setting.field)
            if kind not in kinds and value != setting.info.get_default():
                shown = ",".join(value) if isinstance(value, list) else value
                raise UsageError(f"{setting.flag} {shown}: {config.path} is {_NAMES[kind]}; {way_out}")
    if config.take_as not in ("auto", kind):
        raise UsageError(f"--as {config.take_as}: {config.path} is {_NAMES[kind]}")


def _open(config: SourceConfig, refuse_flags: bool) -> Source:
    path = config.path
    if not path:
        raise UsageError("no source is given: name a folder, tar, table, dataset or manifest")
    if path.lower().startswith(("http://", "https://")):
        raise SourceError(f"{path}: {FETCH_FIRST}")
    root = Root.at(path)
    if is_glob(path) and not root.exists():
        return _open_files(config, *match_glob(path), "it is a glob", refuse_flags)
    hub_id = path.removeprefix("hf://datasets/").rstrip("/")
    is_hub_id = bool(_HUB_ID.fullmatch(hub_id)) and not path.startswith(".")
    kind = FileType.NotFound if is_hub_id and is_uri(path) else root.kind()
    if kind == FileType.File:
        root, name = root.folder_and_name()
        if _is_image(root, name):
            return FolderSource(config.path, root, config.reference_column, only=name)
        return _open_files(config, root, [name], "its name says so", refuse_flags)
    if kind == FileType.Directory:
        return _open_directory(config, root, refuse_flags)
    if is_hub_id:
        return HuggingFaceSource.open(config, hub_id)
    raise SourceError(f"{path}: no such file or directory{did_you_mean(path)}")


def check_exists(path: str) -> None:
    """Raise SourceError where `path` can only be a local file or folder, and is not there."""
    may_be_elsewhere = is_uri(path) or is_glob(path) or _HUB_ID.fullmatch(path.rstrip("/"))
    if not may_be_elsewhere and not Root.at(path).exists():
        raise SourceError(f"{path}: no such file or directory{did_you_mean(path)}")


def _is_image(root: Root, name: bytes) -> bool:
    """Return whether one file is an image by its name, or else by its first bytes."""
    lower = name.lower()
    if os.path.splitext(lower)[1][1:] in IMAGE_SUFFIXES:
        return True
    if lower.endswith((b".tar", *COMPRESSED_SUFFIXES, *TABLE_SUFFIXES)) or is_ignored(name):
        return False
    from captioner.imaging.formats import why_not_an_image

    try:
        head = root.read(name, 0, HEAD_BYTES)
    except OSError:
        head = b""
    return bool(head) and why_not_an_image(head) is None


def _open_directory(config: SourceConfig, root: Root, refuse_flags: bool) -> Source:
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
        return _open_files(config, root, files, reason, refuse_flags)
    return FolderSource(config.path, root, config.reference_column, tuple(config.exclude), reason)


def _is_saved_dataset(root: Root) -> bool:
    """Return whether `datasets` saved a dataset here: files with these names alone prove nothing."""
    return _contains(root, b"dataset_dict.json", b'"splits"') or (
        _contains(root, b"state.json", b'"_data_files"') and root.exists(b"dataset_info.json")
    )


def _contains(root: Root, name: bytes, text: bytes) -> bool:
    try:
        return text in root.read(name, 0, 1 << 20)
    except OSError:
        return False


def _open_files(config: SourceConfig, root: Root, files: list[bytes], reason: str, refuse_flags: bool) -> Source:
    """Open files that are all tars, or all tables."""
    files = [file for file in files if not is_excluded(file + b"/", config.exclude)] or files
    suffixes = {os.path.splitext(file.lower())[1] for file in files}
    is_tars = all(file.lower().endswith((b".tar", *COMPRESSED_SUFFIXES)) for file in files)
    if not is_tars and (len(suffixes) != 1 or not suffixes <= set(TABLE_SUFFIXES)):
        names = b", ".join(sorted(suffixes)).decode("utf-8", "replace")
        if len(files) == 1 and suffixes <= {b".zip", b".rar", b".7z"}:
            raise SourceError(f"{config.path}: an archive that is not read; unpack it and give the folder")
        if len(files) == 1:
            raise SourceError(f"{config.path}: neither an image, a tar nor a table (.parquet, .csv, .tsv, .jsonl)")
        raise SourceError(f"{config.path}: expected files of one kind, but there are {names}")
    files, split = _files_of_split(config, root, files, refuse_flags)
    reason = "; ".join(filter(None, [reason, split]))
    if is_tars:
        return WebDatasetSource(config.path, root, tuple(files), config.reference_column, reason)
    columns = _columns_of_first(config, root, files)
    holds_images = suffixes == {b".parquet"} and columns.kind != "path"  # else a struct has only paths
    kind = ParquetSource if holds_images else ManifestSource
    return kind(config.path, root, tuple(files), columns, reason)


def _files_of_split(
    config: SourceConfig, root: Root, files: list[bytes], refuse_flags: bool
) -> tuple[list[bytes], str]:
    """Return the files of --split, or of its default, and a note for a person that says which."""
    is_directory = root.location == Root.at(config.path).location  # otherwise the user named the files
    splits = splits_of(root, files) if config.split or is_directory else {}
    if config.split and not splits:
        if refuse_flags:
            no_splits = "says a split, as train-00000-of-00001.parquet or test/0.tar do"
            raise UsageError(f"--split {config.split}: no file name in {config.path} {no_splits}")
        return files, ""
    return choose_split(files, splits, config.split, config.path)


def describe(source: Source) -> str:
    """Return what a source was taken for, and why, in one line."""
    while isinstance(source, WrappedSource):
        source = source.source
    match source:
        case FolderSource() if source.only:
            return "taken for one image"
        case FolderSource():
            return f"taken for a folder of images: {source.reason}"
        case WebDatasetSource():
            return f"taken for WebDataset, {counted(len(source.tars), 'tar')}: {source.reason}"
        case ParquetSource():
            where = f"images in column {source.columns.image!r}"
            return f"taken for {counted(len(source.files), 'table')} with {where}: {source.reason}"
        case ManifestSource():
            where = f"paths in column {source.columns.image!r}"
            return f"taken for a manifest, {counted(len(source.files), 'table')} with {where}: {source.reason}"
        case HuggingFaceSource():
            return f"taken for a Hugging Face dataset, split {source.split!r}"
    return "a captions table, with the images of its source"


def _columns_of_first(config: SourceConfig, root: Root, files: list[bytes]) -> Columns:
    """Return the columns of the first table that has images. Raises SourceError where none has: why, of the first."""
    first_error: SourceError | None = None
    for number, file in enumerate(files, start=1):
        try:
            schema = open_table(root, file, config.reference_column).schema
            schema = _with_types(schema, config, root, files[number : number + LOOK_FOR_TYPES])
            return choose_columns(schema, config, root.uri(file))
        except SourceError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _with_types(schema: pa.Schema, config: SourceConfig, root: Root, others: list[bytes]) -> pa.Schema:
    """Return the schema of a table in which columns that hold only nulls have the type they have in another table."""
    for file in others:
        names = untyped_columns(schema, config)
        if not names:
            break
        try:
            other = open_table(root, file, config.reference_column).schema
        except SourceError:
            continue  # the listing tells of it
        for name in names:
            if other.names.count(name) == 1:
                schema = schema.set(schema.names.index(name), other.field(name))
    return schema
