"""Copy pixels to the device: each batch while the device works on the batch before it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from captioner.data import Pixels
from captioner.run.prefetch import one_ahead

# One thread copies about 8 GB a second, and the device waits for the first batch of a call.
COPY_THREADS = 4


class Event(Protocol):
    """The end of a copy, as a torch.cuda.Event."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class CopyStream(Protocol):
    """A queue of copies from page-locked memory to a device, concurrent with the device's other work."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return page-locked memory, uint8 [num_bytes]."""
        ...

    def start(self, values: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """Start to copy `values`, and return the copy and the event of its end."""
        ...

    def wait(self, values: torch.Tensor, event: Event) -> None:
        """Make later device work of the calling thread wait for a copy. Does not block."""
        ...


class CudaCopyStream:
    """The CopyStream of a CUDA GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, values: torch.Tensor) -> tuple[torch.Tensor, Event]:
        with torch.cuda.stream(self._stream):
            copied = values.to(self._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return copied, event

    def wait(self, values: torch.Tensor, event: Any) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        values.record_stream(stream)  # else its memory could be reused for the next copy while it is read


class Uploads:
    """Copies pixels to `device`, to a CUDA GPU through page-locked buffers. Threads may use it concurrently.

    `stream`: None for the CopyStream of a CUDA GPU; on other devices torch then copies each batch when it is used.
    """

    def __init__(self, device: torch.device, stream: CopyStream | None = None) -> None:
        self.device = device
        self._stream = CudaCopyStream(device) if device.type == "cuda" and stream is None else stream
        self._buffers = _Buffers(self._stream) if self._stream is not None else None
        self._threads = ThreadPoolExecutor(COPY_THREADS, "upload")

    @contextmanager
    def batches(self, pixels: Pixels, size: int) -> Iterator[Iterator[torch.Tensor]]:
        """Yield an iterator over batches of `size` images on the device. The first is copied at once."""
        parts = (pixels[first : first + size] for first in range(0, len(pixels), size))
        if self._stream is None:
            # Copied, because Arrow's memory is read-only, which torch warns of.
            yield (torch.from_numpy(np.array(part)).to(self.device) for part in parts)
            return
        with one_ahead(self._start(part) for part in parts) as copies:
            yield (self._wait(*copy) for copy in copies)

    def _start(self, pixels: Pixels) -> tuple[torch.Tensor, Event]:
        assert self._stream is not None
        assert self._buffers is not None
        buffer = self._buffers.take(pixels.nbytes)
        values = buffer[: pixels.nbytes].view(pixels.shape)
        self._fill(values.numpy(), pixels)
        copied, event = self._stream.start(values)
        self._buffers.give_back(buffer, event)
        return copied, event

    def _fill(self, values: npt.NDArray[np.uint8], pixels: Pixels) -> None:
        """Copy `pixels` into `values` in threads; numpy releases the interpreter's lock."""
        size = -(-len(pixels) // COPY_THREADS)
        parts = [slice(first, first + size) for first in range(0, len(pixels), size)]
        list(self._threads.map(lambda part: np.copyto(values[part], pixels[part]), parts))

    def _wait(self, values: torch.Tensor, event: Event) -> torch.Tensor:
        assert self._stream is not None
        self._stream.wait(values, event)
        return values


class _Buffers:
    """Page-locked buffers, reused because allocating one takes longer than filling it."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._returned: deque[tuple[torch.Tensor, Event]] = deque()  # oldest first

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return a buffer of at least `num_bytes` that no copy reads from."""
        with self._lock:
            while self._returned and len(self._returned[0][0]) < num_bytes:
                self._returned.popleft()[1].synchronize()  # a buffer of smaller batches
            if self._returned and self._returned[0][1].query():
                return self._returned.popleft()[0]
        return self._stream.allocate(num_bytes)

    def give_back(self, buffer: torch.Tensor, event: Event) -> None:
        """Accept a buffer for reuse after `event`, the end of the copy that reads from it."""
        with self._lock:
            self._returned.append((buffer, event))
