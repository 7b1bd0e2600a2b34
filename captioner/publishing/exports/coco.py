"""Export COCO caption results: the list that `COCO.loadRes` of pycocotools reads.

Provenance is in extra keys, which pycocotools ignores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pyarrow as pa

from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import new_file
from captioner.publishing.exports.select import provenance

_COCO_NAME = re.compile(r"(\d{12})\.\w+$")  # 000000391895.jpg, COCO_val2014_000000391895.jpg


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write one JSON list with an object for each text."""
    with new_file(export.dest) as path, path.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for rows in texts:
            for row in rows.to_pylist():
                result = {"image_id": coco_id(row["image_id"]), "caption": row["alt_text"]}
                result |= {"file_name": row["image_id"], **provenance(row)}
                file.write(separator + json.dumps(result, ensure_ascii=False))
                separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")


def coco_id(image_id: str) -> int | str:
    """Return the number in a file name of COCO's pattern, or else the image id unchanged."""
    match = _COCO_NAME.search(image_id)
    return int(match.group(1)) if match else image_id
