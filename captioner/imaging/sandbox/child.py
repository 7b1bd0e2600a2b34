"""The child process of `decoder.py`: `python -m captioner.imaging.sandbox.child CONTROL SETTINGS`.

It imports what decoding needs, opens no image, and forks a worker whenever its caller asks for one, so that a worker
which an image has crashed is replaced within milliseconds.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from captioner.data import DecodedImage, PixelSpec
from captioner.imaging import decode, squeeze
from captioner.imaging.fitting import needs_torch
from captioner.imaging.formats import available_formats

NUM_SLOTS = 8  # images sent ahead, so that a decoder does not wait for its caller
# Sent over the control socket: 0 when ready, then the pid and the exit code of each worker.
NUMBER = struct.Struct("<i")

_ANSWER_FIELDS = [field.name for field in fields(DecodedImage) if field.name != "pixels"]


class Slots:
    """Memory shared with the caller: an unnamed file for the bytes in each slot, and one for the pixels of all slots.

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


def fork_workers(control: socket.socket, work: Callable[[socket.socket], None]) -> None:
    """Fork a worker for each socket received over `control`, one at a time, until the caller is gone."""
    control.sendall(NUMBER.pack(0))
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        connection = socket.socket(fileno=descriptors[0])
        pid = os.fork()  # of a process with one thread (see `ONE_THREAD` in .decoder)
        if pid == 0:
            control.close()
            _end_with(partial(work, connection))
        connection.close()
        control.sendall(NUMBER.pack(pid))
        _, status = os.waitpid(pid, 0)
        control.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))


def _end_with(work: Callable[[], None]) -> None:
    """Call `work` and end the process without the exit handlers of the process it was forked from."""
    try:
        work()
    except ConnectionError:  # the caller is gone
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def serve(connection: socket.socket, decode_one: Callable[[bytes], DecodedImage], slots: Slots, timeout: float) -> None:
    """Decode an image and answer with a line for each line received, until the caller is gone."""
    # Messages of C code may quote text of the image, which must not reach the terminal.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    # The caller kills a worker that takes too long; where the caller is dead, this signal does, even inside C code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number, line in enumerate(connection.makefile("rb")):
        slot = number % NUM_SLOTS
        signal.setitimer(signal.ITIMER_REAL, timeout + 5)
        decoded = decode_one(slots.get(slot, int(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        if decoded.pixels is not None:
            slots.put_pixels(slot, decoded.pixels)
        answer = {name: getattr(decoded, name) for name in _ANSWER_FIELDS}
        answer["shape"] = None if decoded.pixels is None else decoded.pixels.shape
        connection.sendall(json.dumps(answer).encode() + b"\n")


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller ends this process
    settings: dict[str, Any] = json.loads(argv[1])
    available_formats()  # imports Pillow's plugins, which each worker would import anew
    decode_one = _decoder_of(settings)
    slots = Slots(settings["max_bytes"], settings["slots"])
    work = partial(serve, decode_one=decode_one, slots=slots, timeout=settings["timeout"])
    with suppress(ConnectionError):  # the caller was killed
        fork_workers(socket.socket(fileno=int(argv[0])), work)


def _decoder_of(settings: dict[str, Any]) -> Callable[[bytes], DecodedImage]:
    spec, max_pixels = settings["spec"], settings["max_pixels"]
    if isinstance(spec, int):
        return partial(squeeze, side=spec, max_pixels=max_pixels)
    pixel_spec = PixelSpec(**spec | {name: tuple(value) for name, value in spec.items() if isinstance(value, list)})
    if needs_torch(pixel_spec):
        import torch  # noqa: F401  # imported before the time of the first image starts
    return partial(decode, spec=pixel_spec, max_pixels=max_pixels)


if __name__ == "__main__":
    main(sys.argv[1:])
