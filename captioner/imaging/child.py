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
from captioner.imaging.preview import Preview, preview

# Asks for a picture whose bytes tell its decoder to die or to hang: see `captioner.imaging.poison`.
POISON_VARIABLE = "CAPTIONER_TEST_POISON"

Decode = Callable[[bytes], DecodedImage | Preview]


def serve(connection: Connection, decode_one: Decode, timeout: float) -> None:
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


def _answer(connection: Connection, decoded: DecodedImage | Preview) -> None:
    told = asdict(decoded)
    data = told.pop("jpeg") if isinstance(decoded, Preview) else told.pop("pixels")
    connection.send_bytes(json.dumps(told).encode())
    if not decoded.error_code:
        connection.send_bytes(data if isinstance(data, bytes) else np.ascontiguousarray(data).data.cast("B"))


def _decoder(settings: dict[str, Any]) -> Decode:
    """Previews where a side is given, else the model's pixels."""
    max_pixels = settings["max_pixels"]
    if "side" in settings:
        return partial(preview, side=settings["side"], max_pixels=max_pixels)
    import torch  # noqa: F401  # pictures are resized with it: loaded before the first one's time runs

    spec = settings["spec"]
    spec |= {name: tuple(spec[name]) for name in ("mean", "std")}
    return partial(decode, spec=PixelSpec(**spec), max_pixels=max_pixels)


def main(argv: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the caller ends this process
    settings: dict[str, Any] = json.loads(argv[1])
    decode_one = _decoder(settings)
    if POISON_VARIABLE in os.environ:
        from captioner.imaging.poison import poisoned

        decode_one = poisoned(decode_one)
    serve(Connection(int(argv[0])), decode_one, settings["timeout"])


if __name__ == "__main__":
    main(sys.argv[1:])
