"""Pixels on their way to the device: each batch is copied while the device works on the batch before."""

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

# One thread copies some 8 GB a second; the first batch of a call is copied while the device waits.
COPY_THREADS = 4


class Event(Protocol):
    """A torch.cuda.Event: the end of a copy."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class CopyStream(Protocol):
    """A queue of copies from page-locked memory to a device, beside what else the device does."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Page-locked memory: uint8 [num_bytes]."""
        ...

    def start(self, values: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """Start to copy `values`; returns the copy and the event that it is whole."""
        ...

    def wait(self, values: torch.Tensor, event: Event) -> None:
        """Let all that the calling thread asks of the device from now on wait for the copy. Does not block."""
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
        using = torch.cuda.current_stream(self._device)
        using.wait_event(event)
        values.record_stream(using)  # else its memory could be handed to the next copy while it is still read


class Uploads:
    """Copies pixels to `device`, to a CUDA GPU through page-locked buffers. Several threads may use one at once.

    `stream`: what copies; None where the device is the CPU, or can read only what is handed over by torch.
    """

    def __init__(self, device: torch.device, stream: CopyStream | None = None) -> None:
        self.device = device
        self._stream = CudaCopyStream(device) if device.type == "cuda" and stream is None else stream
        self._buffers = _Buffers(self._stream) if self._stream is not None else None
        self._threads = ThreadPoolExecutor(COPY_THREADS, "upload")

    @contextmanager
    def batches(self, pixels: Pixels, size: int) -> Iterator[Iterator[torch.Tensor]]:
        """Pixels [N, H, W, 3] as tensors on the device, `size` images in each. The first is copied at once."""
        pieces = (pixels[first : first + size] for first in range(0, len(pixels), size))
        if self._stream is None:
            # A copy, because Arrow's memory is read-only and torch warns of it.
            yield (torch.from_numpy(np.array(piece)).to(self.device) for piece in pieces)
            return
        with one_ahead(self._start(piece) for piece in pieces) as started:
            yield (self._arrived(*copy) for copy in started)

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
        """Copy `pixels` into `values`, without the interpreter's lock."""
        size = -(-len(pixels) // COPY_THREADS)
        pieces = [slice(first, first + size) for first in range(0, len(pixels), size)]
        list(self._threads.map(lambda piece: np.copyto(values[piece], pixels[piece]), pieces))

    def _arrived(self, values: torch.Tensor, event: Event) -> torch.Tensor:
        assert self._stream is not None
        self._stream.wait(values, event)
        return values


class _Buffers:
    """Page-locked buffers, kept because allocating one takes longer than filling it.

    There are as many as were in use at once.
    """

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._kept: deque[tuple[torch.Tensor, Event]] = deque()  # those given back first come first

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer of at least so many bytes that no copy reads from."""
        with self._lock:
            while self._kept and len(self._kept[0][0]) < num_bytes:
                self._kept.popleft()[1].synchronize()  # of a smaller batch size
            if self._kept and self._kept[0][1].query():
                return self._kept.popleft()[0]
        return self._stream.allocate(num_bytes)

    def give_back(self, buffer: torch.Tensor, event: Event) -> None:
        """`event`: the end of the copy that reads from it."""
        with self._lock:
            self._kept.append((buffer, event))
