"""Public test doubles: small archives with known captions, tiny models of each family, a captioner that costs nothing.

For the tests of this package and of whatever is built on it. torch and transformers are imported when a model is made.
"""

from __future__ import annotations

import io
import json
import tarfile
import weakref
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from captioner.errors import OutputError
from captioner.models.fake import FakeCaptioner
from captioner.models.ref import ModelRef
from captioner.starter.scenes import Scene, make_scenes
from captioner.store.publish import missing_chunks
from captioner.store.table import open_table
from captioner.testing.faults import (
    ABORT_MARKER,
    GATE_MARKER,
    HANG_MARKER,
    GatedDirectory,
    Killed,
    decoder_faults,
    killed_at_write,
    sigkill_at_write,
    with_failing_gpu,
    with_room_for,
)
from captioner.testing.tiny_models import make_tiny_model

__all__ = [
    "ABORT_MARKER",
    "GATE_MARKER",
    "HANG_MARKER",
    "FakeCaptioner",
    "GatedDirectory",
    "Killed",
    "SmallGpu",
    "decoder_faults",
    "killed_at_write",
    "make_folder",
    "make_parquet",
    "make_tar",
    "make_tiny_model",
    "num_committed_chunks",
    "sigkill_at_write",
    "with_failing_gpu",
    "with_room_for",
]


class _Tensor:
    """Memory of a SmallGpu."""


class SmallGpu:
    """Stands in for a captioner on a GPU with memory for `room` images; see `captioner.models.batch_size`.

    A batch takes `start` + images x `each` seconds of its own `clock`. `tried`: the sizes it was asked for. `reserved`:
    images whose memory is not free for other processes.
    """

    device_name = "small GPU, 1 GiB"

    def __init__(self, ref: ModelRef, room: int, start: float = 1.0, each: float = 0.0) -> None:
        self.ref, self.batch_size, self.tried, self.reserved = ref, 1, list[int](), 0
        self._tensor: weakref.ref[_Tensor] | None = None
        self._room, self._start, self._each, self._now = room, start, each, 0.0

    def clock(self) -> float:
        return self._now

    def try_batch(self, size: int) -> None:
        """Raises torch.OutOfMemoryError above `room`."""
        import torch

        self.tried.append(size)
        tensor = _Tensor()  # lives as long as an error whose traceback holds this call
        self.reserved, self._tensor = size, weakref.ref(tensor)
        if size > self._room:
            raise torch.OutOfMemoryError(f"no memory for a batch of {size}")
        self._now += self._start + self._each * size

    def free_memory(self) -> None:
        """Release the memory of the last batch, unless something still holds its tensor."""
        if self._tensor is None or self._tensor() is None:
            self.reserved = 0


def num_committed_chunks(out: Path) -> int:
    """Return how many chunks of a table are committed or published; 0 while there is no plan."""
    try:
        table = open_table(str(out))
        return sum(plan.num_chunks - len(missing_chunks(table, plan)) for plan in table.plans())
    except OutputError:
        return 0


def make_folder(path: Path, count: int, seed: int = 0, width: int = 64) -> Path:
    """A Hugging Face ImageFolder: 000000.png ... and metadata.jsonl with `file_name` and `captions`."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, scene in enumerate(make_scenes(count, seed)):
        name = f"{index:06d}.png"
        (path / name).write_bytes(_png(scene, width))
        lines.append(json.dumps({"file_name": name, "captions": scene.captions}))
    (path / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_tar(path: Path, count: int, seed: int = 0, width: int = 64) -> Path:
    """A WebDataset tar: 000000.png, 000000.txt (the first caption) ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, scene in enumerate(make_scenes(count, seed)):
            members = {f"{index:06d}.png": _png(scene, width), f"{index:06d}.txt": scene.captions[0].encode()}
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def make_parquet(path: Path, count: int, seed: int = 0, width: int = 64) -> Path:
    """A table as `datasets` writes it: `id`, `image` struct{bytes, path}, `captions` list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scenes = list(make_scenes(count, seed))
    names = [f"{index:06d}.png" for index in range(count)]
    images = [{"bytes": _png(scene, width), "path": name} for scene, name in zip(scenes, names, strict=True)]
    captions = [scene.captions for scene in scenes]
    table = pa.table({"id": [f"scene-{index}" for index in range(count)], "image": images, "captions": captions})
    pq.write_table(table, path, row_group_size=100)
    return path


def _png(scene: Scene, width: int) -> bytes:
    buffer = io.BytesIO()
    scene.render(width).save(buffer, format="PNG")
    return buffer.getvalue()
