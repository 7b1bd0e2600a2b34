"""`ModelRef`: what is known of a model without loading it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from captioner.data import CAPTION, PixelSpec, Question
from captioner.files import shown
from captioner.models.families import family_of

# To be increased when the same file and the same PixelSpec give other pixels than before.
PREPROCESSING_VERSION = 2
MAX_ENDPOINT_ROWS, ENDPOINT_CHUNK_BYTES = 64, 400_000_000


@dataclass(frozen=True)
class Endpoint:
    """Model servers that answer as one model, and how they are asked. Holds no key.

    `model`: the name that requests give. `served_model`, `system_fingerprint`: what the answers say who gave them.
    `logprobs`: whether the servers give log-probabilities. `response_format`: whether they take the schemas of the
    questions. `concurrency`: requests under way at each server. `request_timeout`, `endpoint_timeout`: in seconds (see
    `captioner.config.ModelConfig`). `sampling_options`: those of `n` and `seed` that the servers take in a request.
    """

    urls: tuple[str, ...]
    model: str
    served_model: str
    system_fingerprint: str | None
    logprobs: bool
    response_format: bool
    concurrency: int
    max_side: int
    request_timeout: float
    endpoint_timeout: float
    sampling_options: tuple[str, ...] = ("n", "seed")

    @property
    def rows_per_chunk(self) -> int:
        """The images of a chunk: few, since a kill loses at most the chunks under way, and each answer may cost."""
        return max(1, min(MAX_ENDPOINT_ROWS, ENDPOINT_CHUNK_BYTES // (3 * self.max_side**2)))

    def chunks_at_once(self, rows_per_chunk: int) -> int:
        """Return how many chunks must be under way so that no server waits while the last images of some are answered.

        Twice as many as the requests need, and two: with answers that take unequally long (log-normal, sigma 0.5) a
        simulation then keeps servers 97 % busy, with one chunk more than needed 60 to 90 %.
        """
        return 2 + 2 * math.ceil(self.concurrency * len(self.urls) / rows_per_chunk)

    def shared_by(self, num_workers: int) -> Endpoint:
        """Return the part of one of several workers that together keep `concurrency`."""
        return replace(self, concurrency=max(1, self.concurrency // num_workers))


@dataclass(frozen=True)
class ModelRef:
    """A model and the settings of its captions. Small and picklable; `resolve` returns it, `load` opens it.

    `name`: as the user wrote it. `path`: the model directory on the machine that resolved it; "" for the fake.
    `revision`: the commit of a hub id. `sha256`: of the weights files' contents, in the order of their names.
    `settings_sha256`: of the configuration, tokenizer, processor and generation files.
    `max_positions`: text positions of the decoder, prompt included; None where config.json does not limit them.
    `training_run_id`: the training run that made the model, from `training_run.json` in its directory.
    `adapter`: the directory of the LoRA adapter that is merged into the model in `path`, if any.
    `endpoint`: the servers of a model that is not loaded here; `sha256` is then that of its name and fingerprint there.
    `prompt`, `max_new_tokens`, `caption_schema`: of the caption (see `captioner.data.Question`). `system`: the system
    prompt. `quantize`: the bits of the weights where they are fewer than those of `dtype` (see
    `captioner.models.quantized`). `more_questions`: asked after the caption.
    """

    name: str
    path: str
    family: str
    sha256: str
    settings_sha256: str
    spec: PixelSpec
    dtype: str = "float32"
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    num_captions: int = 1
    seed: int = 0
    max_new_tokens: int = 40
    prompt: str | None = None
    max_positions: int | None = None
    revision: str | None = None
    training_run_id: str | None = None
    endpoint: Endpoint | None = None
    adapter: str | None = None
    system: str | None = None
    caption_schema: str | None = None
    quantize: str | None = None
    more_questions: tuple[Question, ...] = ()

    @property
    def questions(self) -> tuple[Question, ...]:
        """All that is asked about each image, the caption first."""
        return (Question(CAPTION, self.prompt, self.max_new_tokens, self.caption_schema), *self.more_questions)

    @property
    def question_facts(self) -> dict[str, dict[str, Any]] | None:
        """The further questions by name, and the schema of the caption, for records; None where there are none."""
        caption = {CAPTION: {"schema": self.caption_schema}} if self.caption_schema else {}
        return {**caption, **{question.name: asdict(question) for question in self.more_questions}} or None

    @property
    def served_model(self) -> str | None:
        return self.endpoint.served_model if self.endpoint else None

    @property
    def system_fingerprint(self) -> str | None:
        return self.endpoint.system_fingerprint if self.endpoint else None

    @property
    def max_side(self) -> int | None:
        return self.endpoint.max_side if self.endpoint else None

    @property
    def question(self) -> str:
        """The prompt where it is a question to a chat model, which is not part of a caption; else ""."""
        return (self.prompt or "") if family_of(self.family).prompt == "question" else ""

    def shared_by(self, num_workers: int) -> ModelRef:
        """Return the model for one of several workers: of servers, with its part of the requests under way."""
        return replace(self, endpoint=self.endpoint.shared_by(num_workers)) if self.endpoint else self

    @property
    def preprocess(self) -> str:
        return self.spec.preprocess

    @property
    def summary(self) -> str:
        """Return a line for the user: the model's family, what prepares its images, and the prompt."""
        prompt = "" if self.prompt is None else f"; prompt {self.prompt!r}"
        if self.more_questions:
            prompt += f"; further questions: {', '.join(question.name for question in self.more_questions)}"
        if self.endpoint:
            servers = ", ".join(self.endpoint.urls)
            return f"model {self.name}: served by {servers}; images of at most {self.max_side} pixels a side{prompt}"
        preparation = "its own image processor" if self.spec.variable_size else f"--preprocess {self.preprocess}"
        bits = f", weights of linear layers in {self.quantize}" if self.quantize else ""
        merged = "" if self.adapter is None else f" with a LoRA adapter merged into {self.path}"
        return f"model {shown(self.name)}: {self.family}{merged}{bits}; images prepared by {preparation}{prompt}"

    @cached_property
    def fingerprint(self) -> str:
        """Return the hex sha256 over all that determines captions: not the name, path, device or batch size."""
        parts: dict[str, Any] = {
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
        elif self.spec.resize == "tiles":  # which the model's processor cut until the fast way was added
            parts["preprocess"] = "fast tiles"
        if self.temperature:
            parts["sampling"] = [self.temperature, self.top_p, self.num_captions, self.seed]
        if self.quantize:
            parts["quantize"] = self.quantize
        if self.system:
            parts["system"] = self.system
        if self.question_facts:
            parts["questions"] = self.question_facts
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
