"""What the families of transformers models have in common: opening, device batches, normalising, scores.

Imports torch and transformers: seconds. `captioner.models.load` is the way in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils import logging as transformers_logging

from captioner.data import Captions
from captioner.errors import ModelError
from captioner.models.ref import ModelRef

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

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        self.ref, self.device, self.batch_size = ref, device, batch_size
        self.dtype: torch.dtype = getattr(torch, ref.dtype)
        self.model = open_model(ref.path, self.dtype, device, self.attention)
        self.tokenizer = AutoTokenizer.from_pretrained(ref.path, trust_remote_code=False, local_files_only=True)
        self.prefix = self.start_ids()
        self.settings = self.generator().generation_config = self.search_settings()
        self.mean = torch.tensor(ref.spec.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(ref.spec.std, device=device).view(1, 3, 1, 1)

    def start_ids(self) -> list[int]:
        """The token ids every caption starts from: start token and prompt. They are no part of the caption."""
        raise NotImplementedError

    def generate(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        """Call the model's `generate` on normalised pixels [N, 3, H, W]."""
        raise NotImplementedError

    def generator(self) -> Any:
        """The network whose `generate` runs, and whose generation settings hold."""
        return self.model

    def end_and_padding(self) -> dict[str, Any]:
        """Generation settings that the family knows better than the checkpoint's file."""
        return {}

    def prompt_ids(self) -> list[int]:
        return self.tokenizer(self.ref.prompt, add_special_tokens=False).input_ids if self.ref.prompt else []

    def search_settings(self) -> GenerationConfig:
        checkpoint = self.generator().generation_config
        kept = {name: getattr(checkpoint, name, None) for name in KEPT_GENERATION_SETTINGS} | self.end_and_padding()
        limit = self.ref.max_new_tokens
        # A longest caption shorter than the checkpoint's shortest would be an error: the person's limit wins.
        kept["min_length"] = min(kept["min_length"] or 0, len(self.prefix) + limit)
        kept["min_new_tokens"] = min(kept["min_new_tokens"] or 0, limit) or None
        if self.ref.num_beams == 1:
            kept |= {"early_stopping": None, "length_penalty": None}
        return GenerationConfig(
            **{name: value for name, value in kept.items() if value is not None},
            do_sample=False,
            num_beams=self.ref.num_beams,
            max_new_tokens=limit,
            return_dict_in_generate=True,
        )

    def caption(self, pixels: npt.NDArray[np.uint8]) -> Captions:
        """Caption uint8 pixels [N, height, width, 3], `batch_size` at a time."""
        parts = [self._caption_batch(pixels[i : i + self.batch_size]) for i in range(0, len(pixels), self.batch_size)]
        return Captions(
            [text for part in parts for text in part.texts],
            [number for part in parts for number in part.num_tokens],
            [mean for part in parts for mean in part.logprob_mean],
            [done for part in parts for done in part.finished],
        )

    @torch.inference_mode()
    def _caption_batch(self, pixels: npt.NDArray[np.uint8]) -> Captions:
        recorder = ScoreRecorder(self.ref.num_beams, len(self._end_ids()))
        with quiet():
            output = self.generate(self.normalise(pixels), logits_processor=LogitsProcessorList([recorder]))
        tokens = output.sequences[:, len(self.prefix) :].cpu()
        logprobs = recorder.logprobs(tokens, getattr(output, "beam_indices", None))
        counts, finished = token_counts(tokens, self._end_ids())
        rows = list(zip(tokens, logprobs, counts, strict=True))
        return Captions(
            [self.decode(row[:count].tolist()) for row, _, count in rows],
            counts,
            [row[:count].mean().item() if count else math.nan for _, row, count in rows],
            finished,
        )

    def normalise(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        """uint8 [N, H, W, 3] on the host -> normalised [N, 3, H, W] of the model's dtype on its device."""
        # A copy, because Arrow's memory is read-only and torch warns of that.
        values = torch.from_numpy(np.array(pixels)).to(self.device, non_blocking=True)
        return ((values.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std).to(self.dtype)

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).strip()

    def _end_ids(self) -> list[int]:
        end = self.settings.eos_token_id
        return [] if end is None else [end] if isinstance(end, int) else list(end)

    def start_rows(self, count: int) -> torch.Tensor:
        """The start ids once for each picture, int64 [count, P]."""
        return torch.tensor([self.prefix], device=self.device).repeat(count, 1)


class ScoreRecorder(LogitsProcessor):
    """Keeps the log-probabilities that the search can still choose from, rather than [steps, N, vocabulary] scores.

    Beam search takes its `max(2, 1 + ends) * beams` best continuations over all beams of a picture, so each of them
    is among as many best of its own beam; greedy search takes the single best.
    """

    def __init__(self, num_beams: int, num_ends: int) -> None:
        self.beams = num_beams > 1
        self.kept = max(2, 1 + num_ends) * num_beams if self.beams else 1
        self.values: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Beam search hands over log-probabilities, greedy search logits.
        logprobs = scores if self.beams else scores.float().log_softmax(-1)
        values, ids = logprobs.topk(min(self.kept, scores.shape[-1]))
        self.values.append(values)
        self.ids.append(ids)
        return scores

    def logprobs(self, tokens: torch.Tensor, beam_indices: torch.Tensor | None) -> torch.Tensor:
        """Log-probability of each generated token, float32 [N, T] on the CPU, for tokens [N, T].

        `beam_indices` [N, T]: the row of the search each token came from; negative after the end of a caption.
        """
        steps = tokens.shape[1]
        values, ids = torch.stack(self.values[:steps]).cpu(), torch.stack(self.ids[:steps]).cpu()
        if beam_indices is None:
            return values[:, :, 0].T
        rows = beam_indices[:, :steps].cpu().clamp(min=0).T.long()  # [T, N]
        step = torch.arange(steps)[:, None]
        values, found = values[step, rows], ids[step, rows] == tokens.T[:, :, None]
        # A token that is not among the kept ones ties with the last of them, else it would have lost to it.
        return torch.where(found.any(-1), (values * found).sum(-1), values[..., -1]).T


def token_counts(tokens: torch.Tensor, end_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    """For generated tokens [N, T]: how many each caption has, its end token included, and whether it has one."""
    ends = torch.isin(tokens, torch.tensor(list(end_ids), dtype=tokens.dtype))
    finished = ends.any(1)
    first = ends.int().argmax(1) + 1 if tokens.shape[1] else torch.zeros(len(tokens), dtype=torch.long)
    return torch.where(finished, first, tokens.shape[1]).tolist(), finished.tolist()


def open_model(path: str, dtype: torch.dtype, device: torch.device | str, attention: str | None = None) -> Any:
    """The network, in evaluation mode; on device "meta" without reading the weights.

    Raises ModelError naming tensors that are missing, unexpected or of a wrong shape.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if str(device) == "meta":
        options["device_map"] = "meta"
    try:
        with quiet():
            model, info = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be loaded: {' '.join(str(error).split())}") from None
    _check_loading_info(path, info)
    return model.to(device).eval()


def _check_loading_info(path: str, info: dict[str, Any]) -> None:
    mismatched = [f"{name} is {list(got)}, not {list(wanted)}" for name, got, wanted in info["mismatched_keys"]]
    faults = (("missing", info["missing_keys"]), ("unexpected", info["unexpected_keys"]), ("misshapen", mismatched))
    found = [f"{len(names)} {kind}: {_few(sorted(names))}" for kind, names in faults if names]
    if found:
        raise ModelError(f"{path}: tensors do not fit config.json: {'; '.join(found)}; save the model again")


def _few(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bar and advice."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
