"""Hugging Face's ImageFolder: the pictures, metadata.jsonl with `file_name` and `text`, and a dataset card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner.publishing.exports.context import Export, write_line
from captioner.publishing.exports.destination import inside, new_folder, write_new
from captioner.publishing.exports.select import provenance
from captioner.publishing.exports.suffixes import free_name, with_own_suffix

_CARD = """---
task_categories:
- image-to-text
{language}configs:
- config_name: default
  data_files: "**"
---

# Pictures with alt texts

{count:,} pictures with the alt texts that were chosen from a captions table by `captioner export`.

| review status | texts |
|---|---|
{statuses}

`text` is the alt text, `machine_caption` what the model wrote at first, `text_by` who wrote the text ("machine" or
"person"), `reviewer` and `reviewed_at` who let it pass and when. `model`, `model_revision`, `model_sha256` and `run_id`
say what made it. Texts of status `unreviewed` were read by nobody.
"""


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Pictures keep their bytes and, where possible, their names. One that cannot be read is left out and named."""
    with new_folder(export.dest, export.record) as folder:
        languages: set[str] = set()
        with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
            for table in texts:
                for row, raw in export.pictures.read(table):
                    if raw.data is None:
                        export.tally.leave_out(row, f"picture cannot be read: {raw.error_code}")
                        continue
                    name = _put_picture(folder, row, raw.data)
                    languages.update(filter(None, [row["language"]]))
                    write_line(metadata, _line(name, row))
        (folder / "README.md").write_text(_card(export, languages), encoding="utf-8")


def _put_picture(folder: Path, row: dict[str, Any], data: bytes) -> str:
    """Write one picture; returns its name. Two ids that make the same name get different ones."""
    path = free_name(folder, with_own_suffix(inside(row["image_id"]), data))
    write_new(path, data)
    return path.relative_to(folder).as_posix()


def _line(name: str, row: dict[str, Any]) -> dict[str, Any]:
    own = {"file_name": name, "text": row["alt_text"], "image_id": row["image_id"]}
    return own | {"machine_caption": row["caption"], "language": row["language"], **provenance(row)}


def _card(export: Export, languages: set[str]) -> str:
    counts = {status: count for status, count in export.tally.written.items() if count}
    return _CARD.format(
        language="".join(["language:\n", *(f"- {name}\n" for name in sorted(languages))]) if languages else "",
        count=sum(counts.values()),
        statuses="\n".join(f"| {status} | {count:,} |" for status, count in sorted(counts.items())),
    )
