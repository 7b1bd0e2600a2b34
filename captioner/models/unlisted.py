"""Model types that are not in the table of families: whether they can be tried as chat models.

Any type can that has a model, a processor and an image processor on Pillow in transformers, and a chat template in its
directory. Imports transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.import_utils import DummyObject

from captioner.models.families import family_of
from captioner.models.processors import processor_class
from captioner.models.weights import read_json


def why_unsupported(directory: Path, config: dict[str, Any]) -> str | None:
    """Return why the model in `directory`, with the contents of its config.json, cannot be tried; None where it can."""
    model_type = str(config.get("model_type"))
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        if "auto_map" in config:
            return "it needs the directory's own code, which is never run"
        return f"transformers {transformers.__version__} has no model of this type that captions images"
    if model_type not in PROCESSOR_MAPPING_NAMES:
        return f"transformers {transformers.__version__} has no processor of this type"
    processor = processor_class(family_of(model_type), directory)
    if isinstance(processor, DummyObject):
        return f"its {processor.__name__} needs a package that is not installed ({', '.join(processor._backends)})"
    if not _is_on_pillow(directory, model_type):
        return "its image processor needs torchvision, and only those that use Pillow are supported"
    if not _has_chat_template(directory):
        return "its directory has no chat template, and its form of prompt is not known"
    return None


def _is_on_pillow(directory: Path, model_type: str) -> bool:
    """Return whether transformers has a version of the model's image processor that uses Pillow."""
    settings = read_json(directory / "processor_config.json").get("image_processor")
    if not isinstance(settings, dict):
        settings = read_json(directory / "preprocessor_config.json")
    name = settings.get("image_processor_type")
    if not isinstance(name, str):
        return "pil" in (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {})
    kind = name.removesuffix("Fast").removesuffix("Pil")
    classes = [versions for versions in IMAGE_PROCESSOR_MAPPING_NAMES.values() if versions]
    return any(kind in versions.values() and "pil" in versions for versions in classes)


def _has_chat_template(directory: Path) -> bool:
    """Return whether there is a chat template in one of the places where transformers looks for it."""
    if any((directory / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    files = ("processor_config.json", "tokenizer_config.json")
    return any(read_json(directory / name).get("chat_template") for name in files)
