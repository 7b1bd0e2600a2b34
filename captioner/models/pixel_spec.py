"""A model's PixelSpec, read from its image processor's settings without loading transformers.

The settings are the `image_processor` section of processor_config.json or, in older directories, all of
preprocessor_config.json. Older ones leave out what equals the default of their class; those defaults are below, as
transformers 5 has them (`transformers/models/*/image_processing_pil_*.py`).

The classes below resize, crop, pad and normalise in the way of `PilBackend` of transformers, which a PixelSpec
describes. Settings that it cannot describe, and all other classes, need the model's own image processor:

    Idefics3, SmolVLM, Qwen-VL   decoders resize images by the processor's rules and filters, so that the model's
                                 process only cuts them (`prepared.py`); with `--preprocess processor` the result is
                                 exactly the processor's
    all others                   get images of variable size, and resize, split, pad and normalise them in the model's
                                 process (`default_native_spec`); the result may differ for images with a side above
                                 2048 pixels and above twice the size in the processor's settings
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from captioner.data import PixelSpec
from captioner.errors import ModelError
from captioner.models.families import family_of
from captioner.models.weights import read_json

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by number in PIL.Image.Resampling
LARGEST_EDGE = 4096  # `MAX_IMAGE_SIZE` of Idefics3 and SmolVLM
_DEFAULT_EDGE = 2048
_LARGEST_SIDE = 1 << 14  # a size above it is an area, which some processors keep under the names of sides

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_HALF = [0.5, 0.5, 0.5]
_BILINEAR, _BICUBIC = 2, 3  # PIL.Image.Resampling


def _defaults(side: int, resample: int, mean: list[float], std: list[float], **others: Any) -> dict[str, Any]:
    size = {"height": side, "width": side}
    return {"size": size, "resample": resample, "image_mean": mean, "image_std": std, "do_center_crop": False} | others


_COMMON_DEFAULTS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "do_pad": False,
}
_CLIP = _defaults(
    224,
    _BICUBIC,
    _CLIP_MEAN,
    _CLIP_STD,
    size={"shortest_edge": 224},
    crop_size={"height": 224, "width": 224},
    do_center_crop=True,
)
_CLASSES: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP,
    "Blip": _defaults(384, _BICUBIC, _CLIP_MEAN, _CLIP_STD),
    "ViT": _defaults(224, _BILINEAR, _HALF, _HALF),
    "DeiT": _defaults(256, _BICUBIC, _HALF, _HALF, crop_size={"height": 224, "width": 224}, do_center_crop=True),
    "Beit": _defaults(224, _BICUBIC, _HALF, _HALF, crop_size={"height": 224, "width": 224}),
    "Siglip": _defaults(224, _BICUBIC, _HALF, _HALF),
    "Bit": _CLIP,
}
# The class where the settings name none, by the model type of the (vision) configuration.
_BY_MODEL_TYPE = {
    "git": "CLIP",
    "blip": "Blip",
    "blip-2": "Blip",
    "florence2": "CLIP",
    "vit": "ViT",
    "swin": "ViT",
    "deit": "DeiT",
    "beit": "Beit",
    "dinov2": "Bit",
    "clip": "CLIP",
    "siglip": "Siglip",
}


def read_pixel_spec(directory: Path, family: str, vision: str = "", preprocess: str = "fast") -> PixelSpec:
    """Return the PixelSpec of the model in `directory`.

    `vision`: model type of its vision encoder, where the family does not determine it. `preprocess`: a value of
    --preprocess. Raises ModelError naming a setting that is not supported.
    """
    file, settings = _read_settings(directory)
    settings = {key: value for key, value in settings.items() if value is not None}
    if family_of(family).pixels == "any":
        return native_spec(family, file, settings)
    kind = _class_of(settings, vision or family)
    if kind not in _CLASSES:
        return default_native_spec(settings)
    reader = _Reader(str(file), _COMMON_DEFAULTS | _CLASSES[kind] | settings)
    needs_processor = reader.needs_processor(exact=preprocess == "processor")
    return default_native_spec(settings) if needs_processor else reader.spec()


def _read_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    file = directory / "processor_config.json"
    settings = read_json(file).get("image_processor")
    if isinstance(settings, dict):
        return file, settings
    file = directory / "preprocessor_config.json"
    settings = read_json(file)
    if not settings:
        raise ModelError(
            f"{directory}: no image processor settings (processor_config.json or preprocessor_config.json); save"
            " the model's processor into it"
        )
    return file, settings


def _class_of(settings: dict[str, Any], model_type: str) -> str:
    """Return the name of the image processor's class, without the suffixes of its variants."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    kind = _BY_MODEL_TYPE.get(model_type, model_type) if name is None else str(name)
    for suffix in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(suffix)
    return kind


