"""What a search is given and gives, and the settings it can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)

from captioner.models.git_fast.beam import beam_search
from captioner.models.git_fast.found import Found, Task
from captioner.models.git_fast.graphs import Stepper
from captioner.models.git_fast.greedy import greedy_search
from captioner.models.git_fast.network import GitNetwork

# Settings of a GenerationConfig that these searches follow. Any other that is set needs `generate`.
KNOWN_SETTINGS = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("num_beams", "early_stopping", "length_penalty"),
        *("max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"),
        *("do_sample", "return_dict_in_generate", "transformers_version"),
    )
)
# Values that change nothing.
_NEUTRAL = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}


def missing_settings(settings: GenerationConfig) -> list[str]:
    """Names of the settings that only `generate` can follow."""
    names = [
        name
        for name, value in settings.to_diff_dict().items()
        if name not in KNOWN_SETTINGS and value is not False and _NEUTRAL.get(name) != value
    ]
    return names + (["do_sample"] if settings.do_sample else [])


@dataclass(frozen=True)
class FastSearch:
    """Captions of pictures by one GIT model and one set of search settings, those of `generate`."""

    stepper: Stepper
    task: Task

    @classmethod
    def over(cls, model: object, settings: GenerationConfig, prefix: list[int]) -> FastSearch:
        """`model`: a GitForCausalLM in evaluation mode. `prefix`: the ids every caption starts from."""
        network = GitNetwork(model)
        return cls(Stepper(network), _task(settings, prefix, network.device))

    def __call__(self, pixel_values: torch.Tensor) -> Found:
        """Captions of normalised pixels [N, 3, H, W]."""
        state = self.stepper.state(len(pixel_values), 1, len(self.task.prefix) + self.task.limit)
        state.position.zero_()
        self.stepper.network.encode(pixel_values, state)
        search = greedy_search if self.task.beams == 1 else beam_search
        return search(self.stepper, self.task, state)


def _task(settings: GenerationConfig, prefix: list[int], device: torch.device) -> Task:
    end = settings.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return Task(
        prefix=torch.tensor(prefix, device=device),
        limit=settings.max_new_tokens,
        ends=torch.tensor(ends, dtype=torch.long, device=device),
        padding=settings.pad_token_id or 0,
        processors=_processors(settings, len(prefix), ends, device),
        beams=settings.num_beams or 1,
        early_stopping=settings.early_stopping or False,
        length_penalty=1.0 if settings.length_penalty is None else settings.length_penalty,
    )


def _processors(settings: GenerationConfig, start: int, ends: list[int], device: torch.device) -> LogitsProcessorList:
    """In the order `generate` applies them."""
    processors = LogitsProcessorList()
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.min_length and ends:
        processors.append(MinLengthLogitsProcessor(settings.min_length, ends, device=str(device)))
    if settings.min_new_tokens and ends:
        processors.append(MinNewTokensLengthLogitsProcessor(start, settings.min_new_tokens, ends, device=str(device)))
    return processors
