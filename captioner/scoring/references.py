"""Known captions from a file: COCO captions, metadata.jsonl, CSV, Parquet, or `.txt` files beside the pictures.

A picture is found by its image id, else by the end of its path, else by its file name, else by that name without suffix
(ids of COCO's annotations, `.txt` beside `.jpg`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.errors import SourceError, UsageError
from captioner.files import open_filesystem
from captioner.sources.columns import as_captions
from captioner.sources.root import Root
from captioner.sources.tables import TABLE_SUFFIXES, Table, open_table, read_batches

KEY_NAMES = ("image_id", "file_name", "filename", "file", "path", "image_path", "uri", "image", "id", "key")
CAPTION_NAMES = ("reference_captions", "captions", "references", "caption", "text", "reference")
_MAX_EXAMPLES = 5


class References:
    """Captions by picture, in memory (about half a gigabyte for a million pictures with two each). `unmatched()` tells
    which were never asked for."""

    def __init__(self, name: str, captions: dict[str, list[str]]) -> None:
        self.name = name
        self.captions = captions
        self._taken: dict[str, str] = {}

    def find(self, image_id: str) -> list[str] | None:
        """The captions of a picture, or `None`.

        Raises UsageError where two pictures find the same captions by their file names.
        """
        key = self._key_of(image_id)
        if key is None:
            return None
        before = self._taken.setdefault(key, key if key == image_id else image_id)
        if before != image_id:
            raise UsageError(
                f"{self.name}: {key!r} fits both {before!r} and {image_id!r}; give references by full image id"
            )
        return self.captions[key]

    def _key_of(self, image_id: str) -> str | None:
        if image_id in self.captions:
            return image_id
        path = PurePosixPath(image_id)
        for start in range(1, len(path.parts)):
            ending = "/".join(path.parts[start:])
            if ending in self.captions:
                return ending
        return next((key for loose in _loose_names(image_id) if (key := self._names.get(loose))), None)

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """File name or stem -> the key; `None` where several have it. Made when an id is first not found as it is."""
        names: dict[str, str | None] = {}
        for key in self.captions:
            for loose in _loose_names(key):
                names[loose] = key if names.get(loose, key) == key else None
        return names

    def unmatched(self) -> tuple[int, list[str]]:
        """How many keys no picture had, and examples."""
        rest = (key for key in self.captions if key not in self._taken)
        examples = [key for key, _ in zip(rest, range(_MAX_EXAMPLES), strict=False)]
        return len(self.captions) - len(self._taken), examples


def read_references(location: str) -> References:
    """Raises SourceError where the file cannot be read or holds no captions, naming what is accepted."""
    root = Root.at(location)
    if not root.exists():
        raise SourceError(f"--references {location}: no such file or directory")
    if os.path.isdir(location):
        pairs: Iterable[tuple[str, Any]] = _beside_pictures(Path(location))
    elif location.lower().endswith(".json"):
        pairs = _coco(location)
    else:
        pairs = _rows(location)
    captions: dict[str, list[str]] = {}
    for key, value in pairs:
        captions.setdefault(key, []).extend(as_captions(value) or [])
    captions = {key: known for key, known in captions.items() if known}
    if not captions:
        raise SourceError(f"--references {location}: holds no caption")
    return References(location, captions)


def _loose_names(key: str) -> list[str]:
    name = key.rpartition("/")[2]
    stem = name.rpartition(".")[0] or name
    return [name] if stem == name else [name, stem]


def _beside_pictures(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A caption on each line of `NAME.txt`."""
    metadata = next((folder / name for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet")), None)
    files = sorted(folder.rglob("*.txt"))
    if not files and metadata is not None and metadata.exists():
        yield from _rows(str(metadata))
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        yield file.relative_to(folder).with_suffix("").as_posix(), text.splitlines()


def _coco(location: str) -> Iterator[tuple[str, str]]:
    """`{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`; or {name: caption or captions}."""
    try:
        filesystem, path = open_filesystem(location)
        with filesystem.open_input_stream(path) as stream:
            tree = json.loads(stream.read())
    except (OSError, ValueError) as error:
        raise SourceError(f"--references {location}: cannot be read as JSON: {error}") from None
    if isinstance(tree, dict) and "annotations" in tree:
        names = {image["id"]: image.get("file_name", str(image["id"])) for image in tree.get("images", [])}
        for note in tree["annotations"]:
            if "caption" in note:
                yield names.get(note["image_id"], str(note["image_id"])), note["caption"]
    elif isinstance(tree, dict):
        yield from tree.items()
    else:
        raise SourceError(
            f"--references {location}: expected COCO captions (images, annotations) or {{name: captions}}"
        )


def _rows(location: str) -> Iterator[tuple[str, Any]]:
    """A table with a column of names and one of captions; a name may come on several rows."""
    if not location.lower().endswith(tuple(suffix.decode() for suffix in TABLE_SUFFIXES)):
        raise SourceError(
            f"--references {location}: expected COCO .json, .jsonl, .csv, .parquet, or a folder of .txt files"
        )
    folder, _, name = location.rpartition("/")
    root, file = Root.at(folder or ("/" if location.startswith("/") else ".")), os.fsencode(name)
    table: Table = open_table(root, file)
    key, caption = _column(table, KEY_NAMES, location), _column(table, CAPTION_NAMES, location)
    for batch in read_batches(root, file, table, [key, caption]):
        for name_, value in zip(batch[key].to_pylist(), batch[caption].to_pylist(), strict=True):
            if name_ is not None:
                yield str(name_), value


def _column(table: Table, known: tuple[str, ...], location: str) -> str:
    names = table.schema.names
    found = next((name for name in known if name in names), None)
    if found is None:
        raise SourceError(f"--references {location}: no column named {' or '.join(known)}; it has: {', '.join(names)}")
    return found
