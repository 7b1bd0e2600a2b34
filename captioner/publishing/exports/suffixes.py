"""File names of pictures and of what lies beside them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from captioner.imaging.formats import available_formats
from captioner.sources.webdataset import PICTURE_SUFFIXES

_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "MPO": ".jpg", "HEIF": ".heic"}
_SAME = {".jpeg": ".jpg", ".tiff": ".tif", ".j2k": ".jp2", ".heif": ".heic", ".pgm": ".ppm", ".pbm": ".ppm"}


def without_suffix(name: Path) -> Path:
    """The name without the suffix of a picture; "scene.3" has none."""
    return name.with_suffix("") if name.suffix[1:].lower().encode() in PICTURE_SUFFIXES else name


def with_own_suffix(name: Path, data: bytes) -> Path:
    """The name with the suffix that the picture's format has; its own stays where it fits."""
    suffix = suffix_of(data, name.suffix)
    return name if suffix == name.suffix else beside(name, suffix)


def beside(name: Path, suffix: str) -> Path:
    """The name of a file that goes with a picture: a/cat.jpg -> a/cat.txt."""
    stem = without_suffix(name)
    return stem.with_name(stem.name + suffix)


def free_name(folder: Path, name: Path) -> Path:
    """`name` in `folder`, with a number where two image ids make the same name."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = (folder / name).with_stem(f"{name.stem}-{number}")
    return path


def suffix_of(data: bytes, named: str) -> str:
    """The suffix that the picture's format has, `named` where it fits or the format cannot be told."""
    try:
        with Image.open(io.BytesIO(data), formats=available_formats()) as image:
            found = _SUFFIXES.get(image.format or "", f".{(image.format or 'bin').lower()}")
    except Exception:  # Pillow raises whatever it meets
        return named or ".bin"
    return named if _SAME.get(named.lower(), named.lower()) == found else found
