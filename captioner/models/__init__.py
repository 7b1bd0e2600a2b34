"""Captioning models: `resolve` finds what --model names, `check` compares its tensors with its config, `load` opens it.

`resolve` is light. `check` and `load` import torch and transformers when called.
"""

from captioner.models.checking import PendingCheck, check, check_in_subprocess
from captioner.models.fake import FakeCaptioner
from captioner.models.families import FAMILIES
from captioner.models.loading import is_small, load, resolve_dtype, weights_bytes
from captioner.models.ref import PREPROCESSING_VERSION, ModelRef
from captioner.models.resolving import resolve

__all__ = [
    "FAMILIES",
    "PREPROCESSING_VERSION",
    "FakeCaptioner",
    "ModelRef",
    "PendingCheck",
    "check",
    "check_in_subprocess",
    "is_small",
    "load",
    "resolve",
    "resolve_dtype",
    "weights_bytes",
]
