"""File names of images and of the files that belong to them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from captioner.imaging.formats import available_formats
from captioner.sources.webdataset import IMAGE_SUFFIXES

_SUFFIXES = {"JPEG": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "MPO": ".jpg", "HEIF": ".heic"}
_SAME = {".jpeg": ".jpg", ".tiff": ".tif", ".j2k": ".jp2", ".heif": ".heic", ".pgm": ".ppm", ".pbm": ".ppm"}


def without_suffix(name: Path) -> Path:
    """Return the name without its image suffix; "scene.3" has none and stays."""
    return name.with_suffix("") if name.suffix[1:].lower().encode() in IMAGE_SUFFIXES else name


def with_format_suffix(name: Path, data: bytes) -> Path:
    """Return the name with the suffix of the image's format; a suffix that already fits stays."""
    suffix = format_suffix(data, name.suffix)
    return name if suffix == name.suffix else with_suffix(name, suffix)


def with_suffix(name: Path, suffix: str) -> Path:
    """Return the name of a file that belongs to an image: a/cat.txt for a/cat.jpg."""
    stem = without_suffix(name)
    return stem.with_name(stem.name + suffix)


def unused_path(folder: Path, name: Path) -> Path:
    """Return the path of `name` in `folder`, with a number added when that path exists."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = (folder / name).with_stem(f"{name.stem}-{number}")
    return path


def format_suffix(data: bytes, current: str) -> str:
    """Return the suffix of the image's format; `current` when it fits or the format is unknown."""
    try:
        with Image.open(io.BytesIO(data), formats=available_formats()) as image:
            suffix = _SUFFIXES.get(image.format or "", f".{(image.format or 'bin').lower()}")
    except Exception:  # damaged files raise almost any exception in Pillow
        return current or ".bin"
    return current if _SAME.get(current.lower(), current.lower()) == suffix else suffix
