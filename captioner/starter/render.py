"""Write rendered scenes as a folder, WebDataset or Parquet dataset."""

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
NamedScene = tuple[str, Scene]


def render_scenes(
    directory: Path, count: int, seed: int = 0, format: Format = "folder", width: int = 192, family: str = "plain"
) -> None:
    """Write `count` scenes of `width` x `width` pixels; the same arguments give the same bytes.

    "folder" is Hugging Face's ImageFolder: `images/00000.png` ... and `metadata.jsonl` with `file_name` and
    `captions`. "webdataset" is tar shards of 1,000 samples: `00000.png`, `00000.json`. "parquet" is one table: `image`
    (struct{bytes, path}), `image_id`, `captions`. Raises OutputError when the directory is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} exists and is not empty; choose a new directory or empty this one")
    directory.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(count - 1)))
    scenes = ((f"{index:0{digits}d}", scene) for index, scene in enumerate(make_scenes(count, seed, family)))
    _WRITERS[format](directory, scenes, width)


def _write_folder(directory: Path, scenes: Iterator[NamedScene], width: int) -> None:
    (directory / "images").mkdir()
    with (directory / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for name, scene in scenes:
            file = f"images/{name}.png"
            (directory / file).write_bytes(_png(scene, width))
            metadata.write(json.dumps({"file_name": file, "captions": scene.captions}) + "\n")


def _write_tars(directory: Path, scenes: Iterator[NamedScene], width: int) -> None:
    shard = 0
    while samples := list(islice(scenes, SCENES_PER_TAR)):
        with tarfile.open(directory / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, scene in samples:
                _add_member(tar, f"{name}.png", _png(scene, width))
                _add_member(tar, f"{name}.json", json.dumps({"captions": scene.captions}).encode())
        shard += 1


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # without time and owner, so that the bytes are reproducible
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _write_parquet(directory: Path, scenes: Iterator[NamedScene], width: int) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("image_id", pa.string()), ("captions", pa.list_(pa.string()))])
    with pq.ParquetWriter(directory / "scenes.parquet", schema) as writer:
        while samples := list(islice(scenes, SCENES_PER_ROW_GROUP)):
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


_WRITERS: dict[Format, Callable[[Path, Iterator[NamedScene], int], None]] = {
    "folder": _write_folder,
    "webdataset": _write_tars,
    "parquet": _write_parquet,
}
