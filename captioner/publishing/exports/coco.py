"""Export COCO captions: the dataset that `COCO(...)` of pycocotools opens, or the results that `COCO.loadRes` reads.

Provenance is in extra keys, which pycocotools ignores.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, TextIO

import pyarrow as pa

from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import new_file
from captioner.publishing.exports.select import provenance

_COCO_NAME = re.compile(r"(\d{12})\.\w+$")  # 000000391895.jpg, COCO_val2014_000000391895.jpg
_FIRST_OTHER_ID = 10**12  # above every number of twelve digits


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write a dataset of `images` and `annotations`, or with --coco-results a list of results."""
    rows = (row for table in texts for row in table.to_pylist())
    with new_file(export.dest) as path, path.open("w", encoding="utf-8") as file:
        if export.settings.coco_results:
            _write_list(file, map(_result, rows))
            file.write("\n")
        else:
            _write_dataset(file, rows, export.record)


def _write_dataset(file: TextIO, rows: Iterator[dict[str, Any]], record: dict[str, Any]) -> None:
    image_id_of = _ImageIds()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as annotations:
        file.write(f'{{"info": {json.dumps(record, ensure_ascii=False)},\n"licenses": [],\n"images": ')
        annotation_list = _ListWriter(annotations)
        image_list = _ListWriter(file)
        for number, row in enumerate(rows, start=1):
            image_id = image_id_of(row["image_id"])
            image_list.add(
                {"id": image_id, "file_name": row["image_id"], "width": row["width"], "height": row["height"]}
            )
            annotation_list.add({"id": number, "image_id": image_id, "caption": row["alt_text"], **provenance(row)})
        image_list.end()
        annotation_list.end()
        annotations.seek(0)
        file.write(',\n"annotations": ')
        shutil.copyfileobj(annotations, file)
        file.write("}\n")


def _result(row: dict[str, Any]) -> dict[str, Any]:
    image_id = coco_id(row["image_id"])
    return {"image_id": image_id, "caption": row["alt_text"], "file_name": row["image_id"], **provenance(row)}


class _ListWriter:
    """Writes a JSON list item by item, one line each."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._is_empty = file, True

    def add(self, item: dict[str, Any]) -> None:
        self._file.write(("[\n" if self._is_empty else ",\n") + json.dumps(item, ensure_ascii=False))
        self._is_empty = False

    def end(self) -> None:
        self._file.write("[]" if self._is_empty else "\n]")


def _write_list(file: TextIO, items: Iterator[dict[str, Any]]) -> None:
    writer = _ListWriter(file)
    for item in items:
        writer.add(item)
    writer.end()


class _ImageIds:
    """Gives each image an integer id of its own: the number in a name of COCO's pattern, or else a larger number."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._next = _FIRST_OTHER_ID

    def __call__(self, image_id: str) -> int:
        number = coco_id(image_id)
        if isinstance(number, str) or number in self._used:
            number, self._next = self._next, self._next + 1
        else:
            self._used.add(number)
        return number


def coco_id(image_id: str) -> int | str:
    """Return the number in a file name of COCO's pattern, or else the image id unchanged."""
    match = _COCO_NAME.search(image_id)
    return int(match.group(1)) if match else image_id
