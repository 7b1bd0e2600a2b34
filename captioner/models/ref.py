"""`ModelRef`: everything about a chosen model that can be known without loading it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from captioner.data import PixelSpec
from captioner.files import shown

# Raised whenever the same file and the same PixelSpec would give other pixels than before.
PREPROCESSING_VERSION = 2


@dataclass(frozen=True)
class ModelRef:
    """A model and how it writes captions: small, picklable, made by `resolve` and turned into a captioner by `load`.

    `name`: as the user wrote it. `path`: the model directory on the machine that resolved it; "" for the fake.
    `revision`: the commit of a hub id. `sha256`: of the weights, their files' contents in the order of their names.
    `settings_sha256`: of the configuration, tokenizer, processor and generation files.
    `max_positions`: how many text tokens, prompt included, the decoder can hold; None where config.json does not say.
    `training_run_id`: which training run made the model, where its directory says so (`training_run.json`).
    """

    name: str
    path: str
    family: str
    sha256: str
    settings_sha256: str
    spec: PixelSpec
    dtype: str = "float32"
    num_beams: int = 1
    max_new_tokens: int = 40
    prompt: str | None = None
    max_positions: int | None = None
    revision: str | None = None
    training_run_id: str | None = None

    @property
    def preprocess(self) -> str:
        return self.spec.preprocess

    @property
    def summary(self) -> str:
        """What a person should know of it before a run: its family, who prepares the pictures, the prompt."""
        prompt = "" if self.prompt is None else f"; prompt {self.prompt!r}"
        by = "its own image processor" if self.spec.variable_size else f"--preprocess {self.preprocess}"
        return f"model {shown(self.name)}: {self.family}; images prepared by {by}{prompt}"

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over all that determines captions: not the name, the place, the device or the batch size."""
        parts = {
            "weights": self.sha256,
            "settings": self.settings_sha256,
            "dtype": self.dtype,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "prompt": self.prompt,
            "preprocessing": PREPROCESSING_VERSION,
        }
        if self.preprocess != "fast":
            parts["preprocess"] = self.preprocess
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
