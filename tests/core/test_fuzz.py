"""Damaged files of every common format, from a seed: pixels or a reason, never an exception, a crash, much memory.

pytest tests/core/test_fuzz.py                        2,000 cases
FUZZ_CASES=100000 FUZZ_SEED=7 pytest ...              more, others
"""

import io
import os
import random
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from captioner.data import ERROR_CODES, PixelSpec
from captioner.imaging import decode

CASES = int(os.environ.get("FUZZ_CASES", "2000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
MAX_PIXELS = 4_000_000
MEMORY_BOUND = 400 * 2**20  # bytes more than before the first case
SPEC = PixelSpec(height=24, width=24)


def seeds() -> dict[str, bytes]:
    """A whole file of each format and of some of its kinds."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    grey = colour.convert("L")
    kinds = {
        "jpeg": (colour, "JPEG", {}),
        "jpeg-progressive": (colour, "JPEG", {"progressive": True}),
        "jpeg-grey": (grey, "JPEG", {}),
        "png": (colour, "PNG", {}),
        "png-palette": (colour.quantize(16), "PNG", {}),
        "png-alpha": (colour.convert("RGBA"), "PNG", {}),
        "gif": (colour.quantize(16), "GIF", {}),
        "gif-animated": (colour.quantize(16), "GIF", {"save_all": True, "append_images": [grey.convert("P")]}),
        "webp": (colour, "WEBP", {}),
        "webp-lossless": (colour, "WEBP", {"lossless": True}),
        "tiff": (colour, "TIFF", {}),
        "tiff-lzw": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-jpeg": (colour, "TIFF", {"compression": "jpeg"}),
        "bmp": (colour, "BMP", {}),
        "avif": (colour, "AVIF", {}),
        "ico": (colour, "ICO", {"sizes": [(32, 32)]}),
        "jp2": (colour, "JPEG2000", {}),
    }
    return {name: encode(*kind) for name, kind in kinds.items()}


def encode(image: Image.Image, format: str, options: dict) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def damaged(rng: random.Random, files: list[bytes]) -> bytes:
    """One to three injuries: bytes changed (headers more often), cut out, cut off, repeated, or another file's."""
    data = bytearray(rng.choice(files))
    for _ in range(rng.randint(1, 3)):
        start = min(int(rng.expovariate(8 / len(data))), len(data) - 1) if len(data) > 1 else 0
        length = rng.randint(1, 40)
        kind = rng.randrange(6)
        if kind == 0:
            data[start : start + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x01"])
        elif kind == 2:
            del data[start : start + length]
        elif kind == 3:
            del data[rng.randrange(len(data)) + 1 :]
        elif kind == 4:
            data[start:start] = data[start : start + length] * rng.randint(1, 20)
        else:
            other = rng.choice(files)
            data[start:] = other[min(start, len(other)) :]
        data = data or bytearray(b"\0")
    return bytes(data)


def check(case: int, data: bytes) -> bool:
    """Whether the damaged file still gave pixels."""
    decoded = decode(data, SPEC, MAX_PIXELS)
    if decoded.error_code:
        assert decoded.error_code in ERROR_CODES, (SEED, case, decoded)
        assert decoded.pixels is None, (SEED, case)
        assert decoded.error_message.isprintable(), (SEED, case, decoded)
        return False
    assert decoded.pixels is not None
    assert (decoded.pixels.shape, decoded.pixels.dtype) == ((24, 24, 3), np.uint8), (SEED, case)
    assert decoded.width * decoded.height <= MAX_PIXELS, (SEED, case)
    return True


def fuzz() -> None:
    """Every case; a process of its own runs it, so that a crash of C code shows as its death."""
    files = list(seeds().values())
    for data in files:
        assert check(-1, data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = 0
    for case in range(CASES):
        print(case, file=sys.stderr)
        good += check(case, damaged(random.Random(f"{SEED} {case}"), files))
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < MEMORY_BOUND, f"memory grew by {growth / 2**20:.0f} MiB"
    print(f"{CASES} cases from seed {SEED}: {good} gave pixels, memory grew by {growth / 2**20:.0f} MiB")


@pytest.mark.timeout(0)
def test_damaged_files_are_pixels_or_a_reason() -> None:
    command = [sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ)

    last = next((line for line in reversed(done.stderr.splitlines()) if line.isdigit()), "none")
    assert done.returncode == 0, f"seed {SEED}, case {last}: {done.stderr[-1500:]}"
    print(done.stdout)
    given = int(done.stdout.split(":")[1].split()[0])
    assert CASES * 0.05 < given < CASES * 0.95  # else the injuries are too light or too heavy to prove anything


if __name__ == "__main__":
    fuzz()
