"""Decode images in a child process, so that an image can crash or hang its decoder and nothing else.

    the caller  --length of an image-->             a worker of child.py
                <--size, format or error, a line--
                <==bytes and pixels in shared slots==>

Decoders are C code that reads untrusted files. One that crashes ends its process, one that never returns blocks it;
both become failed rows (`decoder_crashed`, `timeout`). The worker has no credentials but those it inherits, and its
answers are JSON and plain bytes: they are never unpickled.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from captioner.data import DecodedImage, PixelSpec
from captioner.imaging.sandbox.child import NUM_SLOTS, NUMBER, Slots

ATTEMPTS = 2  # a decoder may also die of another cause, such as a shortage of memory
# However many of its images hang, a chunk must not take as long as a run waits for progress: after this number of
# hangs, the other images of the chunk have only SHORT_TIMEOUT_S each. Most images take some milliseconds.
HANGS_AT_FULL_TIME, SHORT_TIMEOUT_S = 8, 1.0


START_TIMEOUT_S = 300.0
# The process that forks must have one thread: a lock that another thread holds at that moment stays locked in the
# worker for ever. torch, numpy and pyarrow's allocator would each start threads when they are imported. And the other
# cores are used by other decoders.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class GuardedDecoder:
    """Decodes images in a child process; a context manager, used by one thread.

    `spec`: of the model, for `captioner.imaging.decode`; or the side in pixels, for `captioner.imaging.squeeze`.
    `timeout`: seconds an image may take. The child starts with the first image, or with `start`; it ends with
    `close`, with this object and with this process.
    """

    def __init__(self, spec: PixelSpec | int, max_pixels: int, timeout: float) -> None:
        self._max_bytes = 3 * spec * spec if isinstance(spec, int) else spec.max_bytes
        fields = spec if isinstance(spec, int) else asdict(spec)
        self._settings = {"spec": fields, "max_bytes": self._max_bytes, "max_pixels": max_pixels, "timeout": timeout}
        self._timeout = timeout
        self._slots: Slots | None = None
        self._child: Child | None = None
        self._worker: Worker | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __call__(self, images: Iterable[bytes]) -> Iterator[DecodedImage]:
        """Yield what `captioner.imaging.decode` returns for each image of a chunk, in order.

        An image fails as `decoder_crashed` after its decoder died ATTEMPTS times, or as `timeout`. The next images are
        decoded meanwhile. Raises RuntimeError where no decoder can be started, which is not the fault of an image.
        """
        waiting: deque[bytes] = deque()
        hangs = 0
        try:
            for data in images:
                waiting.append(data)
                self._ask(waiting)
                if len(waiting) == NUM_SLOTS:
                    yield (decoded := self._answer(waiting, hangs))
                    hangs += decoded.error_code == "timeout"
            while waiting:
                yield (decoded := self._answer(waiting, hangs))
                hangs += decoded.error_code == "timeout"
        finally:
            if waiting:  # the caller stopped early: these answers are not needed
                self._end_worker()

    def start(self) -> None:
        """Start the child unless there is one; does not wait until it is ready."""
        if self._slots is None:
            self._slots = Slots(self._max_bytes)
        if self._child is None:
            self._child = Child(self._settings, self._slots)

    def wait(self) -> None:
        """Wait until a worker is ready for the first image; start it unless there is one.

        Raises RuntimeError where no decoder can be started.
        """
        if self._worker is None:
            self._ask(deque())

    def close(self) -> None:
        """End the child and its worker."""
        self._end_worker()
        if self._child is not None:
            self._child.close()
        if self._slots is not None:
            self._slots.close()
        self._child = self._slots = None

    def _ask(self, waiting: deque[bytes]) -> None:
        """Send the last of `waiting` to the worker; all of them to a new worker."""
        if self._worker is not None:
            self._worker.ask(waiting[-1])
            return
        if self._child is not None and not self._child.is_alive():
            self._child.close()
            self._child = None
        self.start()
        assert self._child is not None
        self._worker = self._child.fork()
        for data in waiting:
            self._worker.ask(data)

    def _answer(self, waiting: deque[bytes], hangs: int) -> DecodedImage:
        """Remove the first of `waiting` and return its result."""
        timeout = self._timeout if hangs < HANGS_AT_FULL_TIME else min(self._timeout, SHORT_TIMEOUT_S)
        for _ in range(ATTEMPTS):
            if self._worker is None:
                self._ask(waiting)
            assert self._worker is not None
            try:
                decoded = self._worker.answer(timeout)
                break
            except TimeoutError:
                decoded = _failed("timeout", f"not decoded within {timeout:g} s (decode_timeout)")
                self._end_worker()
                break
            except ConnectionError:
                cause = self._end_worker()
                decoded = _failed("decoder_crashed", f"the decoder process died {ATTEMPTS} times, {cause}")
        waiting.popleft()
        return decoded

    def _end_worker(self) -> str:
        """End the worker; return the cause of its death."""
        worker, self._worker = self._worker, None
        return worker.end() if worker is not None else ""


def _failed(code: str, message: str) -> DecodedImage:
    return DecodedImage(None, error_code=code, error_message=message)


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
                    "-P",  # modules in the current folder are not imported
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
