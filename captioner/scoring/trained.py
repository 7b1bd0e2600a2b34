"""The pictures a model was trained on: captions of them say nothing about others."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileType

from captioner.files import open_filesystem
from captioner.store.table import CaptionsTable

TRAINING_IMAGES = "training_images.parquet"


def trained_pictures(table: CaptionsTable) -> frozenset[str]:
    """sha256 of the pictures in the model directory's training_images.parquet; empty where there is none."""
    name = (table.info.get("model") or {}).get("name", "")
    if table.directory.exists("run.json"):
        name = (table.directory.read_json("run.json").get("model") or {}).get("path") or name
    if not name:
        return frozenset()
    filesystem, path = open_filesystem(f"{name}/{TRAINING_IMAGES}")
    if filesystem.get_file_info(path).type != FileType.File:
        return frozenset()
    column: pa.ChunkedArray = pq.read_table(filesystem.open_input_file(path), columns=["sha256"])["sha256"]
    return frozenset(column.drop_null().to_pylist())
