"""`--batch-size auto`: how many pictures a GPU captions fastest at once, tried out once and remembered.

`batch_sizes.json` in the user's cache directory holds what was found, by device and fingerprint; remove it to have
sizes tried out again.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from captioner.files import cache_dir
from captioner.models.ref import ModelRef

SIZES = (16, 32, 64, 128, 256, 512)
WORTH = 1.05  # twice the memory is taken only for so many times the pictures a second
# On a CPU. Of a small model, calling an operation takes longer than the operation.
CPU_SIZE, SMALL_CPU_SIZE = 16, 64


class Batched(Protocol):
    """A captioner of device batches (see `captioner.models.base.TransformersCaptioner`)."""

    ref: ModelRef
    batch_size: int

    @property
    def device_name(self) -> str:
        """ "cpu", "mps", or a GPU's name and memory."""
        ...

    def try_batch(self, size: int) -> None:
        """Caption `size` pictures of noise in one piece. Raises torch.OutOfMemoryError."""
        ...

    def free_memory(self) -> None:
        """Give back what the device holds for later use."""
        ...


def settle_batch_size(captioner: Batched, on_cpu: int, clock: Callable[[], float] = time.perf_counter) -> None:
    """Set `batch_size` to what is remembered for its model and device, or to what is found now; to `on_cpu` on a CPU,
    which gains little from large batches, and on mps, where running out of memory is no torch.OutOfMemoryError."""
    if captioner.device_name in ("cpu", "mps"):
        captioner.batch_size = on_cpu
        return
    key, file = f"{captioner.device_name}; {captioner.ref.fingerprint}", cache_dir() / "batch_sizes.json"
    known = _remembered(file)
    if key not in known:
        known[key] = fastest_size(lambda size: seconds_for(captioner, size, clock))
        _remember(file, known)
    captioner.batch_size = known[key]


def fastest_size(seconds: Callable[[int], float], sizes: Sequence[int] = SIZES) -> int:
    """Going up, the last of `sizes` that is worth it: its batch fits the memory and captions WORTH times as many
    pictures a second as the size before.

    `seconds`: of one batch; raises torch.OutOfMemoryError. Where not even the first fits, the first: a batch is halved
    where it turns out to be too large.
    """
    best, best_rate = sizes[0], 0.0
    for size in sizes:
        try:
            rate = size / seconds(size)
        except torch.OutOfMemoryError:
            break
        if rate < WORTH * best_rate:
            break
        best, best_rate = size, rate
    return best


def seconds_for(captioner: Batched, size: int, clock: Callable[[], float]) -> float:
    """Seconds of one batch, after two that warm up and capture graphs. Raises torch.OutOfMemoryError."""
    try:
        for _ in range(3):
            started = clock()
            captioner.try_batch(size)
            seconds = clock() - started
    finally:
        captioner.free_memory()
    return seconds


def _remembered(file: Path) -> dict[str, int]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): int(size) for key, size in known.items() if int(size) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or not ours: sizes are tried out again


def _remember(file: Path, known: dict[str, int]) -> None:
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        pass  # a home that cannot be written to costs the next start some seconds
