"""`ModelRef`: what is known of a model without loading it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from captioner.data import PixelSpec
from captioner.files import shown

# To be increased when the same file and the same PixelSpec give other pixels than before.
PREPROCESSING_VERSION = 2


@dataclass(frozen=True)
class ModelRef:
    """A model and the settings of its captions. Small and picklable; `resolve` returns it, `load` opens it.

    `name`: as the user wrote it. `path`: the model directory on the machine that resolved it; "" for the fake.
    `revision`: the commit of a hub id. `sha256`: of the weights files' contents, in the order of their names.
    `settings_sha256`: of the configuration, tokenizer, processor and generation files.
    `max_positions`: text positions of the decoder, prompt included; None where config.json does not limit them.
    `training_run_id`: the training run that made the model, from `training_run.json` in its directory.
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
        """Return a line for the user: the model's family, what prepares its images, and the prompt."""
        prompt = "" if self.prompt is None else f"; prompt {self.prompt!r}"
        preparation = "its own image processor" if self.spec.variable_size else f"--preprocess {self.preprocess}"
        return f"model {shown(self.name)}: {self.family}; images prepared by {preparation}{prompt}"

    @cached_property
    def fingerprint(self) -> str:
        """Return the hex sha256 over all that determines captions: not the name, path, device or batch size."""
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
