"""`--batch-size auto`: how many pictures a GPU captions fastest at once, tried out once and remembered.

`batch_sizes.json` in the user's cache directory holds what was found, by device and fingerprint; remove it to have
sizes tried out again.
"""

from __future__ import annotations

import json
import math
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
START, VARIABLE_SIZE_START = 64, 16  # a GPU captions faster in batches of so many at least
BUDGET_S = 10.0  # no further size is tried after so long
LONG_S = 1.0  # of so long a batch, what the first one of its size takes beside it does not matter
WORTH = 1.05  # twice the memory is taken only for so many times the pictures a second
# On a CPU. Of a small model, calling an operation takes longer than the operation.
CPU_SIZE, SMALL_CPU_SIZE = 16, 64


class Batched(Protocol):
    """A captioner of device batches (see `captioner.models.base.TransformersCaptioner`)."""

    ref: ModelRef
    batch_size: int

    @property
    def device_name(self) -> str:
        """The kind of device ("cpu", "mps"), or a GPU's name and memory."""
        ...

    def try_batch(self, size: int) -> None:
        """Caption `size` pictures of noise in one piece. Raises torch.OutOfMemoryError."""
        ...

    def free_memory(self) -> None:
        """Give back what the device holds for later use."""
        ...


def choose_batch_size(
    captioner: Batched,
    on_cpu: int,
    clock: Callable[[], float] = time.perf_counter,
    notify: Callable[[str], None] = lambda line: None,
) -> None:
    """Set `batch_size` to what is remembered for its model and device, or measure it now.

    It is `on_cpu` on a CPU, which gains little from large batches, and on mps, where running out of memory is no
    torch.OutOfMemoryError. `notify`: called with a line before sizes are tried out, and with the outcome.
    """
    if captioner.device_name in ("cpu", "mps"):
        captioner.batch_size = on_cpu
        return
    key, file = f"{captioner.device_name}; {captioner.ref.fingerprint}", cache_dir() / "batch_sizes.json"
    known = _remembered(file)
    if key not in known:
        notify(f"trying out batch sizes on {captioner.device_name}, once for this model and device")
        started = clock()
        deadline, start = started + BUDGET_S, VARIABLE_SIZE_START if captioner.ref.spec.variable_size else START
        known[key] = fastest_size(lambda size: seconds_for(captioner, size, clock, deadline), start)
        notify(f"batch size {known[key]}, tried out in {clock() - started:.1f} s")
        _remember(file, known)
    captioner.batch_size = known[key]


def fastest_size(seconds: Callable[[int], float], start: int = START, sizes: Sequence[int] = SIZES) -> int:
    """Return the last of `sizes`, going up from `start`, that is worth it.

    Its batch fits and captions WORTH times as many images a second as the size before. Where `start` does not fit, the
    largest below it that does.

    `seconds`: of one batch; raises torch.OutOfMemoryError. Where not even the first fits, the first: a batch is halved
    where it turns out to be too large.
    """
    best, best_rate = 0, 0.0
    for size in (size for size in sizes if size >= start):
        try:
            rate = size / seconds(size)
        except torch.OutOfMemoryError:
            break
        if rate < WORTH * best_rate:
            break
        best, best_rate = size, rate
    return best or _largest_below(start, seconds, sizes)


def _largest_below(start: int, seconds: Callable[[int], float], sizes: Sequence[int]) -> int:
    for size in reversed([size for size in sizes if size < start]):
        try:
            seconds(size)
            return size
        except torch.OutOfMemoryError:
            continue
    return sizes[0]


def seconds_for(captioner: Batched, size: int, clock: Callable[[], float], deadline: float = math.inf) -> float:
    """Return the seconds that one batch takes; infinity after the deadline.

    Two batches before it warm up and capture graphs, unless the first takes long enough to tell. Raises
    torch.OutOfMemoryError.
    """
    first = clock()
    if first >= deadline:
        return math.inf
    try:
        for _ in range(3):
            started = clock()
            captioner.try_batch(size)
            seconds = clock() - started
            if clock() - first >= LONG_S:
                break
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
