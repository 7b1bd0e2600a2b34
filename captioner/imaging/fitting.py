"""Resize and crop an upright image to uint8 pixels of the model's size, as transformers' image processors do.

Normalising is left to the device. torch resizes a photo of 640 x 480 three times as fast as Pillow and differs from it
by at most 2/255; Pillow resizes images that are large, extremely long or not aligned with its pixels. With
`PixelSpec.preprocess` "processor" Pillow resizes the whole image, which is what those processors do.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from captioner.data import PixelSpec
from captioner.imaging.opening import UprightImage

# An image is first made smaller in a cheap way (JPEG: while it is decoded; Pillow: averages of whole blocks) as long
# as this many pixels are left for each pixel of the result. Mean difference from resizing the whole image, for 113
# photos scaled down 2, 4 or 8 times while decoded: 1.5 to 2.2 of 255 at 1, 0.6 to 0.9 at 2, 0.3 to 0.5 at 3.
_MARGIN = 3
_WHOLE_GAP = 1.5  # the same for an image that is cut into tiles, when it is shrunk to one
_LARGE_PIXELS = 4_000_000  # from about here Pillow, which averages first, is faster than torch, which does not
_EXTREME_ASPECT = 8

_TORCH_FILTERS = ("bicubic", "bilinear")
_STEPPED_FILTERS = ("nearest", "box")  # a rounding error makes them take another pixel: they get the whole image

_QWEN_ASPECT = 200  # of sides; images that are longer are refused by Qwen-VL's processor

Box = tuple[int, int, int, int]  # top, left, bottom, right
Size = tuple[int, int]  # height, width


def needed_side(spec: PixelSpec) -> int:
    """Return the shorter side in pixels below which decoding must not shrink an image; 0: it must not shrink any."""
    if spec.preprocess == "processor" or spec.resize == "none" or spec.resample in _STEPPED_FILTERS:
        return 0
    height = 0 if spec.resize == "tiles" else spec.height  # which has the whole image below the tiles
    return _MARGIN * max(spec.shortest_edge, height, spec.width, *spec.resized)


def needs_torch(spec: PixelSpec) -> bool:
    """Return whether torch resizes some images for this model; for others it need not be imported."""
    return spec.preprocess == "fast" and spec.resample in _TORCH_FILTERS and spec.resize != "tiles"


def fit(upright: UprightImage, spec: PixelSpec) -> npt.NDArray[np.uint8]:
    """Return pixels uint8 [spec.height, spec.width, 3], or of variable size [height, width, 3].

    A crop that reaches beyond the image is black there.
    """
    if spec.resize == "tiles":
        return _tiles(upright, spec)
    height, width = resized((upright.height, upright.width), spec)
    if spec.resize == "patches" and upright.height * upright.width <= spec.limit:
        return np.array(upright.rgb.resize((width, height), _filter(spec)))
    if spec.variable_size:
        return _resize(upright, (height, width), (0, 0, height, width), spec)
    padded_at_end = spec.resize == "inside"
    top, left = (0, 0) if padded_at_end else ((height - spec.height) // 2, (width - spec.width) // 2)
    window = max(top, 0), max(left, 0), min(top + spec.height, height), min(left + spec.width, width)
    pixels = _resize(upright, (height, width), window, spec)
    if pixels.shape == (spec.height, spec.width, 3):
        return pixels
    padded = np.full((spec.height, spec.width, 3), spec.fill, np.uint8)
    padded[window[0] - top : window[2] - top, window[1] - left : window[3] - left] = pixels
    return padded


def _tiles(upright: UprightImage, spec: PixelSpec) -> npt.NDArray[np.uint8]:
    """Return the image at the size that is cut into tiles, and below it, at the left, the whole image as one tile.

    Of one tile, only that. The model's image processor resizes twice; once differs by 0.1 of 255 on average (40
    photos), and the whole image made of averages of four pixels by 0.4.
    """
    side, fast = spec.multiple, spec.preprocess == "fast"
    first, size = tiled_sizes((upright.height, upright.width), spec)
    if fast:
        image = upright.rgb.resize((size[1], size[0]), _filter(spec), upright.box, _MARGIN)
    else:
        image = upright.rgb.resize((first[1], first[0]), _filter(spec)).resize((size[1], size[0]), _filter(spec))
    if size == (side, side):
        return np.array(image)
    pixels = np.zeros((size[0] + side, size[1], 3), np.uint8)
    pixels[: size[0]] = np.asarray(image)
    pixels[size[0] :, :side] = np.asarray(image.resize((side, side), _filter(spec), None, _WHOLE_GAP if fast else None))
    return pixels


def _filter(spec: PixelSpec) -> Image.Resampling:
    return Image.Resampling[spec.resample.upper()]


def fit_square(upright: UprightImage, side: int) -> npt.NDArray[np.uint8]:
    """Return the whole image as uint8 [side, side, 3], whatever its aspect; by Pillow."""
    return _resize_with_pillow(upright, (side, side), (0, 0, side, side), PixelSpec(side, side))


def _resize(upright: UprightImage, size: tuple[int, int], window: Box, spec: PixelSpec) -> npt.NDArray[np.uint8]:
    if upright.rgb.size == (size[1], size[0]) == (upright.width, upright.height):
        return np.array(upright.rgb)[window[0] : window[2], window[1] : window[3]]
    fast = needs_torch(spec) and _suits_torch(upright)
    return (_resize_with_torch if fast else _resize_with_pillow)(upright, size, window, spec)


def _suits_torch(upright: UprightImage) -> bool:
    short, long = sorted(upright.rgb.size)
    whole = upright.box == (0, 0, *upright.rgb.size)
    return whole and short * long <= _LARGE_PIXELS and long <= _EXTREME_ASPECT * short


def _resize_with_torch(
    upright: UprightImage, size: tuple[int, int], window: Box, spec: PixelSpec
) -> npt.NDArray[np.uint8]:
    import torch

    pixels = torch.from_numpy(_as_array(upright.rgb)).permute(2, 0, 1)[None]  # channels last: torch's fast path
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode=spec.resample, antialias=True)
    top, left, bottom, right = window
    return _three_channels(pixels[0].permute(1, 2, 0).numpy()[top:bottom, left:right])


def _three_channels(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a copy of [H, W, 3 or 4] without the fourth channel, made plane by plane, which numpy does faster."""
    copy = np.empty((*values.shape[:2], 3), np.uint8)
    for channel in range(3):
        copy[..., channel] = values[..., channel]
    return copy


