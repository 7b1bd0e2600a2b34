"""Export WebDataset: tar shards in which 000000123.jpg, .txt and .json form one sample."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import new_folder, relative_path
from captioner.publishing.exports.select import provenance
from captioner.publishing.exports.suffixes import format_suffix

SHARD_BYTES, SHARD_SAMPLES = 1_000_000_000, 10_000  # WebDataset recommends shards of about 1 GB


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write DEST/00000.tar and so on; sample keys are shard and sample number, as in img2dataset.

    The text is in .txt; .json holds the image id, the model's caption and the provenance.
    """
    with new_folder(export.dest, export.record) as folder, Shards(folder) as shards:
        for table in texts:
            for row, raw in export.originals.read(table):
                if raw.data is None:
                    export.tally.leave_out(row, f"image cannot be read: {raw.error_code}")
                    continue
                facts = {"image_id": row["image_id"], "machine_caption": row["caption"], "language": row["language"]}
                sample = {
                    format_suffix(raw.data, relative_path(row["image_id"]).suffix): raw.data,
                    ".txt": row["alt_text"].encode(),
                    ".json": json.dumps(facts | provenance(row), ensure_ascii=False).encode(),
                }
                shards.add(sample)


class Shards:
    """Writes samples into tar shards and starts a new shard when one is full."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._shard, self._samples, self._bytes = -1, 0, 0

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, sample: dict[str, bytes]) -> None:
        """Add one sample, a mapping of suffix to data."""
        if self._tar is None or self._samples >= SHARD_SAMPLES or self._bytes >= SHARD_BYTES:
            self._stack.close()
            self._shard, self._samples, self._bytes = self._shard + 1, 0, 0
            path = self._folder / f"{self._shard:05d}.tar"
            self._tar = self._stack.enter_context(tarfile.open(path, "w"))  # noqa: SIM115
        for suffix, data in sample.items():
            member = tarfile.TarInfo(f"{self._shard:05d}{self._samples:04d}{suffix.lower()}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
            self._tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member in memory
            self._bytes += len(data)
        self._samples += 1
