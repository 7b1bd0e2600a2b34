"""A model's own processor, opened from its directory, and batches of images that it prepares.

transformers uses torchvision for images where it is installed, which gives other pixels than Pillow. Here it is always
Pillow, so that captions do not depend on what else is installed. Processors that also support video refuse to load
without torchvision, so they are built from their image processor and tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from transformers import AutoImageProcessor, ProcessorMixin

from captioner.data import Pixels
from captioner.errors import ModelError
from captioner.models.pretrained import LOADING_ERRORS, open_tokenizer, quiet
from captioner.run.prefetch import one_ahead

_OPTIONS = {"trust_remote_code": False, "local_files_only": True}


def open_image_processor(path: str) -> Any:
    """Return the image processor of a model directory. Raises ModelError where transformers cannot open one."""
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(path, backend="pil", **_OPTIONS)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path}: the image processor cannot be loaded: {' '.join(str(error).split())}") from None


def open_processor(path: str, kind: type[ProcessorMixin]) -> Any:
    """Return a processor of class `kind` for images and text, which pads text on the left. Raises ModelError."""
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
    """Return a subclass of `kind` that needs no video processor, which directories and machines may lack."""
    parts = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})


@dataclass(frozen=True)
class ProcessedBatch:
    """Images and the output of `process` for all of them; None where it is computed when asked for."""

    images: Pixels
    process: Callable[[Pixels], Any]
    processed: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> ProcessedBatch:
        return ProcessedBatch(self.images[part], self.process)

    def inputs(self) -> Any:
        """Return the output of `process`."""
        return self.process(self.images) if self.processed is None else self.processed


def processed_batches(
    images: Pixels, size: int, process: Callable[[Pixels], Any]
) -> AbstractContextManager[Iterator[ProcessedBatch]]:
    """Yield an iterator over batches of `size` images; the next one is processed while the caller uses the current."""
    parts = (images[first : first + size] for first in range(0, len(images), size))
    return one_ahead(ProcessedBatch(part, process, process(part)) for part in parts)
