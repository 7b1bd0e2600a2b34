"""`python -m captioner.imaging.child FD SETTINGS`: the process behind `captioner.imaging.guarded`."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from captioner.data import DecodedImage, PixelSpec
from captioner.imaging import decode

# Asks for a picture whose bytes tell its decoder to die or to hang: see `captioner.imaging.poison`.
POISON_VARIABLE = "CAPTIONER_TEST_POISON"


def serve(connection: Connection, decode_one: Callable[[bytes], DecodedImage], timeout: float) -> None:
    """Answer until the caller is gone."""
    connection.send_bytes(b"ready")
    while True:
        try:
            data = connection.recv_bytes()
        except EOFError:
            return
        # The caller kills what takes too long; where the caller is dead, this does, even inside C code.
        faulthandler.dump_traceback_later(timeout + 5, exit=True)
        decoded = decode_one(data)
        faulthandler.cancel_dump_traceback_later()
        try:
            _answer(connection, decoded)
        except BrokenPipeError:
            return


def _answer(connection: Connection, decoded: DecodedImage) -> None:
    told = asdict(decoded)
    pixels = told.pop("pixels")
    told["shape"] = None if pixels is None else pixels.shape
    connection.send_bytes(json.dumps(told).encode())
    if pixels is not None:
        connection.send_bytes(np.ascontiguousarray(pixels).data.cast("B"))


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller ends this process
    import torch  # noqa: F401  # pictures are resized with it: loaded before the first one's time runs

    settings: dict[str, Any] = json.loads(argv[1])
    spec = settings["spec"]
    spec |= {name: tuple(value) for name, value in spec.items() if isinstance(value, list)}
    decode_one: Callable[[bytes], DecodedImage] = partial(
        decode, spec=PixelSpec(**spec), max_pixels=settings["max_pixels"]
    )
    if POISON_VARIABLE in os.environ:
        from captioner.imaging.poison import poisoned

        decode_one = poisoned(decode_one)
    serve(Connection(int(argv[0])), decode_one, settings["timeout"])


if __name__ == "__main__":
    main(sys.argv[1:])
