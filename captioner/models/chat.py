"""Chat models that take an image in the user's turn: any model type whose processor has a chat template.

PaliGemma differs only in the text that the processor gets.

The model's own processor prepares image and prompt: it splits or scales the image, applies the chat template and
inserts as many placeholders as the image has tokens. So the rows of a batch differ in length; they are padded on the
left, so that all answers begin at the same position. Everything the processor returns goes to `generate`, as in
transformers' own examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from captioner.data import CAPTION, Captions, Pixels, Prompts, Question
from captioner.errors import ModelError
from captioner.models.answers import NO_CAPTIONS, asked_again, misfit, replaced, with_gaps
from captioner.models.base import TransformersCaptioner
from captioner.models.families import family_of
from captioner.models.prepared import prepared_by_decoders
from captioner.models.processors import ProcessedBatch, open_processor
from captioner.models.prompt_text import PromptError, apply_template, check_no_placeholder
from captioner.models.questions import same_prompts, with_answers
from captioner.models.ref import ModelRef
from captioner.models.shared_features import SharedFeatures
from captioner.models.thoughts import BEGINNING, CUT, ONLY_THOUGHT, begins_thought, without_thought

MAX_TEXTS = 4_096  # prompts in their template that are kept; with columns each image may have its own


@dataclass(frozen=True)
class AskedImages:
    """Images with the text that the processor gets with each, and the settings of the search for the answers."""

    images: Pixels
    texts: Sequence[str]
    settings: GenerationConfig

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def __getitem__(self, part: slice | list[int]) -> AskedImages:
        texts = self.texts[part] if isinstance(part, slice) else [self.texts[index] for index in part]
        return AskedImages(self.images[part], texts, self.settings)


class ChatCaptioner(TransformersCaptioner):
    """The caption is the answer without question, image tokens and template."""

    def __init__(
        self, ref: ModelRef, device: torch.device, batch_size: int, max_memory: dict[int | str, int] | None = None
    ) -> None:
        super().__init__(ref, device, batch_size, max_memory)
        self.text_of = lru_cache(MAX_TEXTS)(self.text_before_answer)
        self.prompts = same_prompts(ref)
        try:
            texts = [self.text_of(prompt) for prompt in self.prompts]
        except PromptError as error:
            raise ModelError(f"{ref.path}: {error}") from None
        bos_token = self.tokenizer.bos_token
        has_start_token = bos_token is not None and texts[0].startswith(bos_token)
        # A template that contains the start token must not get a second one (as in transformers).
        self._special_tokens = {"add_special_tokens": False} if has_start_token else {}
        self.begins_thought = begins_thought(texts[0])
        self._features = SharedFeatures(self.model)
        self._prepared = prepared_by_decoders(ref.spec, self.processor.image_processor)
        if self._prepared is not None:
            self.processor.image_processor = self._prepared

    def open_native_processor(self) -> Any:
        return open_processor(self.ref.path, family_of(self.ref.family))

    def text_before_answer(self, prompt: str) -> str:
        """Return the text that the processor gets with an image, with a placeholder where the image belongs."""
        return apply_template(self.processor, prompt, self.ref.system)

    def caption(self, pixels: Pixels, prompts: Sequence[Prompts] | None = None) -> Captions:
        """Ask all questions about the images, one question after the other. `prompts`: see `Captioner.caption`.

        The vision part encodes an image for the first question that is asked about it.
        """
        columns = zip(*(prompts or [self.prompts] * len(pixels)), strict=True)
        questions = zip(self.ref.questions, columns, strict=True)
        with self._features.sharing(pixels if self.ref.more_questions else []):
            replies = [self._ask_some(pixels, question, column) for question, column in questions]
        return with_answers(self.ref.questions, replies, prompts)

    def _ask_some(self, pixels: Pixels, question: Question, prompts: Sequence[str | None]) -> Captions:
        """Ask one question about the images that have a prompt; there is an empty answer in place of the others."""
        indices = [index for index, prompt in enumerate(prompts) if prompt is not None]
        texts = [prompt for prompt in prompts if prompt is not None]
        if len(texts) == len(prompts):
            return self._ask(pixels, question, texts)
        answers = self._ask(pixels[indices], question, texts) if texts else NO_CAPTIONS
        return with_gaps(answers, indices, len(prompts))

    def _ask(self, pixels: Pixels, question: Question, prompts: Sequence[str]) -> Captions:
        """Ask one question; once more about the images whose answers do not fit its schema."""
        captions = self.caption_batches(self._asked(pixels, question, prompts))
        misfits = [misfit(question, *answer) for answer in zip(captions.texts, captions.finished, strict=True)]
        indices = [index for index, reason in enumerate(misfits) if reason and not captions.errors[index]]
        if not indices:
            return captions
        prompts = [asked_again(question, prompts[index], misfits[index]) for index in indices]
        return replaced(captions, indices, self.caption_batches(self._asked(pixels[indices], question, prompts)))

    def _asked(self, pixels: Pixels, question: Question, prompts: Sequence[str]) -> AskedImages:
        settings = deepcopy(self.settings)
        settings.max_new_tokens = question.max_new_tokens
        if question.name != CAPTION:
            settings.num_return_sequences = 1
        # A limit below the checkpoint's minimum would be an error of `generate`.
        settings.min_length = min(settings.min_length or 0, question.max_new_tokens)
        settings.min_new_tokens = min(settings.min_new_tokens or 0, question.max_new_tokens) or None
        return AskedImages(pixels, [self.text_of(prompt) for prompt in prompts], settings)

    def start_ids(self) -> list[int]:
        return []

    def judge(self, answers: Captions) -> Captions:
        """Return the answers without the reasoning of models that cannot leave it out."""
        begun = BEGINNING if self.begins_thought else ""
        answered = [begun + text for text in answers.texts]
        texts = [without_thought(text) for text in answered]
        columns = zip(answered, texts, answers.finished, strict=True)
        errors = [
            ONLY_THOUGHT + ("" if finished else CUT) if answer and not text else ""
            for answer, text, finished in columns
        ]
        return replace(answers, texts=texts, errors=errors)

    def num_captions(self, images: Any) -> int:
        if not isinstance(images, AskedImages):
            return super().num_captions(images)
        return images.settings.num_return_sequences or 1

    def search_batch(self, values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with self._features.batch(list(values.images)):
            return super().search_batch(values)

    def free_memory(self) -> None:
        self._features.free()
        super().free_memory()

    def process(self, images: Pixels | AskedImages) -> dict[str, Any]:
        """Return the processor's output for the images and what is asked about each, and the settings of the search.

        Not normalised where `_prepared` does it. Pixels alone are asked for the caption.
        """
        if not isinstance(images, AskedImages):
            images = self._asked(images, self.ref.questions[0], self.prompts[:1] * len(images))
        inputs = self.processor(
            text=images.texts,
            images=[[image if self._prepared else Image.fromarray(image)] for image in images.images],
            padding=True,
            return_tensors="pt",
            **self._special_tokens,
        )
        return {**inputs, "generation_config": images.settings}

    def prepare(self, values: ProcessedBatch) -> dict[str, Any]:
        inputs = values.inputs()
        self.count_tokens(inputs["attention_mask"])
        inputs = {name: self._to_device(value) for name, value in inputs.items()}
        if self._prepared is not None:
            inputs = self._prepared.normalised(inputs)
        return {name: self._to_dtype(value) for name, value in inputs.items()}

    def _to_device(self, value: Any) -> Any:
        """Return a tensor on the device, and anything else, such as a list of sizes, unchanged."""
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def _to_dtype(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def search(
        self, prepared: dict[str, Any], numbers: torch.Tensor | None = None, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # An encoder-decoder returns a start token before the answer, other models the question.
        num_start = 1 if self.model.config.is_encoder_decoder else prepared["input_ids"].shape[1]
        return self.search_after(num_start, prepared, numbers)

    def generate(self, prepared: dict[str, Any], /, **options: Any) -> Any:
        return self.model.generate(**prepared, **options)


class PrefixCaptioner(ChatCaptioner):
    """PaliGemma: the prompt is the text between the image and the caption, without a chat template."""

    def text_before_answer(self, prompt: str) -> str:
        check_no_placeholder(prompt, self.processor.image_token)
        return f"{self.processor.image_token}{prompt}"