def _as_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return [H, W, 4], a view of Pillow's memory with an unused channel, or where it is split a copy [H, W, 3]."""
    try:
        values = pa.array(image)
    except ValueError:
        return np.array(image)
    pixels = np.from_dlpack(values.values).view(np.uint8)  # `to_numpy` would import pandas, in each decoder
    return pixels.reshape(image.height, image.width, 4)


def _resize_with_pillow(
    upright: UprightImage, size: tuple[int, int], window: Box, spec: PixelSpec
) -> npt.NDArray[np.uint8]:
    """Compute only the window, so that a strip of 10000 x 1 pixels costs no more than its centre."""
    top, left, bottom, right = window
    x0, y0, x1, y1 = upright.box
    across, down = (x1 - x0) / size[1], (y1 - y0) / size[0]
    source = x0 + left * across, y0 + top * down, min(x0 + right * across, x1), min(y0 + bottom * down, y1)
    resample = _filter(spec)
    if spec.preprocess == "fast" and spec.resample not in _STEPPED_FILTERS:
        return np.array(upright.rgb.resize((right - left, bottom - top), resample, source, _MARGIN))
    if size[0] * size[1] > _LARGE_PIXELS:  # a strip so long that resizing all of it would fill the memory
        return np.array(upright.rgb.resize((right - left, bottom - top), resample, source))
    return np.array(upright.rgb.resize((size[1], size[0]), resample))[top:bottom, left:right]


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
        case "patches":
            return _patched(size, spec)
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


def tiled_sizes(size: Size, spec: PixelSpec) -> tuple[Size, Size]:
    """Return the sizes after the first and the second resizing of Idefics3 and SmolVLM.

    They are those of `_resize_output_size_rescale_to_max_len` and `resize_for_vision_encoder` in transformers.
    """
    height, width = size
    aspect, edge, side = width / height, spec.limit, spec.multiple
    shorter = int(edge / aspect) if width >= height else int(edge * aspect)
    shorter = max(1, shorter + shorter % 2)
    first = (shorter, edge) if width >= height else (edge, shorter)
    aspect, longer = first[1] / first[0], _up(edge, side)
    shorter = _up(int(longer / aspect) if width >= height else int(longer * aspect), side)
    return first, (shorter, longer) if width >= height else (longer, shorter)


def _up(length: float, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def _patched(size: Size, spec: PixelSpec) -> Size:
    """Return the size by Qwen-VL's `smart_resize`; (1, 1) of strips that it refuses by their aspect."""
    if max(size) > _QWEN_ASPECT * min(size):
        return 1, 1
    area, multiple = size[0] * size[1], spec.multiple
    height, width = (round(side / multiple) * multiple for side in size)
    if height * width > spec.limit:
        shrink = math.sqrt(area / spec.limit)
        height, width = (max(multiple, math.floor(side / shrink / multiple) * multiple) for side in size)
    elif height * width < spec.least:
        grow = math.sqrt(spec.least / area)
        height, width = (_up(side * grow, multiple) for side in size)
    return height, width
