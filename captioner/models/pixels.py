"""A model's PixelSpec, read from its image processor's settings without loading transformers.

The settings are the `image_processor` section of processor_config.json or, in older directories, all of
preprocessor_config.json. Older ones leave out what equals the default of their class; those defaults are below, as
transformers 5 has them (`transformers/models/*/image_processing_pil_*.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from captioner.data import PixelSpec
from captioner.errors import ModelError
from captioner.models.weights import read_json

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_HALF = [0.5, 0.5, 0.5]
_BILINEAR, _BICUBIC = 2, 3  # PIL.Image.Resampling


def _defaults(side: int, resample: int, mean: list[float], std: list[float], **others: Any) -> dict[str, Any]:
    size = {"height": side, "width": side}
    return {"size": size, "resample": resample, "image_mean": mean, "image_std": std, "do_center_crop": False} | others


_CLASSES: dict[str, dict[str, Any]] = {
    "CLIP": _defaults(
        224,
        _BICUBIC,
        _CLIP_MEAN,
        _CLIP_STD,
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        do_center_crop=True,
    ),
    "Blip": _defaults(384, _BICUBIC, _CLIP_MEAN, _CLIP_STD),
    "ViT": _defaults(224, _BILINEAR, _HALF, _HALF),
    "DeiT": _defaults(256, _BICUBIC, _HALF, _HALF, crop_size={"height": 224, "width": 224}, do_center_crop=True),
    "Beit": _defaults(224, _BICUBIC, _HALF, _HALF, crop_size={"height": 224, "width": 224}),
    "Siglip": _defaults(224, _BICUBIC, _HALF, _HALF),
}
# The class where no file names one, by the model type of the (vision) configuration.
_BY_MODEL_TYPE = {"git": "CLIP", "blip": "Blip", "vit": "ViT", "swin": "ViT", "deit": "DeiT", "beit": "Beit"}
_UNSUPPORTED_FLAGS = ("do_pad", "do_thumbnail", "do_align_long_axis", "do_image_splitting", "rescale_offset")


def read_pixel_spec(directory: Path, model_type: str) -> PixelSpec:
    """The pixels the model in `directory` wants.

    Raises ModelError naming the setting that a PixelSpec cannot express.
    """
    file = directory / "processor_config.json"
    settings = read_json(file).get("image_processor")
    if not isinstance(settings, dict):
        file = directory / "preprocessor_config.json"
        settings = read_json(file)
        if not settings:
            raise ModelError(
                f"{directory}: no image processor settings (processor_config.json or preprocessor_config.json); save"
                " the model's processor into it"
            )
    return _Reader(str(file), _with_defaults(file, settings, model_type)).spec()


def _with_defaults(file: Path, settings: dict[str, Any], model_type: str) -> dict[str, Any]:
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    kind = _BY_MODEL_TYPE.get(model_type, model_type) if named is None else str(named)
    for suffix in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(suffix)
    if kind not in _CLASSES:
        known = ", ".join(f"{name}ImageProcessor" for name in _CLASSES)
        raise ModelError(f"{file}: image_processor_type {named or model_type!r} is not supported; supported: {known}")
    always = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    given = {key: value for key, value in settings.items() if value is not None}
    return always | _CLASSES[kind] | given


class _Reader:
    """Turns complete settings into a PixelSpec."""

    def __init__(self, file: str, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings

    def spec(self) -> PixelSpec:
        for flag in _UNSUPPORTED_FLAGS:
            if self.settings.get(flag):
                raise self.refuse(flag)
        if not self.settings["do_resize"]:
            raise self.refuse("do_resize", "pictures of one batch must have one size")
        resize, edge, height, width = self.geometry()
        mean, std = self.normalisation()
        return PixelSpec(height, width, resize, edge, self.resample(), mean, std)

    def geometry(self) -> tuple[Literal["exact", "shortest_edge"], int, int, int]:
        """How to resize, the shortest edge (0 for exact), height and width of the result."""
        crops = self.settings["do_center_crop"]
        size = self.settings["size"]
        if isinstance(size, int):  # written by transformers 4.2x and earlier
            size = {"shortest_edge": size} if crops else {"height": size, "width": size}
        if set(size) == {"height", "width"}:
            height, width = self.side("size", size["height"]), self.side("size", size["width"])
            if crops and self.crop() != (height, width):
                raise self.refuse("do_center_crop", "after an exact resize")
            return "exact", 0, height, width
        if set(size) != {"shortest_edge"}:
            raise self.refuse("size")
        if not crops:
            raise self.refuse("do_center_crop", "pictures of one batch must have one size")
        edge = self.side("size", size["shortest_edge"])
        height, width = self.crop()
        if max(height, width) > edge:
            raise self.refuse("crop_size", "larger than the resized picture")
        return "shortest_edge", edge, height, width

    def crop(self) -> tuple[int, int]:
        crop = self.settings.get("crop_size")
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        if not isinstance(crop, dict) or set(crop) != {"height", "width"}:
            raise self.refuse("crop_size")
        return self.side("crop_size", crop["height"]), self.side("crop_size", crop["width"])

    def side(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 1:
            raise self.refuse(key)
        return value

    def resample(self) -> Literal["bicubic", "bilinear"]:
        match self.settings["resample"]:
            case 3:
                return "bicubic"
            case 2:
                return "bilinear"
        raise self.refuse("resample", "only 2 (bilinear) and 3 (bicubic)")

    def normalisation(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation for values of 0..1, whatever scale the processor normalises at."""
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
            raise self.refuse(key)
        return [float(value) for value in values]

    def refuse(self, key: str, why: str = "") -> ModelError:
        reason = f" ({why})" if why else ""
        return ModelError(f"{self.file}: {key}={self.settings.get(key)!r} is not supported{reason}")
