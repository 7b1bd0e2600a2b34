"""`--batch-size auto`: measure once which batch size is fastest on a GPU, and cache the result.

`batch_sizes.json` in the user's cache directory holds the results by device and fingerprint; remove it to measure
again.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from captioner.console.phases import phase
from captioner.files import cache_dir
from captioner.models.ref import ModelRef

SIZES = (16, 32, 64, 128, 256, 512)
FIRST_SIZE, FIRST_SIZE_VARIABLE = 64, 16  # tried first, for images of fixed and of variable size
TIME_LIMIT_S = 10.0  # no further size is tried after this time
MIN_WARM_UP_S = 1.0  # batches are repeated until this time has passed, up to three times
MIN_SPEEDUP = 1.05  # in images per second, for which the next larger size is chosen
# On a CPU. In a small model an operation takes less time than calling it, so its batches are larger.
CPU_SIZE, SMALL_CPU_SIZE = 16, 64


class BatchCaptioner(Protocol):
    """The part of `captioner.models.base.TransformersCaptioner` that is used here."""

    ref: ModelRef
    batch_size: int

    @property
    def device_name(self) -> str:
        """Return the kind of device ("cpu", "mps"), or a GPU's name and memory."""
        ...

    def try_batch(self, size: int) -> None:
        """Caption `size` images of noise in one batch. Raises torch.OutOfMemoryError."""
        ...

    def free_memory(self) -> None:
        """Release the device memory that torch caches."""
        ...


def choose_batch_size(
    captioner: BatchCaptioner,
    on_cpu: int,
    clock: Callable[[], float] = time.perf_counter,
    notify: Callable[[str], None] = lambda line: None,
) -> None:
    """Set `batch_size` to the cached size for the model and device, or measure which is fastest.

    On a CPU, which gains little from large batches, and on mps, where running out of memory does not raise
    torch.OutOfMemoryError, it is `on_cpu`. `notify`: called with a line before measuring, and with the result.
    """
    if captioner.device_name in ("cpu", "mps"):
        captioner.batch_size = on_cpu
        return
    key, file = f"{captioner.device_name}; {captioner.ref.fingerprint}", cache_dir() / "batch_sizes.json"
    sizes = _read_cache(file)
    if key not in sizes:
        notify(f"trying out batch sizes on {captioner.device_name}, once for this model and device")
        started = clock()
        deadline = started + TIME_LIMIT_S
        start = FIRST_SIZE_VARIABLE if captioner.ref.spec.variable_size else FIRST_SIZE
        with phase("trying out batch sizes", notify):
            sizes[key] = fastest_size(lambda size: seconds_for(captioner, size, clock, deadline), start)
            # Again: while `seconds_for` raised, the error still held the tensors of the batch that did not fit.
            captioner.free_memory()
        notify(f"batch size {sizes[key]}, tried out in {clock() - started:.1f} s")
        _write_cache(file, sizes)
    captioner.batch_size = sizes[key]


def fastest_size(seconds: Callable[[int], float], start: int = FIRST_SIZE) -> int:
    """Return the last of SIZES, from `start` up, that fits and is MIN_SPEEDUP times as fast as the size before it.

    Where `start` does not fit, return the largest below it that does; where none fits, the smallest, since batches that
    do not fit are halved later. `seconds`: returns the seconds of one batch, or raises torch.OutOfMemoryError.
    """
    best, best_rate = 0, 0.0
    for size in (size for size in SIZES if size >= start):
        try:
            rate = size / seconds(size)
        except torch.OutOfMemoryError:
            break
        if rate < MIN_SPEEDUP * best_rate:
            break
        best, best_rate = size, rate
    return best or _largest_below(start, seconds)


def _largest_below(start: int, seconds: Callable[[int], float]) -> int:
    for size in reversed([size for size in SIZES if size < start]):
        try:
            seconds(size)
            return size
        except torch.OutOfMemoryError:
            continue
    return SIZES[0]


def seconds_for(captioner: BatchCaptioner, size: int, clock: Callable[[], float], deadline: float = math.inf) -> float:
    """Return the seconds of one batch; infinity after the deadline. Raises torch.OutOfMemoryError.

    Two batches before it warm up and capture graphs, unless the first takes so long that this does not matter.
    """
    first = clock()
    if first >= deadline:
        return math.inf
    try:
        for _ in range(3):
            started = clock()
            captioner.try_batch(size)
            seconds = clock() - started
            if clock() - first >= MIN_WARM_UP_S:
                break
    finally:
        captioner.free_memory()
    return seconds


def _read_cache(file: Path) -> dict[str, int]:
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): int(size) for key, size in sizes.items() if int(size) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no file, or a damaged one: sizes are measured again


def _write_cache(file: Path, sizes: dict[str, int]) -> None:
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        pass  # a read-only home directory: the next start measures again
