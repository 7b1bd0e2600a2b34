"""Fault injection for tests: decoders that crash or hang, processes that die at a chosen write.

`captioner.testing` exports it.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from captioner.data import DecodedImage
from captioner.store.directory import Directory

if TYPE_CHECKING:
    from captioner.models.base import TransformersCaptioner

# In a process started with the environment of `decoder_faults`, an image whose bytes hold one of these kills its
# decoder, keeps it busy for ever, or makes it wait at the gate whose path follows the marker (see `wait_at`; the pid is
# that of the process which the decoder works for). Everywhere else they are bytes like any others.
ABORT_MARKER, HANG_MARKER, GATE_MARKER = b"captioner-test: abort", b"captioner-test: hang", b"captioner-test: gate "

_WRITES = ("write_bytes", "delete", "delete_folder")


class Killed(BaseException):
    """Raised where a real fault would have killed the process."""


@contextmanager
def killed_at_write(number: int) -> Iterator[None]:
    """Raise Killed instead of the `number`-th write or delete in a table directory and all later ones.

    The disk is then as a process killed at that moment leaves it.
    """

    def die() -> None:
        raise Killed

    with _at_write(number, die):
        yield


@contextmanager
def sigkill_at_write(number: int) -> Iterator[None]:
    """Kill this process with SIGKILL just before its `number`-th write or delete in a table directory.

    Other processes, Ray's workers among them, go on.
    """
    with _at_write(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        yield


@contextmanager
def _at_write(number: int, die: Callable[[], None]) -> Iterator[None]:
    num_writes = 0

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_writes
            num_writes += 1
            if num_writes >= number:
                die()
            return write(*args, **kwargs)

        return wrapper

    before = {name: getattr(Directory, name) for name in _WRITES}
    for name, write in before.items():
        setattr(Directory, name, counted(write))
    try:
        yield
    finally:
        for name, write in before.items():
            setattr(Directory, name, write)


@dataclass(frozen=True)
class GatedDirectory(Directory):
    """A directory whose first write of a chunk waits at a gate, so that a test can kill the writing process there.

    `gate`: a local directory (see `wait_at`). `moment`: wait "before" or "after" the file is written.
    """

    gate: str = ""
    moment: str = "before"

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "gate": self.gate, "moment": self.moment}

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Do as `Directory.write_bytes`, and wait at the gate."""
        waits = name.startswith("chunks/")
        if waits and self.moment == "before":
            wait_at(self.gate)
        super().write_bytes(name, data)
        if waits and self.moment == "after":
            wait_at(self.gate)


def decoder_faults() -> dict[str, str]:
    """Return environment variables for a process whose decoders shall obey the markers.

    Each Python process that starts with them imports `decoder_faults/sitecustomize.py`, which acts in decoders only.
    """
    paths = [str(Path(__file__).parent / "decoder_faults"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def with_faults(decode: Callable[..., DecodedImage], caller: int) -> Callable[..., DecodedImage]:
    """Return `decode(data, ...)` changed to obey the markers. `caller`: pid of the process that it works for."""

    def decode_with_faults(data: bytes, **settings: Any) -> DecodedImage:
        if ABORT_MARKER in data:
            os.kill(os.getpid(), signal.SIGABRT)
        while HANG_MARKER in data:
            time.sleep(3600)
        if GATE_MARKER in data:
            wait_at(data.partition(GATE_MARKER)[2].decode(), caller)
        return decode(data, **settings)

    return decode_with_faults


def with_room_for(captioner: TransformersCaptioner, num_values: int) -> TransformersCaptioner:
    """Let a captioner run out of memory at batches of more values of uint8 pixels, as on a small GPU; return it."""
    import torch

    search_batch = captioner.search_batch

    def search_where_it_fits(values: Any) -> Any:
        size = sum(image.size for image in values.images) if hasattr(values, "images") else values.numel()
        if size > num_values:
            raise torch.OutOfMemoryError(f"no memory for {size:,} values")
        return search_batch(values)

    captioner.search_batch = search_where_it_fits  # type: ignore[method-assign]
    return captioner


def with_failing_gpu(captioner: TransformersCaptioner, after: int = 0) -> TransformersCaptioner:
    """Let every batch of a captioner fail after the first `after`, as on a GPU with a fault; return it.

    A test also lets `captioner.models.devices.is_usable` say that the device is not.
    """
    import torch

    search_batch, num_batches = captioner.search_batch, 0

    def search_until_the_fault(values: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        if num_batches > after:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")
        return search_batch(values)

    captioner.search_batch = search_until_the_fault  # type: ignore[method-assign]
    return captioner


def wait_at(gate: str, pid: int | None = None) -> None:
    """Write this process's pid (or `pid`) to `gate/pid` and wait for the file `gate/open`.

    Only the first process that calls this for a gate waits; all others go on at once.
    """
    try:
        os.link(_pid_file(gate, pid or os.getpid()), f"{gate}/pid")
    except FileExistsError:
        return
    while not os.path.exists(f"{gate}/open"):
        time.sleep(0.02)


def _pid_file(gate: str, pid: int) -> str:
    """Write a file of its own, so that the link to it is never seen half written."""
    path = f"{gate}/{uuid.uuid4().hex}"
    with open(path, "w") as file:
        file.write(str(pid))
    return path
