"""The caller's side of the processes in `captioner.imaging.sandbox.child`."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from captioner.data import DecodedImage
from captioner.imaging.sandbox.child import NUMBER
from captioner.imaging.sandbox.slots import NUM_SLOTS, Slots

START_TIMEOUT_S = 300.0
# The process that forks must have one thread: a lock that another thread holds in that moment stays locked in the
# worker for ever. torch, numpy and pyarrow's allocator would each start threads when they are imported. And the other
# cores have work of their own.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Child:
    """The process that forks workers. It starts here; nobody waits until it is ready before a worker is needed."""

    def __init__(self, settings: dict[str, Any], slots: Slots) -> None:
        self._slots = slots
        self._is_ready = False
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_TIMEOUT_S)
        root = str(Path(__file__).parents[3])
        search_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        settings = settings | {"slots": slots.descriptors}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "captioner.imaging.sandbox.child", str(theirs.fileno()), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), *slots.descriptors],
                env=os.environ | ONE_THREAD | {"PYTHONPATH": search_path},
            )

    def fork(self) -> Worker:
        """Raises RuntimeError where there is no child to do it."""
        try:
            if not self._is_ready:
                self._is_ready = self.hear() == 0
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            return Worker(self, ours, self.hear(), self._slots)
        except OSError:
            self.close()
            ended = _cause_of(self._process.returncode)
            raise RuntimeError(f"the decoder process did not start, {ended}; its words are in the log") from None

    def hear(self) -> int:
        """The next number the child says. Raises OSError where it is dead."""
        said = self._control.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(said) < NUMBER.size:
            raise ConnectionResetError
        number: int = NUMBER.unpack(said)[0]
        return number

    def has_said(self) -> bool:
        """Whether there is a number to hear."""
        return bool(select.select([self._control], [], [], 0)[0])

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


class Worker:
    """A process that decodes images in the order they are asked for. `pid`: its number."""

    def __init__(self, child: Child, connection: socket.socket, pid: int, slots: Slots) -> None:
        self._child, self._pid, self._slots = child, pid, slots
        self._connection, self._lines = connection, connection.makefile("rb")
        self._asked = self._answered = 0

    def ask(self, data: bytes) -> None:
        """Hand an image over; at most NUM_SLOTS may be without an answer. A dead worker takes them too."""
        self._slots.put(self._asked % NUM_SLOTS, data)
        self._asked += 1
        with suppress(ConnectionError):
            self._connection.sendall(b"%d\n" % len(data))

    def answer(self, timeout: float) -> DecodedImage:
        """The next image. Raises TimeoutError, or ConnectionError where the worker is dead."""
        self._connection.settimeout(timeout)
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        told = json.loads(line)
        shape = told.pop("shape")
        pixels = None if shape is None else self._slots.get_pixels(self._answered % NUM_SLOTS, shape)
        self._answered += 1
        return DecodedImage(pixels, **told)

    def end(self) -> str:
        """End it if it lives; returns what it died of, in words."""
        self._lines.close()
        self._connection.close()
        if not self._child.has_said():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        try:
            return _cause_of(self._child.hear())
        except OSError:
            return "with the process it was forked from"


def _cause_of(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
