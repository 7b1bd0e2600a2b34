"""Export a Hugging Face ImageFolder: the images, metadata.jsonl with `file_name` and `text`, and a dataset card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner.publishing.exports.context import Export, write_line
from captioner.publishing.exports.destination import new_folder, relative_path, write_new
from captioner.publishing.exports.select import provenance
from captioner.publishing.exports.suffixes import unused_path, with_format_suffix

_CARD = """---
task_categories:
- image-to-text
{language}configs:
- config_name: default
  data_files: "{data_files}"
---

# Images with {texts}

{count:,} images with {texts}, exported from a captions table by `captioner export`.

| review status | texts |
|---|---|
{statuses}

`text` is {text}, `machine_caption` the model's original caption, `text_by` who wrote the text ("machine",
"person", or "source" where it came with the image), `reviewer` and `reviewed_at` who reviewed it and when. `model`,
`model_revision` and `model_sha256` identify the model of a text, `run_id` the run. Texts of status `unreviewed` have
not been reviewed by a person.
"""


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write the images with their own bytes and, where possible, their names.

    Images that cannot be read are left out and reported.
    """
    with new_folder(export.dest, export.record) as folder:
        languages: set[str] = set()
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for table in texts:
                for row, raw in export.originals.read(table):
                    if raw.data is None:
                        export.tally.leave_out(row, f"image cannot be read: {raw.error_code}")
                        continue
                    name = _write_image(folder, row, raw.data)
                    languages.update(filter(None, [row["language"]]))
                    write_line(metadata, _line(name, row))
        (folder / "README.md").write_text(dataset_card(export, languages, "**"), encoding="utf-8")


def _write_image(folder: Path, row: dict[str, Any], data: bytes) -> str:
    """Write one image and return its name. Two ids that give the same name get different ones."""
    path = unused_path(folder, with_format_suffix(relative_path(row["image_id"]), data))
    write_new(path, data)
    return path.relative_to(folder).as_posix()


def _line(name: str, row: dict[str, Any]) -> dict[str, Any]:
    own = {"file_name": name, "text": row["alt_text"], "image_id": row["image_id"]}
    return own | {"machine_caption": row["caption"], "language": row["language"], **provenance(row)}


def dataset_card(export: Export, languages: set[str], data_files: str) -> str:
    """Return the README.md of a dataset. `data_files`: a glob of the files that hold it."""
    field = export.settings.field
    counts = {status: count for status, count in export.tally.written.items() if count}
    return _CARD.format(
        language="".join(["language:\n", *(f"- {name}\n" for name in sorted(languages))]) if languages else "",
        data_files=data_files,
        texts="alt texts" if field is None else "texts",
        text="the alt text" if field is None else f"column `{field}` of the table",
        count=sum(counts.values()),
        statuses="\n".join(f"| {status} | {count:,} |" for status, count in sorted(counts.items())),
    )
