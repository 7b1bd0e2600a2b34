"""A model's own processor, from its directory: the same with and without torchvision, and no video.

transformers takes torchvision for pictures where it is installed, with other pixels than with Pillow; here it is
always Pillow, so that captions do not depend on what else is installed. Processors that also know video refuse to load
without torchvision, so they are made of their image processor and tokenizer alone.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoImageProcessor, ProcessorMixin

from captioner.errors import ModelError
from captioner.models.pretrained import LOADING_ERRORS, open_tokenizer, quiet

_OPTIONS = {"trust_remote_code": False, "local_files_only": True}


def open_image_processor(path: str) -> Any:
    """Raises ModelError where the directory has none that transformers knows."""
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(path, backend="pil", **_OPTIONS)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path}: the image processor cannot be loaded: {' '.join(str(error).split())}") from None


def open_processor(path: str, kind: type[ProcessorMixin]) -> Any:
    """A processor of class `kind`, for pictures and text, which it pads on the left. Raises ModelError."""
    parts = [open_image_processor(path), open_tokenizer(path)]
    try:
        with quiet():
            settings, _ = kind.get_processor_dict(path, local_files_only=True)
            processor = without_video(kind).from_args_and_dict(parts, settings)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path}: the processor cannot be loaded: {' '.join(str(error).split())}") from None
    processor.tokenizer.padding_side = "left"
    return processor


def without_video(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The class for directories and machines without what it needs for video."""
    parts = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
