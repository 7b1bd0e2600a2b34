"""Export to the Hugging Face hub: a dataset of images and texts, as Parquet files with a dataset card.

The files are uploaded one after the other and appear together in one commit at the end, so that the repository never
holds half of a dataset. The same table and settings give the same files, and the hub does not take a file twice, so
that an interrupted upload continues where it stopped.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.config import ExportConfig
from captioner.console.text import counted
from captioner.errors import OutputError, UsageError
from captioner.files import hub_reason
from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import relative_path
from captioner.publishing.exports.imagefolder import dataset_card
from captioner.publishing.exports.select import CHOSEN_SCHEMA, PROVENANCE
from captioner.publishing.exports.suffixes import with_format_suffix

SHARD_BYTES = 400_000_000
GROUP_ROWS = 32  # images of a row group, which are in memory together
_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_COLUMNS = {"text": "alt_text", "image_id": "image_id", "machine_caption": "caption", "language": "language"}
_SOURCES = _COLUMNS | {name: name for name in PROVENANCE}  # column of the dataset -> column of CHOSEN_SCHEMA


def checked_repository(settings: ExportConfig) -> str:
    """Return DEST as a repository. Raises UsageError where it is not one, or where the hub cannot be reached."""
    from huggingface_hub import constants

    if not _REPOSITORY.fullmatch(settings.path):
        raise UsageError(f"DEST {settings.path or '(none)'}: with --to hub name a repository, OWNER/NAME")
    if constants.HF_HUB_OFFLINE and not settings.dry_run:
        raise UsageError("--to hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or use --to parquet")
    return settings.path


def write(texts: Iterator[pa.Table], export: Export, api: Any = None) -> None:
    """Upload the images and their texts. A new repository is private.

    Images that cannot be read are left out and reported. `api`: the client of the hub. Raises OutputError where the
    upload fails, or where the repository holds a dataset and --update is not given.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    try:
        _upload(texts, export, api)
    except (OutputError, UsageError):
        raise
    except Exception as error:  # which exceptions the client raises depends on its version
        raise _failure(export, error) from None


def _upload(texts: Iterator[pa.Table], export: Export, api: Any) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    target: dict[str, Any] = {"repo_id": export.settings.path, "repo_type": "dataset"}
    api.create_repo(**target, private=True, exist_ok=True)
    before = [name for name in api.list_repo_files(**target) if name.startswith("data/")]
    if before and not export.settings.update:
        raise OutputError(
            f"{export.settings.path} holds a dataset already ({counted(len(before), 'file')} in data/); --update "
            "replaces it, or give another DEST"
        )
    languages: set[str] = set()
    added: list[CommitOperationAdd] = []
    with tempfile.TemporaryDirectory(prefix="captioner-hub-") as folder:
        for file in _shards(texts, export, languages, Path(folder)):
            operation = CommitOperationAdd(f"data/{file.name}", str(file))
            api.preupload_lfs_files(**target, additions=[operation])
            if not operation.path_or_fileobj:  # it is on the hub
                file.unlink()
            added.append(operation)
        names = {operation.path_in_repo for operation in added}
        removed = [CommitOperationDelete(name) for name in before if name not in names]
        card = dataset_card(export, languages, "data/*.parquet").encode()
        operations = [*added, *removed, CommitOperationAdd("README.md", card)]
        api.create_commit(**target, operations=operations, commit_message="Images and texts of a captions table")


def _failure(export: Export, error: Exception) -> Exception:
    reason = hub_reason(error)
    return OutputError(f"{export.settings.path}: the upload failed: {reason}; run the same command to continue")


def _shards(texts: Iterator[pa.Table], export: Export, languages: set[str], folder: Path) -> Iterator[Path]:
    """Yield Parquet files of about SHARD_BYTES, one at a time, and collect the languages of the texts."""
    groups = _row_groups(texts, export, languages)
    for number, first in enumerate(groups):
        path = folder / f"train-{number:05d}.parquet"
        with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
            writer.write_table(first)
            while path.stat().st_size < SHARD_BYTES and (group := next(groups, None)) is not None:
                writer.write_table(group)
        yield path


def _row_groups(texts: Iterator[pa.Table], export: Export, languages: set[str]) -> Iterator[pa.Table]:
    schema = _schema()
    rows: list[dict[str, Any]] = []
    for table in texts:
        for row, raw in export.originals.read(table):
            if raw.data is None:
                export.tally.leave_out(row, f"image cannot be read: {raw.error_code}")
                continue
            languages.update(filter(None, [row["language"]]))
            name = with_format_suffix(relative_path(row["image_id"]), raw.data).as_posix()
            values = {column: row[source] for column, source in _SOURCES.items()}
            rows.append({"image": {"bytes": raw.data, "path": name}, **values})
            if len(rows) == GROUP_ROWS:
                yield pa.Table.from_pylist(rows, schema)
                rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema)


def _schema() -> pa.Schema:
    """Return the columns; their metadata tells `datasets` that the image is one."""
    from datasets import Features, Image

    image = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    others = [CHOSEN_SCHEMA.field(source).with_name(name) for name, source in _SOURCES.items()]
    features = Features.from_arrow_schema(pa.schema([image, *others]))
    schema: pa.Schema = Features({**features, "image": Image()}).arrow_schema
    return schema
