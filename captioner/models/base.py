"""What the families of transformers models have in common: device batches, normalising, search settings, scores.

Imports torch and transformers: seconds. `captioner.models.load` is the way in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessorList

from captioner.data import Captions, Pixels, object_array
from captioner.errors import ModelError
from captioner.models import native_batches
from captioner.models.logprobs import ScoreRecorder, mean_logprobs, token_counts
from captioner.models.native_batches import ProcessedBatch
from captioner.models.pretrained import decode_all, open_model, open_tokenizer, quiet
from captioner.models.processors import open_image_processor
from captioner.models.ref import ModelRef
from captioner.models.uploads import Uploads

_USUAL_SIDE = 1024
# The settings of a checkpoint's generation_config.json that shape greedy and beam search. The others belong to
# sampling, or to what ModelRef decides (beams, length).
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
    """A captioner over `generate`. Each family says how its decoder starts and how its `generate` is called."""

    attention: ClassVar[str | None] = None  # None: what transformers chooses
    engine: str = "generic"  # "fast" where the family's own search is used, not transformers' `generate`

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        self.ref, self.device, self.batch_size = ref, device, batch_size
        self.dtype: torch.dtype = getattr(torch, ref.dtype)
        self.uploads = Uploads(device)
        self._turn = threading.Lock()  # one call's searches run after another's
        self.model = open_model(ref.path, self.dtype, device, self.attention)
        self.tokenizer = open_tokenizer(ref.path)
        self.prefix = self.start_ids()
        self._check_length()
        self.settings = self.generator().generation_config = self.search_settings()
        self.mean = torch.tensor(ref.spec.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(ref.spec.std, device=device).view(1, 3, 1, 1)
        self.processor: Any = self.open_own_processor() if ref.spec.variable_size else None

    def start_ids(self) -> list[int]:
        """The token ids every caption starts from: start token and prompt. They are no part of the caption."""
        raise NotImplementedError

    def open_own_processor(self) -> Any:
        """What `process` makes pictures of own sizes with."""
        return open_image_processor(self.ref.path)

    def process(self, pictures: Pixels) -> Any:
        """What the model's own processor makes of pictures of own sizes, on the CPU."""
        return self.processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt").pixel_values

    def prepare(self, values: Any) -> Any:
        """What `search` and `generate` take: of most families normalised pixels [N, 3, H, W] on the device."""
        return self.normalise(values) if self.processor is None else values.result().to(self.device, self.dtype)

    def generate(self, prepared: Any, /, **options: Any) -> Any:
        """Call the model's `generate`."""
        raise NotImplementedError

    def generator(self) -> Any:
        """The network whose `generate` runs, and whose generation settings hold."""
        return self.model

    def end_and_padding(self) -> dict[str, Any]:
        """Generation settings that the family knows better than the checkpoint's file."""
        return {}

    def prompt_ids(self) -> list[int]:
        return self.tokenizer(self.ref.prompt, add_special_tokens=False).input_ids if self.ref.prompt else []

    def _check_length(self) -> None:
        ref, start = self.ref, len(self.prefix)
        if ref.max_positions is not None and start + ref.max_new_tokens > ref.max_positions:
            raise ModelError(
                f"--prompt of {start - 1} tokens and --max-new-tokens {ref.max_new_tokens}: {ref.path} has"
                f" {ref.max_positions} text positions; shorten one of them"
            )

    def search_settings(self) -> GenerationConfig:
        checkpoint = self.generator().generation_config
        kept = {name: getattr(checkpoint, name, None) for name in KEPT_GENERATION_SETTINGS} | self.end_and_padding()
        limit = self.ref.max_new_tokens
        # A longest caption shorter than the checkpoint's shortest would be an error: the person's limit wins.
        kept["min_length"] = min(kept["min_length"] or 0, len(self.prefix) + limit)
        kept["min_new_tokens"] = min(kept["min_new_tokens"] or 0, limit) or None
        if self.ref.num_beams == 1:  # these two belong to beam search; transformers warns of them elsewhere
            kept |= {"early_stopping": None, "length_penalty": None}
        return GenerationConfig(
            **{name: value for name, value in kept.items() if value is not None},
            do_sample=False,
            num_beams=self.ref.num_beams,
            max_new_tokens=limit,
            return_dict_in_generate=True,
        )

    def caption(self, pixels: Pixels) -> Captions:
        """Caption images, `batch_size` at a time.

        The next batch is on its way to the device, and the batch before becomes text, while one is searched. Two
        threads may call this at once: then the same holds from one call to the next. Where the device's memory is not
        enough, the batch is halved and tried again, and stays at what fits.
        """
        with self._batches(pixels) as batches, ThreadPoolExecutor(1) as describing:
            with self._turn:
                parts = [
                    describing.submit(self.describe, tokens, logprobs)
                    for values in batches
                    for tokens, logprobs in self._as_fits(values)
                ]
            return _joined([part.result() for part in parts])

    def _batches(self, pixels: Pixels) -> AbstractContextManager[Iterator[Any]]:
        if self.processor is None:
            return self.uploads.batches(pixels, self.batch_size)
        return native_batches.batches(pixels, self.batch_size, self.process)

    def _as_fits(self, values: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`search_batch`, in as many pieces as the device's memory asks for."""
        if len(values) > self.batch_size:
            return [part for piece in _pieces(values, self.batch_size) for part in self._as_fits(piece)]
        try:
            return [self.search_batch(values)]
        except torch.OutOfMemoryError:
            if len(values) == 1:
                raise
        # Outside of the except clause, which keeps alive what the failed call had allocated.
        self.batch_size = len(values) // 2
        self.free_memory()
        return self._as_fits(values)

    def try_batch(self, size: int) -> None:
        """Caption `size` pictures of noise in one piece. Raises torch.OutOfMemoryError."""
        own = self.processor is not None
        # Pictures of own sizes may be very large; few are.
        height, width = (
            min(side, _USUAL_SIDE if own else side) for side in (self.ref.spec.height, self.ref.spec.width)
        )
        noise = np.random.default_rng(0).integers(0, 256, (size, height, width, 3), dtype=np.uint8)
        batch = (
            ProcessedBatch(object_array(list(noise)), self.process) if own else torch.from_numpy(noise).to(self.device)
        )
        self.search_batch(batch)

    @property
    def device_name(self) -> str:
        """The kind of device ("cpu", "mps"), or a GPU's name and memory."""
        if self.device.type not in ("cuda", "xpu"):
            return self.device.type
        card = torch.get_device_module(self.device).get_device_properties(self.device)
        return f"{card.name}, {card.total_memory >> 30} GiB"

    def free_memory(self) -> None:
        """Give back what the device holds for later use."""
        if self.device.type != "cpu":
            torch.accelerator.empty_cache()

    @torch.inference_mode()
    def search_batch(self, values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Search captions for uint8 pixels [N, height, width, 3] on the device, or an ProcessedBatch, in one piece.

        Raises torch.OutOfMemoryError.
        """
        return self.search(self.prepare(values))

    def describe(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> Captions:
        """What `search` returned, in words."""
        counts, finished = token_counts(tokens, self._end_ids())
        rows = [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]
        return Captions(self.decode(rows), counts, mean_logprobs(logprobs, counts), finished)

    def search(self, prepared: Any, /) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens int64 [N, T] and their log-probabilities float32 [N, T], on the CPU, by `generate`."""
        return self.search_from(len(self.prefix), prepared)

    def search_from(self, given: int, prepared: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """`search`, where the first `given` ids of what `generate` returns are no new tokens."""
        recorder = ScoreRecorder(self.ref.num_beams, len(self._end_ids()))
        with quiet():
            output = self.generate(prepared, logits_processor=LogitsProcessorList([recorder]))
        tokens = output.sequences[:, given:].cpu()
        return tokens, recorder.logprobs(tokens, getattr(output, "beam_indices", None))

    def normalise(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W, 3] -> normalised [N, 3, H, W] of the model's dtype, both on its device."""
        return ((values.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std).to(self.dtype)

    def decode(self, rows: list[list[int]]) -> list[str]:
        """The text of each row of token ids."""
        return [text.strip() for text in decode_all(self.tokenizer, rows)]

    def _end_ids(self) -> list[int]:
        end = self.settings.eos_token_id
        return [] if end is None else [end] if isinstance(end, int) else list(end)

    def start_rows(self, count: int) -> torch.Tensor:
        """The start ids once for each picture, int64 [count, P]."""
        return torch.tensor([self.prefix], device=self.device).repeat(count, 1)


def _pieces(values: Any, size: int) -> Iterator[Any]:
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _joined(parts: list[Captions]) -> Captions:
    return Captions(
        [text for part in parts for text in part.texts],
        [number for part in parts for number in part.num_tokens],
        [mean for part in parts for mean in part.logprob_mean],
        [done for part in parts for done in part.finished],
    )
