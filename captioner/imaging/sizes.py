"""How large transformers' image processors make an image, in their own rounding: sides in pixels, (height, width)."""

from __future__ import annotations

import math

from captioner.data import PixelSpec

Size = tuple[int, int]

_QWEN_ASPECT = 200


def resized(size: Size, spec: PixelSpec) -> Size:
    """Size of an image after resizing and before any crop or padding."""
    match spec.resize:
        case "exact":
            return spec.resized if any(spec.resized) else (spec.height, spec.width)
        case "shortest_edge":
            return _shortest_edge(size, spec.shortest_edge)
        case "inside":
            return _inside(size, spec.resized)
        case "own_edge":
            return _at_most_edge(size, spec.limit, spec.multiple)
        case "own_area":
            return _at_most_area(size, spec.limit, spec.multiple)
    return size


def _shortest_edge(size: Size, edge: int) -> Size:
    height, width = size
    scaled = int(edge * max(size) / min(size))
    return (scaled, edge) if width <= height else (edge, scaled)


def _inside(size: Size, box: Size) -> Size:
    """`get_image_size_for_max_height_width` of transformers; at least one pixel, where that gives none."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _at_most_edge(size: Size, edge: int, multiple: int) -> Size:
    """As Idefics3 and SmolVLM round (`_resize_output_size_rescale_to_max_len`): so their processor leaves it so."""
    height, width = size
    if max(size) <= edge:
        return size
    aspect = width / height
    shorter = int(edge / aspect) if width >= height else int(edge * aspect)
    shorter = max(1, math.ceil(shorter / multiple) * multiple)
    return (shorter, edge) if width >= height else (edge, shorter)


def _at_most_area(size: Size, area: int, multiple: int) -> Size:
    """Round sides as Qwen-VL does (`smart_resize`), so that its processor leaves them as they are.

    A strip that it refuses stays one, and one that it takes never becomes one that it refuses.
    """
    if max(size) > _QWEN_ASPECT * min(size):
        return _rounded_to_area(size, area, 1)
    found = _rounded_to_area(size, area, multiple)
    return size if max(found) > _QWEN_ASPECT * min(found) else found


def _rounded_to_area(size: Size, area: int, multiple: int) -> Size:
    height, width = size
    if height * width <= area:
        return size
    rounded = round(height / multiple) * multiple, round(width / multiple) * multiple
    if rounded[0] * rounded[1] <= area:
        return rounded
    shrink = math.sqrt(height * width / area)
    down, across = (min(area, max(multiple, math.floor(side / shrink / multiple) * multiple)) for side in size)
    return down, across
