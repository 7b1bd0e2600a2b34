"""PixelSpec of a model that needs its own image processor: how much of its work decoders do.

Decoders resize images for the processors of Idefics3, SmolVLM and Qwen-VL, by their rules and filters, so that the
model's process only cuts them (`prepared.py`); with `--preprocess processor` the result is exactly the processor's.

Other processors get images of variable size, and resize, split, pad and normalise them in the model's process. With
them (`default_native_spec`) the result may differ, for images with a side above 2048 pixels and above twice the size in
the processor's settings.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from captioner.data import PixelSpec
from captioner.errors import ModelError
from captioner.models.families import family_of

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by number in PIL.Image.Resampling
LARGEST_EDGE = 4096  # `MAX_IMAGE_SIZE` of Idefics3 and SmolVLM
_DEFAULT_EDGE = 2048
_LARGEST_SIDE = 1 << 14  # a size above it is an area, which some processors keep under the names of sides


def native_spec(family: str, file: Path, settings: dict[str, Any]) -> PixelSpec:
    """Return the PixelSpec for a family's processor. Raises ModelError where a size is not a positive integer."""
    limit = family_of(family).limit
    if limit == "area":
        return _qwen(file, settings)
    return _tiled(file, settings) if limit == "edge" else default_native_spec(settings)


def default_native_spec(settings: dict[str, Any]) -> PixelSpec:
    """Return the PixelSpec for any processor: up to twice the largest side in its settings, and at least 2048.

    Of a processor with a largest area instead: up to the side of a square of that area.
    """
    sides = [_largest(settings.get(name)) for name in ("size", "crop_size", "pad_size", "max_image_size")]
    return _at_most_edge(max(_DEFAULT_EDGE, *(2 * side for side in sides)), 1, _filter(settings, "bicubic"))


def _tiled(file: Path, settings: dict[str, Any]) -> PixelSpec:
    """Idefics3 and SmolVLM: the longer side becomes `size["longest_edge"]`, then the image is cut into tiles."""
    size, tile = settings.get("size") or {"longest_edge": 4 * 364}, settings.get("max_image_size")
    if not settings.get("do_resize", True) or not isinstance(size, dict) or "longest_edge" not in size:
        return default_native_spec(settings)
    edge = min(_side(file, "size", size["longest_edge"]), LARGEST_EDGE)
    resample = _filter(settings, "lanczos")
    if not _is_known(settings, ("Idefics3", "SmolVLM"), ("do_image_splitting", "do_pad")):
        return _at_most_edge(edge, 2, resample)
    side = _side(file, "max_image_size", tile["longest_edge"] if isinstance(tile, dict) else 364)
    longest = edge + -edge % side
    return PixelSpec(longest + side, longest, "tiles", resample=resample, limit=edge, multiple=side)


def _qwen(file: Path, settings: dict[str, Any]) -> PixelSpec:
    """Qwen-VL: both sides become multiples of `patch_size * merge_size`, the area `min_pixels` to `max_pixels`."""
    size = settings["size"] if isinstance(settings.get("size"), dict) else {}
    area = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or 28 * 28 * 1280
    least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or 56 * 56
    if not settings.get("do_resize", True) or not _is_known(settings, ("Qwen2VL",), ()):
        return default_native_spec(settings)
    limit = _side(file, "max_pixels", area)
    multiple = _side(file, "patch_size", settings.get("patch_size") or 14)
    multiple *= _side(file, "merge_size", settings.get("merge_size") or 2)
    # An aspect ratio of 200 with one side of `multiple` pixels, and rounding up to `multiple` on both sides.
    least = _side(file, "min_pixels", least)
    side = math.isqrt(max(limit, least, 200 * multiple**2)) + 1 + multiple
    resample = _filter(settings, "bicubic")
    return PixelSpec(side, side, "patches", resample=resample, limit=limit, multiple=multiple, least=least)


def _is_known(settings: dict[str, Any], kinds: tuple[str, ...], steps: tuple[str, ...]) -> bool:
    """Return whether an image processor is one of `kinds`, and takes `steps` and normalises as it does by default."""
    name = str(settings.get("image_processor_type") or kinds[0]).removesuffix("Fast").removesuffix("Pil")
    is_one = name.removesuffix("ImageProcessor") in kinds
    return is_one and all(settings.get(step, True) for step in (*steps, "do_rescale", "do_normalize"))


def _at_most_edge(edge: int, multiple: int, resample: Any) -> PixelSpec:
    side = edge + -edge % multiple
    return PixelSpec(side, side, "own_edge", resample=resample, limit=edge, multiple=multiple)


def _filter(settings: dict[str, Any], default: str) -> Any:
    number = settings.get("resample")
    return FILTERS[number] if isinstance(number, int) and 0 <= number < len(FILTERS) else default


def _side(file: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{file}: {key}={value!r} is not a number of pixels; save the model's processor again")
    return value


def _largest(size: Any) -> int:
    sides = size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]
    largest = max((side for side in sides if isinstance(side, int)), default=0)
    return largest if largest <= _LARGEST_SIDE else math.isqrt(largest) // 2
