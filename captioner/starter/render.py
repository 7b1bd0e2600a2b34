"""Writing the rendered scenes as an archive, in each of the forms that people keep images in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import OutputError
from captioner.starter.scenes import Scene, make_scenes

SCENES_PER_TAR = 1000
SCENES_PER_ROW_GROUP = 100

Format = Literal["folder", "webdataset", "parquet"]
Named = tuple[str, Scene]


def render_scenes(
    directory: Path, count: int, seed: int = 0, format: Format = "folder", width: int = 192, family: str = "plain"
) -> None:
    """Write `count` scenes of `width` x `width` pixels; the same bytes for the same arguments.

    "folder" is Hugging Face's ImageFolder: `images/00000.png` ... and `metadata.jsonl` with `file_name` and
    `captions`. "webdataset" is tars of 1,000: `00000.png`, `00000.json`. "parquet" is one table: `image`
    (struct{bytes, path}), `image_id`, `captions`. Raises OutputError where the directory holds anything.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory}: is there already and not empty; choose a new directory or empty this one")
    directory.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(count - 1)))
    named = ((f"{index:0{digits}d}", scene) for index, scene in enumerate(make_scenes(count, seed, family)))
    _WRITERS[format](directory, named, width)


def _write_folder(directory: Path, named: Iterator[Named], width: int) -> None:
    (directory / "images").mkdir()
    with (directory / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for name, scene in named:
            file = f"images/{name}.png"
            (directory / file).write_bytes(_png(scene, width))
            metadata.write(json.dumps({"file_name": file, "captions": scene.captions}) + "\n")


def _write_tars(directory: Path, named: Iterator[Named], width: int) -> None:
    number = 0
    while samples := list(islice(named, SCENES_PER_TAR)):
        with tarfile.open(directory / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, scene in samples:
                _add_member(tar, f"{name}.png", _png(scene, width))
                _add_member(tar, f"{name}.json", json.dumps({"captions": scene.captions}).encode())
        number += 1


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # no time and no owner: the same bytes everywhere
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _write_parquet(directory: Path, named: Iterator[Named], width: int) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("image_id", pa.string()), ("captions", pa.list_(pa.string()))])
    with pq.ParquetWriter(directory / "scenes.parquet", schema) as writer:
        while samples := list(islice(named, SCENES_PER_ROW_GROUP)):
            rows = [
                {
                    "image": {"bytes": _png(scene, width), "path": f"{name}.png"},
                    "image_id": name,
                    "captions": scene.captions,
                }
                for name, scene in samples
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _png(scene: Scene, width: int) -> bytes:
    stream = io.BytesIO()
    scene.render(width).save(stream, "PNG")
    return stream.getvalue()


_WRITERS: dict[Format, Callable[[Path, Iterator[Named], int], None]] = {
    "folder": _write_folder,
    "webdataset": _write_tars,
    "parquet": _write_parquet,
}
