"""Read reference captions: COCO captions, metadata.jsonl, CSV, Parquet, or `.txt` files next to the images.

An image is matched by its image id, else by the end of its path, else by its file name, else by that name without
suffix (ids of COCO's annotations, `.txt` next to `.jpg`). What is given for an image id is of no other image, whatever
its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from captioner.errors import SourceError, UsageError
from captioner.files import did_you_mean, is_uri, local_path, open_filesystem, shown
from captioner.sources.columns import as_captions
from captioner.sources.metadata import CAPTION_SUFFIXES, METADATA_NAMES, captions_in_text
from captioner.sources.root import Root
from captioner.sources.tables import SAVE_AS_UTF8, TABLE_SUFFIXES, Table, open_table, parse_json, read_batches

KEY_NAMES = ("image_id", "file_name", "filename", "file", "path", "image_path", "uri", "image", "id", "key")
CAPTION_NAMES = ("reference_captions", "captions", "references", "caption", "text", "reference")
_MAX_EXAMPLES = 5

ImageIds = Callable[[], Iterable[str]]


class References:
    """Reference captions by image, in memory: about half a gigabyte for a million images with two captions each."""

    def __init__(
        self, name: str, captions: dict[str, list[str]], columns: Sequence[str] = (), image_ids: ImageIds = tuple
    ) -> None:
        """Hold the captions of a file. `name`, `columns`, `image_ids`: as `read_references` takes them."""
        self.name = name
        self._image_ids = image_ids
        self.title = f"--references {name}"  # in messages
        self.columns = columns
        self.captions = captions
        self._matched: dict[str, str] = {}

    def find(self, image_id: str) -> list[str] | None:
        """Return the captions of an image, or `None`.

        Raises UsageError when two images match the same captions by their file names.
        """
        key = self._key_of(image_id)
        if key is None:
            return None
        first_id = self._matched.setdefault(key, image_id)
        if first_id != image_id:
            raise UsageError(
                f"{self.name}: {key!r} fits both {first_id!r} and {image_id!r}; give references by full image id"
            )
        return self.captions[key]

    def _key_of(self, image_id: str) -> str | None:
        if image_id in self.captions:
            return image_id
        return next((key for key in self._keys_like(image_id) if key not in self._ids), None)

    def _keys_like(self, image_id: str) -> Iterator[str]:
        """Yield the keys that may mean an image without being its id, the closest first."""
        path = PurePosixPath(image_id)
        endings = ("/".join(path.parts[start:]) for start in range(1, len(path.parts)))
        yield from (ending for ending in endings if ending in self.captions)
        yield from (key for name in _names_of(image_id) if (key := self._names.get(name)))

    @cached_property
    def _ids(self) -> set[str]:
        """The keys that are the id of an image."""
        return {image_id for image_id in self._image_ids() if image_id in self.captions}

    @cached_property
    def _names(self) -> dict[str, str | None]:
        """The key by file name or stem; `None` when several keys have that name."""
        names: dict[str, str | None] = {}
        for key in self.captions:
            for name in _names_of(key):
                names[name] = key if names.get(name, key) == key else None
        return names

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of all names and captions."""
        return hashlib.sha256(json.dumps(sorted(self.captions.items())).encode()).hexdigest()

    def unmatched(self) -> tuple[int, list[str]]:
        """Return the number of keys that no image matched, and examples of them."""
        unmatched = (key for key in self.captions if key not in self._matched)
        examples = list(islice(unmatched, _MAX_EXAMPLES))
        return len(self.captions) - len(self._matched), examples


