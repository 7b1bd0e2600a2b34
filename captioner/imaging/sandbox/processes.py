"""Start, use and end the processes of `captioner.imaging.sandbox.child`."""

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
# The process that forks must have one thread: a lock that another thread holds at that moment stays locked in the
# worker for ever. torch, numpy and pyarrow's allocator would each start threads when they are imported. And the other
# cores are used by other decoders.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Child:
    """The process that forks workers. `__init__` starts it and does not wait until it is ready."""

    def __init__(self, settings: dict[str, Any], slots: Slots) -> None:
        self._slots = slots
        self._is_ready = False
        self._control, child_end = socket.socketpair()
        self._control.settimeout(START_TIMEOUT_S)
        root = str(Path(__file__).parents[3])
        search_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        settings = settings | {"slots": slots.descriptors}
        with child_end:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "captioner.imaging.sandbox.child",
                    str(child_end.fileno()),
                    json.dumps(settings),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[child_end.fileno(), *slots.descriptors],
                env=os.environ | ONE_THREAD | {"PYTHONPATH": search_path},
            )

    def fork(self) -> Worker:
        """Return a new worker. Raises RuntimeError where the child is dead or did not start."""
        try:
            if not self._is_ready:
                self._is_ready = self.receive() == 0
            connection, worker_end = socket.socketpair()
            with worker_end:
                socket.send_fds(self._control, [b"w"], [worker_end.fileno()])
            return Worker(self, connection, self.receive(), self._slots)
        except OSError:
            self.close()
            cause = _cause_of_death(self._process.returncode)
            raise RuntimeError(f"the decoder process did not start, {cause}; its messages are in the log") from None

    def receive(self) -> int:
        """Return the next number that the child sends. Raises OSError where it is dead."""
        data = self._control.recv(NUMBER.size, socket.MSG_WAITALL)
        if len(data) < NUMBER.size:
            raise ConnectionResetError
        number: int = NUMBER.unpack(data)[0]
        return number

    def has_sent(self) -> bool:
        """Return whether a number waits to be received."""
        return bool(select.select([self._control], [], [], 0)[0])

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()


class Worker:
    """A process that decodes images in the order in which it gets them."""

    def __init__(self, child: Child, connection: socket.socket, pid: int, slots: Slots) -> None:
        self._child, self._pid, self._slots = child, pid, slots
        self._connection, self._lines = connection, connection.makefile("rb")
        self._asked = self._answered = 0

    def ask(self, data: bytes) -> None:
        """Send an image to the worker, dead or alive; at most NUM_SLOTS images may be without an answer."""
        self._slots.put(self._asked % NUM_SLOTS, data)
        self._asked += 1
        with suppress(ConnectionError):
            self._connection.sendall(b"%d\n" % len(data))

    def answer(self, timeout: float) -> DecodedImage:
        """Return the next decoded image. Raises TimeoutError, or ConnectionError where the worker is dead."""
        self._connection.settimeout(timeout)
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError
        fields = json.loads(line)
        shape = fields.pop("shape")
        pixels = None if shape is None else self._slots.get_pixels(self._answered % NUM_SLOTS, shape)
        self._answered += 1
        return DecodedImage(pixels, **fields)

    def end(self) -> str:
        """End the worker if it lives; return the cause of its death for a message."""
        self._lines.close()
        self._connection.close()
        if not self._child.has_sent():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        try:
            return _cause_of_death(self._child.receive())
        except OSError:
            return "with the process that forked it"


def _cause_of_death(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
