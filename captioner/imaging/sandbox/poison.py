"""Images that crash or stop their decoder, for tests; `captioner.testing` exports the markers."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable

from captioner.data import DecodedImage

# An image whose bytes hold one of these kills its decoder, keeps it for ever, or makes it wait at the gate named after
# the marker (see `wait_at`; the number is that of the decoder's caller), where the environment variable
# CAPTIONER_TEST_POISON is set. Everywhere else they are bytes like others.
ABORT_MARKER, HANG_MARKER, GATE_MARKER = b"captioner-test: abort", b"captioner-test: hang", b"captioner-test: gate "


def poisoned(decode_one: Callable[[bytes], DecodedImage], caller: int) -> Callable[[bytes], DecodedImage]:
    """A decoder with a weakness for the markers. `caller`: the process it decodes for."""

    def decode(data: bytes) -> DecodedImage:
        if ABORT_MARKER in data:
            os.kill(os.getpid(), signal.SIGABRT)
        while HANG_MARKER in data:
            time.sleep(3600)
        if GATE_MARKER in data:
            wait_at(data.partition(GATE_MARKER)[2].decode(), caller)
        return decode_one(data)

    return decode


def wait_at(gate: str, pid: int | None = None) -> None:
    """The first to come here writes its process number (or `pid`) to `gate/pid` and waits for `gate/open`; all others
    pass."""
    try:
        os.link(_number_file(gate, pid or os.getpid()), f"{gate}/pid")
    except FileExistsError:
        return
    while not os.path.exists(f"{gate}/open"):
        time.sleep(0.02)


def _number_file(gate: str, pid: int) -> str:
    """A file of its own, linked into place when it is whole."""
    path = f"{gate}/{uuid.uuid4().hex}"
    with open(path, "w") as file:
        file.write(str(pid))
    return path