def read_references(location: str, columns: Sequence[str] = (), image_ids: ImageIds = tuple) -> References:
    """Read a file or folder of references. Raises SourceError when it cannot be read or holds no captions.

    `columns`: of a table, that of names, then those of captions; without them they are found by their names.
    `image_ids`: returns the ids of all images; called once, when the first image is matched by its name.
    """
    root = Root.at(location)
    if not root.exists():
        raise SourceError(f"--references {location}: no such file or directory{did_you_mean(location)}")
    folder = None if is_uri(location) else Path(local_path(location))
    folder = folder if folder and folder.is_dir() else None
    is_json = shown(location).lower().endswith(".json")
    is_table = not folder and not is_json
    if columns and (not is_table or len(columns) < 2):
        needed = "give a column of names, then one or more of captions" if is_table else f"{location} has no columns"
        raise UsageError(f"--references-columns {','.join(columns)}: {needed}")
    if folder:
        pairs: Iterable[tuple[str, Any]] = _read_folder(folder)
    elif is_json:
        pairs = _read_json(location)
    else:
        pairs = _read_table(location, columns)
    captions: dict[str, list[str]] = {}
    for key, value in pairs:
        captions.setdefault(key, []).extend(as_captions(value) or [])
    captions = {key: texts for key, texts in captions.items() if texts}
    if not captions:
        raise SourceError(f"--references {location}: holds no caption")
    return References(location, captions, columns, image_ids)


def _names_of(key: str) -> list[str]:
    """Return the file name, and the name without suffix if it has one."""
    name = key.rpartition("/")[2]
    stem = name.rpartition(".")[0] or name
    return [name] if stem == name else [name, stem]


def _read_folder(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Read `NAME.txt` and `NAME.caption` files with a caption on each line, or else the folder's metadata file."""
    suffixes = [suffix.decode() for suffix in CAPTION_SUFFIXES]
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    metadata = (folder / os.fsdecode(name) for name in METADATA_NAMES)
    if not files and (table := next((file for file in metadata if file.exists()), None)):
        yield from _read_table(str(table))
    for file in files:
        try:
            captions = captions_in_text(file.read_bytes())
        except OSError as error:
            raise SourceError(f"--references {file}: cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise SourceError(f"--references {file}: it is not UTF-8 text; {SAVE_AS_UTF8}") from None
        yield file.relative_to(folder).with_suffix("").as_posix(), captions or []


def _read_json(location: str) -> Iterator[tuple[str, str]]:
    """Read COCO captions or {name: caption or captions}.

    COCO: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.
    """
    try:
        filesystem, path = open_filesystem(location)
        with filesystem.open_input_stream(path) as stream:
            tree = parse_json(stream.read())
    except (OSError, ValueError) as error:
        raise SourceError(f"--references {location}: cannot be read as JSON: {error}") from None
    if isinstance(tree, dict) and "annotations" in tree:
        try:
            yield from _coco_captions(tree)
        except (AttributeError, KeyError, TypeError):
            raise SourceError(
                f"--references {location}: its images or annotations are not those of COCO; each image needs an id, "
                "each caption an image_id"
            ) from None
    elif isinstance(tree, dict):
        yield from tree.items()
    else:
        raise SourceError(
            f"--references {location}: expected COCO captions (images, annotations) or {{name: captions}}"
        )


def _coco_captions(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    names = {image["id"]: str(image.get("file_name") or image["id"]) for image in tree.get("images") or []}
    annotations = [annotation for annotation in tree["annotations"] or [] if annotation.get("caption") is not None]
    return [(names.get(row["image_id"], str(row["image_id"])), row["caption"]) for row in annotations]


def _read_table(location: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Read a table with a column of names and some of captions; a name may come on several rows."""
    root, file = Root.at(location).folder_and_name()
    if not file.lower().endswith(TABLE_SUFFIXES):
        raise SourceError(
            f"--references {location}: expected COCO .json, .jsonl, .csv, .tsv, .parquet, a folder of .txt or "
            ".caption files"
        )
    table: Table = open_table(root, file)
    if missing := [name for name in columns if name not in table.schema.names]:
        names = ", ".join(table.schema.names)
        raise SourceError(f"--references-columns: {location} has no column {missing[0]!r}; it has: {names}")
    key, *captions = columns or (_column(table, KEY_NAMES, location), _column(table, CAPTION_NAMES, location))
    for caption in captions:
        for batch in read_batches(root, file, table, [key, caption], caption):
            for image_name, value in zip(batch[key].to_pylist(), batch[caption].to_pylist(), strict=True):
                if image_name is not None:
                    yield str(image_name), value


def _column(table: Table, accepted: tuple[str, ...], location: str) -> str:
    names = table.schema.names
    column = next((name for name in accepted if name in names), None)
    if column is None:
        raise SourceError(
            f"--references {location}: no column named {' or '.join(accepted)}; it has: {', '.join(names)}; name the "
            "columns with --references-columns"
        )
    return column
