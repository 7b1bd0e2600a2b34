"""A model's own processor, opened from its directory, and batches of images that it prepares.

transformers uses torchvision for images where it is installed, which gives other pixels than Pillow. Here it is always
Pillow, so that captions do not depend on what else is installed. Processors that also support video refuse to load
without torchvision, so they are built from their image processor and tokenizer alone (`images_only`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import AutoImageProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from captioner.errors import ModelError
from captioner.models import weights
from captioner.models.families import Family
from captioner.models.pretrained import LOADING_ERRORS, open_tokenizer, quiet
from captioner.models.prompt_text import chat_template_of
from captioner.run.prefetch import one_ahead

_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_OPTIONS = {"trust_remote_code": False, "local_files_only": True}


def open_image_processor(path: str) -> Any:
    """Return the image processor of a model directory. Raises ModelError where transformers cannot open one."""
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(path, backend="pil", **_OPTIONS)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path}: the image processor cannot be loaded: {' '.join(str(error).split())}") from None


def open_processor(path: str, family: Family) -> Any:
    """Return a family's processor for images and text, which pads text on the left. Raises ModelError."""
    parts = {"image_processor": open_image_processor(path), "tokenizer": open_tokenizer(path)}
    try:
        with quiet():
            kind = processor_class(family, Path(path))
            settings, _ = kind.get_processor_dict(path, local_files_only=True)
            absent = dict.fromkeys(set(kind.get_attributes()) - set(parts))
            processor = images_only(kind).from_args_and_dict([], settings, **parts, **absent)
    except LOADING_ERRORS as error:
        raise ModelError(f"{path}: the processor cannot be loaded: {' '.join(str(error).split())}") from None
    tokenizer = processor.tokenizer
    processor.chat_template = chat_template_of(processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token will do: padding is masked
    if tokenizer.pad_token is None:
        raise ModelError(f"{path}: the tokenizer has no token for padding; set pad_token in tokenizer_config.json")
    return processor


def processor_class(family: Family, directory: Path) -> type[ProcessorMixin]:
    """Return the class of the processor: the family's, the one the directory names, or transformers' for the type.

    Raises LookupError or AttributeError where transformers has none.
    """
    files = (weights.read_json(directory / name) for name in _PROCESSOR_FILES)
    named = next((name for file in files if isinstance(name := file.get("processor_class"), str)), "")
    by_directory = named if hasattr(transformers, named) else ""
    kind: type[ProcessorMixin] = getattr(
        transformers, family.processor or by_directory or PROCESSOR_MAPPING_NAMES[family.name]
    )
    return kind


def images_only(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a subclass of `kind` without its parts for video and sound, which directories and machines may lack."""
    names = kind.get_attributes()
    absent = [name for name in names if name not in ("image_processor", "tokenizer")]
    present = [name for name in names if name not in absent]

    class ImagesOnly(ProcessorMixin):  # between `kind` and ProcessorMixin in the order of methods
        def __init__(self, *args: Any, **options: Any) -> None:
            given = dict(zip(names, args, strict=False)) | options
            super().__init__(**{name: part for name, part in given.items() if name not in absent})

    attributes: dict[str, Any] = {name: _AbsentPart() for name in absent}
    attributes["get_attributes"] = classmethod(lambda cls: present)
    return type(kind.__name__, (kind, ImagesOnly), attributes)


class _AbsentPart:
    """In place of a processor's part: has any setting, with the value None."""

    model_input_names: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class ProcessedBatch:
    """Images and the output of `process` for all of them; None where it is computed when asked for.

    `images`: pixels, or what else has a length and parts, and is taken by `process`.
    """

    images: Any
    process: Callable[[Any], Any]
    processed: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, part: slice) -> ProcessedBatch:
        return ProcessedBatch(self.images[part], self.process)

    def inputs(self) -> Any:
        """Return the output of `process`."""
        return self.process(self.images) if self.processed is None else self.processed


def processed_batches(
    images: Any, size: int, process: Callable[[Any], Any]
) -> AbstractContextManager[Iterator[ProcessedBatch]]:
    """Yield an iterator over batches of `size` images; the next one is processed while the caller uses the current."""
    parts = (images[first : first + size] for first in range(0, len(images), size))
    return one_ahead(ProcessedBatch(part, process, process(part)) for part in parts)
