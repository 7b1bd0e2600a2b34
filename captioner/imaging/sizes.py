"""Compute the size to which transformers' image processors resize an image, with their rounding.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math

from captioner.data import PixelSpec

Size = tuple[int, int]

_QWEN_ASPECT = 200


def resized(size: Size, spec: PixelSpec) -> Size:
    """Return the size of an image after resizing and before any crop or padding."""
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
    """Return the size by transformers' `get_image_size_for_max_height_width`, with sides of at least one pixel."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _at_most_edge(size: Size, edge: int, multiple: int) -> Size:
    """Round as Idefics3 and SmolVLM do (`_resize_output_size_rescale_to_max_len`), so that their processor keeps it."""
    height, width = size
    if max(size) <= edge:
        return size
    aspect = width / height
    shorter = int(edge / aspect) if width >= height else int(edge * aspect)
    shorter = max(1, math.ceil(shorter / multiple) * multiple)
    return (shorter, edge) if width >= height else (edge, shorter)


def _at_most_area(size: Size, area: int, multiple: int) -> Size:
    """Round sides as Qwen-VL does (`smart_resize`), so that its processor leaves them as they are.

    The processor refuses strips by their aspect. Resizing changes no aspect so much that a refused strip is accepted or
    an accepted one refused.
    """
    if max(size) > _QWEN_ASPECT * min(size):
        return _rounded_to_area(size, area, 1)
    rounded = _rounded_to_area(size, area, multiple)
    return size if max(rounded) > _QWEN_ASPECT * min(rounded) else rounded


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
