"""What the model families have in common: batches on the device, normalisation, search settings, log-probabilities.

Importing it takes seconds, because it imports torch and transformers. `captioner.models.load` imports it when needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessorList

from captioner.data import Captions, Pixels, Prompts, Usage, object_array
from captioner.errors import ModelError
from captioner.models.devices import GPUS, device_name, gpu_failures, pick_devices
from captioner.models.logits import DrawingProcessor, Sampling, ScoreRecorder, mean_logprobs, token_counts
from captioner.models.placement import no_room
from captioner.models.pretrained import decode_all, open_model, open_tokenizer, quiet
from captioner.models.processors import ProcessedBatch, open_image_processor, processed_batches
from captioner.models.quantized import stored_bytes
from captioner.models.ref import ModelRef
from captioner.models.seeds import random_numbers
from captioner.models.uploads import Uploads

# The settings of a checkpoint's generation_config.json that affect greedy and beam search. The others belong to
# sampling, or are set by ModelRef (beams, length).
KEPT_GENERATION_SETTINGS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "pad_token_id",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
)


class TransformersCaptioner:
    """A captioner that uses a model's `generate`. Subclasses define the start ids and call `generate` of one family."""

    attention: ClassVar[str | None] = None  # attention implementation; None: the default of transformers
    engine: str = "generic"  # "fast" where the family has a search of its own instead of transformers' `generate`

    def __init__(
        self, ref: ModelRef, device: torch.device, batch_size: int, max_memory: dict[int | str, int] | None = None
    ) -> None:
        """Load the model. `max_memory`: of each device that shares its weights (see `open_model`); None: one device."""
        self.ref, self.device, self.batch_size = ref, device, batch_size
        self.devices = pick_devices(device, len(max_memory or [device]))
        self.device_name = device_name(self.devices)
        self.dtype: torch.dtype = getattr(torch, ref.dtype)
        self.uploads = Uploads(device)
        self.sampling = Sampling.from_model(ref)
        self._search_lock = threading.Lock()  # calls from two threads are searched one after the other
        self._has_room = False  # whether the device is known to have memory for an image
        self.model = open_model(ref.path, self.dtype, device, self.attention, ref.adapter, ref.quantize, max_memory)
        self.weights_bytes = stored_bytes(self.model)
        self._usage = Usage()  # counted since the last call of `caption` that returned
        self.tokenizer = open_tokenizer(ref.path)
        self.prefix = self.start_ids()
        self._check_length()
        self.checkpoint_settings: GenerationConfig = self.model.generation_config
        self.settings = self.text_model().generation_config = self.search_settings()
        self.mean = torch.tensor(ref.spec.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(ref.spec.std, device=device).view(1, 3, 1, 1)
        self.processor: Any = self.open_native_processor() if ref.spec.variable_size else None

    def use_device(self, device: torch.device) -> None:
        """Compute on `device`, to which the caller has moved the network."""
        self.device, self.uploads = device, Uploads(device)
        self.devices, self.device_name = [device], device_name([device])
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def start_ids(self) -> list[int]:
        """Return the token ids before the caption, start token and prompt, which are not part of it."""
        raise NotImplementedError

    def open_native_processor(self) -> Any:
        """Return the processor that `process` calls for images of variable size."""
        return open_image_processor(self.ref.path)

    def process(self, images: Pixels) -> Any:
        """Return the output of the model's own processor for images of variable size, on the CPU."""
        return self.processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values

    def prepare(self, values: Any) -> Any:
        """Return the input of `search`: for most families, normalised pixels [N, 3, H, W] on the device.

        `values`: uint8 pixels [N, H, W, 3] on the device, or a ProcessedBatch.
        """
        return self.normalise(values) if self.processor is None else values.inputs().to(self.device, self.dtype)

    def generate(self, prepared: Any, /, **options: Any) -> Any:
        """Call the model's `generate`."""
        raise NotImplementedError

    def text_model(self) -> Any:
        """Return the network whose `generate` runs, with its generation settings."""
        return self.model

    def special_token_settings(self) -> dict[str, Any]:
        """Return generation settings of the family that replace those of the checkpoint's file."""
        return {}

    def prompt_ids(self) -> list[int]:
        return self.tokenizer(self.ref.prompt, add_special_tokens=False).input_ids if self.ref.prompt else []

    def _check_length(self) -> None:
        ref, num_start = self.ref, len(self.prefix)
        if ref.max_positions is not None and num_start + ref.max_new_tokens > ref.max_positions:
            raise ModelError(
                f"--prompt of {num_start - 1} tokens and --max-new-tokens {ref.max_new_tokens}: {ref.path} has"
                f" {ref.max_positions} text positions; shorten one of them"
            )

    def search_settings(self) -> GenerationConfig:
        """Return the checkpoint's generation settings, with beams, number of captions and length of `ref`."""
        checkpoint = self.text_model().generation_config
        kept = {name: getattr(checkpoint, name, None) for name in KEPT_GENERATION_SETTINGS}
        kept |= self.special_token_settings()
        limit = self.ref.max_new_tokens
        # --max-new-tokens below the checkpoint's minimum would be an error of `generate`: the minimum is lowered.
        kept["min_length"] = min(kept["min_length"] or 0, len(self.prefix) + limit)
        kept["min_new_tokens"] = min(kept["min_new_tokens"] or 0, limit) or None
        if self.ref.num_beams == 1:  # transformers warns about these two where there is no beam search
            kept |= {"early_stopping": None, "length_penalty": None}
        sampling: dict[str, Any] = {"do_sample": False}
        if self.sampling:
            # `generate` draws from what DrawingProcessor leaves; only so it returns several captions without beams.
            sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": self.sampling.num_captions}
        return GenerationConfig(
            **{name: value for name, value in kept.items() if value is not None},
            **sampling,
            num_beams=self.ref.num_beams,
            max_new_tokens=limit,
            return_dict_in_generate=True,
        )

    def caption(self, pixels: Pixels, prompts: Sequence[Prompts] | None = None) -> Captions:
        """Caption images. `prompts`: of chat models, whose prompts may differ from image to image."""
        return self.caption_batches(pixels)

    def caption_batches(self, images: Any) -> Captions:
        """Caption pixels, or what else `process` takes, `batch_size` at a time.

        While one batch is searched, the next is copied to the device and the one before is decoded to text. Two threads
        may call this at once; then batches overlap from one call to the next. Where a batch does not fit the device's
        memory it is halved, and `batch_size` stays at the size that fits. Images of variable size are sorted, largest
        first, so that the rows of a batch differ little in length.

        Raises torch.OutOfMemoryError where an image does not fit, and ModelError where it is alone, none was captioned
        before and a small one does not fit either: then the model is too large for the device, not the image. Raises
        ModelError also where the GPU has failed.
        """
        with gpu_failures(self.devices, self.device_name):
            try:
                return self._caption_sorted(images)
            except torch.OutOfMemoryError as error:
                if self._has_room or len(images) > 1:
                    raise
                message = str(error)
            self._check_room()  # outside the except clause, as below
            raise torch.OutOfMemoryError(message)

    def _caption_sorted(self, images: Any) -> Captions:
        if self.processor is None:
            return self._caption_in_order(images)
        sizes = [image.size for image in images]
        order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
        return _in_order(self._caption_in_order(images[order]), order)

    def num_captions(self, images: Any) -> int:
        """Return how many captions each of the images gets; `images`: as `process` takes them."""
        return self.ref.num_captions

    def _caption_in_order(self, images: Any) -> Captions:
        each = self.num_captions(images)
        with self._batches(images) as batches, ThreadPoolExecutor(1) as decoding:
            with self._search_lock:
                parts = [
                    decoding.submit(self.to_captions, tokens, logprobs, each)
                    for values in batches
                    for tokens, logprobs in self._search_or_halve(values)
                ]
                usage, self._usage = self._usage, Usage()
            return replace(_concatenate([part.result() for part in parts]), usage=[usage])

    def count_tokens(self, mask: torch.Tensor) -> None:
        """Count the tokens of a batch, and those of them that are padding: 0 in `mask` [N, T], on the CPU."""
        num_tokens = mask.numel()
        padding = num_tokens - int(mask.sum())
        self._usage = Usage.total([self._usage, Usage(input_tokens=num_tokens, padding_tokens=padding)])

    def _batches(self, images: Any) -> AbstractContextManager[Iterator[Any]]:
        if self.processor is None:
            return self.uploads.batches(images, self.batch_size)
        return processed_batches(images, self.batch_size, self.process)

    def _search_or_halve(self, values: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the results of `search_batch`, for as many parts of a batch as the device's memory requires."""
        if len(values) > self.batch_size:
            return [result for part in _parts(values, self.batch_size) for result in self._search_or_halve(part)]
        try:
            result = self.search_batch(values)
            self._has_room = True
            return [result]
        except torch.OutOfMemoryError:
            if len(values) == 1:
                raise
        # Outside the except clause, because the exception keeps the failed call's tensors alive.
        self.batch_size = len(values) // 2
        self.free_memory()
        return self._search_or_halve(values)

    def _check_room(self) -> None:
        """Raise ModelError where a small image does not fit the device's memory."""
        self.free_memory()
        height, width = self.ref.spec.small_size
        with self._search_lock, suppress(torch.OutOfMemoryError):
            self.try_batch(1, (height, width))
            self._has_room = True
            return
        self.free_memory()
        free, size = self._free_bytes(), f"{width} x {height} pixels"
        raise no_room(self.ref, size, self.device_name, self.weights_bytes, free, len(self.devices))

    def _free_bytes(self) -> int:
        """Return the free memory of the GPUs; 0 for other devices."""
        if self.device.type not in GPUS:
            return 0
        backend = torch.get_device_module(self.device)
        return sum(int(backend.mem_get_info(device)[0]) for device in self.devices)

    def try_batch(self, size: int, image_size: tuple[int, int] | None = None) -> None:
        """Caption `size` images of noise in one batch. Raises torch.OutOfMemoryError.

        `image_size`: height and width; None: those of `PixelSpec.trial_size`.
        """
        shape = size, *(image_size or self.ref.spec.trial_size), 3
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        if self.processor is None:
            self.search_batch(torch.from_numpy(noise).to(self.device))
        else:
            self.search_batch(ProcessedBatch(object_array(list(noise)), self.process))

    def free_memory(self) -> None:
        """Release the device memory that torch caches."""
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def search_batch(self, values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `search` of uint8 pixels [N, height, width, 3] on the device, or of a ProcessedBatch.

        Raises torch.OutOfMemoryError.
        """
        return self.search(self.prepare(values), self._random_numbers(values))

    def _random_numbers(self, values: Any) -> torch.Tensor | None:
        """Return the random numbers of sampled captions, float64 [N, captions, steps]; None where none are sampled."""
        if self.sampling is None:
            return None
        images = values.images if isinstance(values, ProcessedBatch) else values.cpu().numpy()
        ref = self.ref
        length = max(question.max_new_tokens for question in ref.questions)
        return torch.from_numpy(random_numbers(images, ref.seed, self.num_captions(images), length))

    def to_captions(self, tokens: torch.Tensor, logprobs: torch.Tensor, each: int) -> Captions:
        """Return the captions of a result of `search`, which has `each` rows for each image."""
        counts, finished = token_counts(tokens, self._end_ids())
        if self.settings.forced_eos_token_id is not None:  # at the limit, the end token may have been forced
            limit = self.settings.max_new_tokens
            finished = [ended and count < limit for ended, count in zip(finished, counts, strict=True)]
        rows = [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]
        answers = Captions(self.decode(rows), counts, mean_logprobs(logprobs, counts), finished)
        return _by_image(self.judge(answers), each)

    def judge(self, answers: Captions) -> Captions:
        """Return the captions in the model's answers, and why some are none; here the answers as they are."""
        return answers

    def search(self, prepared: Any, numbers: torch.Tensor | None = None, /) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new tokens int64 [N, T] and their log-probabilities float32 [N, T], on the CPU, by `generate`.

        `numbers`: random numbers of sampled captions (see `captioner.models.seeds`), [N, captions, steps]. The result
        then has a row for each caption, those of an image one after the other.
        """
        return self.search_after(len(self.prefix), prepared, numbers)

    def search_after(
        self, num_start: int, prepared: Any, numbers: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `search` where the first `num_start` ids that `generate` returns are not part of the caption."""
        recorder: ScoreRecorder | DrawingProcessor = ScoreRecorder(self.ref.num_beams, len(self._end_ids()))
        if self.sampling is not None and numbers is not None:
            recorder = DrawingProcessor(self.sampling, numbers.flatten(0, 1))
        with quiet():
            # In training with --fsdp transformers would make workers wait for each other, which caption other images.
            output = self.generate(prepared, logits_processor=LogitsProcessorList([recorder]), synced_gpus=False)
        tokens = output.sequences[:, num_start:].cpu()
        return tokens, recorder.logprobs(tokens, getattr(output, "beam_indices", None))

    def normalise(self, values: torch.Tensor) -> torch.Tensor:
        """Return uint8 pixels [N, H, W, 3] normalised, [N, 3, H, W] of the model's dtype, on the same device."""
        return ((values.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std).to(self.dtype)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Return the text of each row of token ids."""
        return [text.strip() for text in decode_all(self.tokenizer, rows)]

    def _end_ids(self) -> list[int]:
        end = self.settings.eos_token_id
        return [] if end is None else [end] if isinstance(end, int) else list(end)

    def start_rows(self, count: int) -> torch.Tensor:
        """Return the start ids once for each image, int64 [count, P]."""
        return torch.tensor([self.prefix], device=self.device).repeat(count, 1)


def _parts(values: Any, size: int) -> Iterator[Any]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _by_image(captions: Captions, each: int) -> Captions:
    """Return the captions of images that have `each` one after the other: the first without an error, and all."""
    if each == 1:
        return captions
    errors = captions.errors or [""] * len(captions.texts)
    images = [range(first, first + each) for first in range(0, len(errors), each)]
    chosen = [next((row for row in rows if not errors[row]), rows[0]) for rows in images]
    samples = [[None if errors[row] else captions.texts[row] for row in rows] for rows in images]
    return replace(_take(captions, chosen), samples=samples)


def _in_order(captions: Captions, order: list[int]) -> Captions:
    """Return captions in the order of the images, whose index is `order` for each caption."""
    return _take(captions, sorted(range(len(order)), key=order.__getitem__))


def _take(captions: Captions, rows: list[int]) -> Captions:
    return Captions(
        [captions.texts[row] for row in rows],
        [captions.num_tokens[row] for row in rows],
        [captions.logprob_mean[row] for row in rows],
        [captions.finished[row] for row in rows],
        [captions.errors[row] for row in rows] if captions.errors else [],
        captions.usage,
        [captions.samples[row] for row in rows] if captions.samples else [],
    )


def _concatenate(parts: list[Captions]) -> Captions:
    return Captions(
        [text for part in parts for text in part.texts],
        [count for part in parts for count in part.num_tokens],
        [mean for part in parts for mean in part.logprob_mean],
        [finished for part in parts for finished in part.finished],
        [error for part in parts for error in part.errors],
        samples=[samples for part in parts for samples in part.samples],
    )
