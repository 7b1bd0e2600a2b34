"""Decoding in a process of its own, so that a picture can end or stop its decoder and nothing else.

    the caller  --bytes of one picture-->  child.py  --size, format or reason; pixels-->  the caller

Decoders are C code that reads other people's files. One that crashes takes its process along, one that never returns
keeps it; both are rows here (`decoder_crashed`, `timeout`). The child holds no credentials of ours that it does not
inherit, and its answers are JSON and plain bytes: nothing it says is ever unpickled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

import captioner
from captioner.data import DecodedImage, PixelSpec

ATTEMPTS = 2  # a decoder may also die of something else: memory that a neighbour took, say
START_TIMEOUT_S = 300.0
_READY = b"ready"


class GuardedDecoder:
    """Decodes pictures one by one in a child process; a context manager, used by one thread.

    `max_pixels`: as in `captioner.imaging.decode`. `timeout`: seconds a picture may take. The child starts with the
    first picture, or with `start`; it ends with `close`, with this object and with this process.
    """

    def __init__(self, spec: PixelSpec, max_pixels: int, timeout: float) -> None:
        self._settings = json.dumps({"spec": asdict(spec), "max_pixels": max_pixels, "timeout": timeout})
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_ready = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __call__(self, data: bytes) -> DecodedImage:
        """What `captioner.imaging.decode` returns, or `decoder_crashed` after ATTEMPTS deaths, or `timeout`."""
        death = ""
        for _ in range(ATTEMPTS):
            try:
                return self._ask(data)
            except TimeoutError:
                self.close()
                return _failed("timeout", f"not decoded within {self._timeout:g} s (decode_timeout)")
            except (EOFError, OSError):
                death = self._cause_of_death()
        return _failed("decoder_crashed", f"the decoder process died {ATTEMPTS} times, {death}")

    def start(self) -> None:
        """Start the child unless there is one; does not wait until it is ready."""
        if self._process is not None:
            return
        self._connection, theirs = Pipe()
        root = str(Path(captioner.__file__).parent.parent)
        search_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "captioner.imaging.child", str(theirs.fileno()), self._settings],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # One thread: the other cores have work of their own.
                env=os.environ | {"PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
            )
        self._is_ready = False

    def close(self) -> None:
        """End the child."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _ask(self, data: bytes) -> DecodedImage:
        """Raises TimeoutError, or EOFError or OSError where the child is dead."""
        self.start()
        assert self._connection is not None
        if not self._is_ready:
            self._wait_until_ready(self._connection)
        self._connection.send_bytes(data)
        if not self._connection.poll(self._timeout):
            raise TimeoutError
        answer = json.loads(self._connection.recv_bytes())
        shape, pixels = answer.pop("shape"), None
        if shape is not None:
            pixels = np.frombuffer(self._connection.recv_bytes(), np.uint8).reshape(shape)
        return DecodedImage(pixels, **answer)

    def _wait_until_ready(self, connection: Connection) -> None:
        """Raises RuntimeError where no decoder can be started at all: that is no fault of a picture."""
        try:
            self._is_ready = connection.poll(START_TIMEOUT_S) and connection.recv_bytes() == _READY
        except (EOFError, OSError):
            self._is_ready = False
        if not self._is_ready:
            raise RuntimeError(f"the decoder process did not start, {self._cause_of_death()}; its words are in the log")

    def _cause_of_death(self) -> str:
        process = self._process
        self.close()
        code = process.returncode if process is not None else 0
        return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _failed(code: str, message: str) -> DecodedImage:
    return DecodedImage(None, error_code=code, error_message=message)
