"""Decoding in a process of its own, so that a picture can end or stop its decoder and nothing else.

    the caller  --bytes of one picture-->  child.py  --size, format or reason; pixels or a JPEG-->  the caller

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
from typing import Any, Self

import numpy as np

import captioner
from captioner.data import DecodedImage, PixelSpec
from captioner.imaging.preview import Preview

ATTEMPTS = 2  # a decoder may also die of something else: memory that a neighbour took, say
START_TIMEOUT_S = 300.0
_READY = b"ready"


class _Guarded:
    """Asks a child process about pictures, one by one; a context manager, used by one thread.

    The child starts with the first picture, or with `start`; it ends with `close`, with this object and with this
    process.
    """

    def __init__(self, settings: dict[str, Any], timeout: float) -> None:
        self._settings = json.dumps(settings | {"timeout": timeout})
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

    def answer(self, data: bytes) -> tuple[dict[str, Any], bytes | None]:
        """What the child says of one file, and the bytes that go with it; or `decoder_crashed` after ATTEMPTS deaths,
        or `timeout`."""
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

    def _ask(self, data: bytes) -> tuple[dict[str, Any], bytes | None]:
        """Raises TimeoutError, or EOFError or OSError where the child is dead."""
        self.start()
        assert self._connection is not None
        if not self._is_ready:
            self._wait_until_ready(self._connection)
        self._connection.send_bytes(data)
        if not self._connection.poll(self._timeout):
            raise TimeoutError
        answer = json.loads(self._connection.recv_bytes())
        return answer, None if answer["error_code"] else self._connection.recv_bytes()

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


class GuardedDecoder(_Guarded):
    """`captioner.imaging.decode` in a child. `timeout`: seconds a picture may take."""

    def __init__(self, spec: PixelSpec, max_pixels: int, timeout: float) -> None:
        super().__init__({"spec": asdict(spec), "max_pixels": max_pixels}, timeout)
        self._shape = (spec.height, spec.width, 3)

    def __call__(self, data: bytes) -> DecodedImage:
        answer, pixels = self.answer(data)
        return DecodedImage(None if pixels is None else np.frombuffer(pixels, np.uint8).reshape(self._shape), **answer)


class GuardedPreviewer(_Guarded):
    """`captioner.imaging.preview.preview` in a child. `side`: pixels; `timeout`: seconds a picture may take."""

    def __init__(self, side: int, max_pixels: int, timeout: float) -> None:
        super().__init__({"side": side, "max_pixels": max_pixels}, timeout)

    def __call__(self, data: bytes) -> Preview:
        answer, jpeg = self.answer(data)
        return Preview(jpeg, **answer)


def _failed(code: str, message: str) -> tuple[dict[str, Any], None]:
    return {"error_code": code, "error_message": message}, None
