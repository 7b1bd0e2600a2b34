"""Memory that a decoder process shares with its caller: each slot holds the bytes and the pixels of one image."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

NUM_SLOTS = 8  # images sent ahead, so that a decoder does not wait for its caller


class Slots:
    """Unnamed files: one for the bytes in each slot, and one for the pixels of all slots.

    Unlike a pipe they take an image of any size at once: sending one never waits for a decoder that hangs. `max_bytes`:
    of the pixels of one image. `descriptors`: of the files, where another process has created them.
    """

    def __init__(self, max_bytes: int, descriptors: Sequence[int] = ()) -> None:
        self._files = [os.fdopen(number, "r+b") for number in descriptors or _new_files(NUM_SLOTS + 1)]
        size = NUM_SLOTS * max_bytes
        if not descriptors:
            self._files[-1].truncate(size)
        self._mapped = mmap.mmap(self._files[-1].fileno(), size)
        self._pixels: npt.NDArray[np.uint8] = np.frombuffer(self._mapped, np.uint8).reshape(-1, max_bytes)

    @property
    def descriptors(self) -> list[int]:
        return [file.fileno() for file in self._files]

    def put(self, slot: int, data: bytes) -> None:
        file = self._files[slot]
        file.seek(0)
        file.write(data)
        file.truncate()  # frees the memory of a larger image before it
        file.flush()

    def get(self, slot: int, num_bytes: int) -> bytes:
        number, position = self._files[slot].fileno(), 0
        parts: list[bytes] = []
        while position < num_bytes:  # one call gives 2 GiB at most
            parts.append(os.pread(number, num_bytes - position, position))
            position += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def put_pixels(self, slot: int, pixels: npt.NDArray[np.uint8]) -> None:
        self._pixels[slot, : pixels.size] = pixels.reshape(-1)

    def get_pixels(self, slot: int, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return a copy, since the slot is used again."""
        return self._pixels[slot, : math.prod(shape)].reshape(shape).copy()

    def close(self) -> None:
        del self._pixels
        self._mapped.close()
        for file in self._files:
            file.close()


def _new_files(count: int) -> list[int]:
    """Create files, in memory where the system supports it."""
    if hasattr(os, "memfd_create"):
        return [os.memfd_create("captioner") for _ in range(count)]
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        return [os.dup(file.fileno()) for file in files]