class _Reader:
    """Reads a PixelSpec from settings that include all defaults."""

    def __init__(self, file: str, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        self.crops, self.resizes = settings["do_center_crop"], settings["do_resize"]
        self.pad = settings.get("pad_size") if settings["do_pad"] else None  # None: to the largest of a batch
        size = settings["size"]
        if isinstance(size, int):  # written by transformers 4.2x and earlier
            size = {"shortest_edge": size} if self.crops else {"height": size, "width": size}
        self.size: dict[str, Any] = size if isinstance(size, dict) else {}

    def needs_processor(self, exact: bool) -> bool:
        """Return whether the settings are valid, but a PixelSpec cannot describe them.

        `exact`: whether pixels must be exactly the processor's. Then padding needs the processor, which pads after
        normalising, with a colour that eight bits only approximate.
        """
        if self.pad is None:
            return self.resizes and self.crops and set(self.size) not in ({"shortest_edge"}, {"height", "width"})
        return exact or self.crops or not self.resizes or set(self.size) != {"max_height", "max_width"}

    def spec(self) -> PixelSpec:
        """Return the PixelSpec. Raises ModelError naming a setting that is not supported."""
        mean, std = self.normalisation()
        resample = self.resample()
        if self.pad is not None:
            box = self.sides("size", self.size, "max_")
            height, width = self.sides("pad_size", self.pad)
            if height < box[0] or width < box[1]:
                raise self.error("pad_size", "smaller than the resized image")
            fill = self.fill(mean)
            return PixelSpec(height, width, "inside", 0, resample, mean, std, resized=box, fill=fill)
        if not self.resizes:
            return PixelSpec(*self.crop("do_resize"), "none", 0, resample, mean, std)
        if set(self.size) == {"height", "width"}:
            size = self.sides("size", self.size)
            height, width = self.crop("do_center_crop") if self.crops else size
            return PixelSpec(height, width, "exact", 0, resample, mean, std, resized=size)
        if set(self.size) != {"shortest_edge"}:
            raise self.error("size", "the images of a batch must have one size")
        height, width = self.crop("do_center_crop")
        edge = self.side("size", self.size["shortest_edge"])
        return PixelSpec(height, width, "shortest_edge", edge, resample, mean, std)

    def crop(self, needed_by: str) -> tuple[int, int]:
        """Return the height and width of the centre crop, which the setting `needed_by` makes necessary."""
        if not self.crops:
            raise self.error(needed_by, "the images of a batch must have one size")
        crop = self.settings.get("crop_size")
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        return self.sides("crop_size", crop)

    def sides(self, key: str, value: Any, prefix: str = "") -> tuple[int, int]:
        names = f"{prefix}height", f"{prefix}width"
        if not isinstance(value, dict) or set(value) != set(names):
            raise self.error(key)
        return self.side(key, value[names[0]]), self.side(key, value[names[1]])

    def side(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 1:
            raise self.error(key)
        return value

    def resample(self) -> Any:
        number = self.settings["resample"]
        if not isinstance(number, int) or not 0 <= number < len(FILTERS):
            raise self.error("resample")
        return FILTERS[number]

    def fill(self, mean: tuple[float, float, float]) -> tuple[int, int, int]:
        """Return the colour that becomes 0 when normalised, rounded to eight bits."""
        red, green, blue = (min(255, max(0, round(255 * value))) for value in mean)
        return red, green, blue

    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Return mean and standard deviation for values of 0..1, whatever scale the processor uses."""
        scale = 255 * self.settings["rescale_factor"] if self.settings["do_rescale"] else 255.0
        mean, std = [0.0] * 3, [1.0] * 3
        if self.settings["do_normalize"]:
            mean, std = self.channels("image_mean"), self.channels("image_std")
        red, green, blue = (value / scale for value in mean)
        red_std, green_std, blue_std = (value / scale for value in std)
        return (red, green, blue), (red_std, green_std, blue_std)

    def channels(self, key: str) -> list[float]:
        values = self.settings[key]
        if isinstance(values, int | float):
            values = [values] * 3
        if not isinstance(values, list) or len(values) != 3 or (key == "image_std" and 0 in values):
            raise self.error(key)
        return [float(value) for value in values]

    def error(self, key: str, why: str = "") -> ModelError:
        reason = f" ({why})" if why else ""
        return ModelError(f"{self.file}: {key}={self.settings.get(key)!r} is not supported{reason}")


def native_spec(family: str, file: Path, settings: dict[str, Any]) -> PixelSpec:
    """Return the PixelSpec for a family's processor. Raises ModelError where a size is not a positive integer."""
    limit = family_of(family).limit
    if limit == "area":
        return _patches_spec(file, settings)
    return _tiles_spec(file, settings) if limit == "edge" else default_native_spec(settings)


def default_native_spec(settings: dict[str, Any]) -> PixelSpec:
    """Return the PixelSpec for any processor: up to twice the largest side in its settings, and at least 2048.

    Of a processor with a largest area instead: up to the side of a square of that area.
    """
    sides = [_largest_side(settings.get(name)) for name in ("size", "crop_size", "pad_size", "max_image_size")]
    return _own_edge_spec(max(_DEFAULT_EDGE, *(2 * side for side in sides)), 1, _filter_name(settings, "bicubic"))


def _tiles_spec(file: Path, settings: dict[str, Any]) -> PixelSpec:
    """Idefics3 and SmolVLM: the longer side becomes `size["longest_edge"]`, then the image is cut into tiles."""
    size, tile = settings.get("size") or {"longest_edge": 4 * 364}, settings.get("max_image_size")
    if not settings.get("do_resize", True) or not isinstance(size, dict) or "longest_edge" not in size:
        return default_native_spec(settings)
    edge = min(_pixels(file, "size", size["longest_edge"]), LARGEST_EDGE)
    resample = _filter_name(settings, "lanczos")
    if not _has_known_steps(settings, ("Idefics3", "SmolVLM"), ("do_image_splitting", "do_pad")):
        return _own_edge_spec(edge, 2, resample)
    side = _pixels(file, "max_image_size", tile["longest_edge"] if isinstance(tile, dict) else 364)
    longest = edge + -edge % side
    return PixelSpec(longest + side, longest, "tiles", resample=resample, limit=edge, multiple=side)


def _patches_spec(file: Path, settings: dict[str, Any]) -> PixelSpec:
    """Qwen-VL: both sides become multiples of `patch_size * merge_size`, the area `min_pixels` to `max_pixels`."""
    size = settings["size"] if isinstance(settings.get("size"), dict) else {}
    area = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or 28 * 28 * 1280
    least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or 56 * 56
    if not settings.get("do_resize", True) or not _has_known_steps(settings, ("Qwen2VL",), ()):
        return default_native_spec(settings)
    limit = _pixels(file, "max_pixels", area)
    multiple = _pixels(file, "patch_size", settings.get("patch_size") or 14)
    multiple *= _pixels(file, "merge_size", settings.get("merge_size") or 2)
    # An aspect ratio of 200 with one side of `multiple` pixels, and rounding up to `multiple` on both sides.
    least = _pixels(file, "min_pixels", least)
    side = math.isqrt(max(limit, least, 200 * multiple**2)) + 1 + multiple
    resample = _filter_name(settings, "bicubic")
    return PixelSpec(side, side, "patches", resample=resample, limit=limit, multiple=multiple, least=least)


def _has_known_steps(settings: dict[str, Any], kinds: tuple[str, ...], steps: tuple[str, ...]) -> bool:
    """Return whether an image processor is one of `kinds`, and takes `steps` and normalises as it does by default."""
    name = str(settings.get("image_processor_type") or kinds[0]).removesuffix("Fast").removesuffix("Pil")
    is_kind = name.removesuffix("ImageProcessor") in kinds
    return is_kind and all(settings.get(step, True) for step in (*steps, "do_rescale", "do_normalize"))


def _own_edge_spec(edge: int, multiple: int, resample: Any) -> PixelSpec:
    side = edge + -edge % multiple
    return PixelSpec(side, side, "own_edge", resample=resample, limit=edge, multiple=multiple)


def _filter_name(settings: dict[str, Any], default: str) -> Any:
    number = settings.get("resample")
    return FILTERS[number] if isinstance(number, int) and 0 <= number < len(FILTERS) else default


def _pixels(file: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{file}: {key}={value!r} is not a number of pixels; save the model's processor again")
    return value


def _largest_side(size: Any) -> int:
    sides = size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]
    largest = max((side for side in sides if isinstance(side, int)), default=0)
    return largest if largest <= _LARGEST_SIDE else math.isqrt(largest) // 2
