"""The captioner of GIT models: its search for a batch of images, and the generation settings that this supports."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)

from captioner.errors import ModelError
from captioner.models.base import TransformersCaptioner
from captioner.models.git.graphs import Stepper, UnfinishedCount
from captioner.models.git.network import GitNetwork
from captioner.models.git.searches import SampledSearch, Search, SearchResult, Task
from captioner.models.logits import Sampling
from captioner.models.ref import ModelRef

# Settings of a GenerationConfig that these searches support. Any other that is set needs `generate`.
SUPPORTED_SETTINGS = frozenset(
    (
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("num_beams", "early_stopping", "length_penalty"),
        *("max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"),
        *("do_sample", "top_k", "num_return_sequences"),  # of Task.sampling, which draws by itself
        *("return_dict_in_generate", "transformers_version"),
    )
)
# Values that have no effect.
_NEUTRAL = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}


class GitCaptioner(TransformersCaptioner):
    """Captions by `FastSearch`, or by `generate` where the checkpoint's settings need it (`engine`)."""

    attention = "eager"  # transformers has no other for GIT

    def __init__(self, ref: ModelRef, device: torch.device, batch_size: int) -> None:
        super().__init__(ref, device, batch_size)
        self._fast: FastSearch | None = None
        if not unsupported_settings(self.settings):
            self._fast = FastSearch(open_network(self.model), self.settings, self.prefix, self.sampling)
            self.engine = "fast"

    def start_ids(self) -> list[int]:
        """Return start token and prompt, without an end token, as in transformers' GIT examples."""
        for config in (self.model.generation_config, self.model.config):
            if config.bos_token_id is not None:
                return [config.bos_token_id, *self.prompt_ids()]
        raise ModelError(f"{self.ref.path}: config.json has no bos_token_id; set it to the start token's id")

    def search(
        self, pixel_values: torch.Tensor, numbers: torch.Tensor | None = None, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._fast is None:
            return super().search(pixel_values, numbers)
        result = self._fast(pixel_values, numbers)
        return result.tokens.flatten(0, -2).cpu(), result.logprobs.flatten(0, -2).cpu()

    def free_memory(self) -> None:
        if self._fast is not None:
            self._fast.stepper.clear()
        super().free_memory()

    def generate(self, pixel_values: torch.Tensor, /, **options: Any) -> Any:
        return self.model.generate(pixel_values=pixel_values, input_ids=self.start_rows(len(pixel_values)), **options)


def unsupported_settings(settings: GenerationConfig) -> list[str]:
    """Return the names of the settings that only `generate` supports."""
    return [
        name
        for name, value in settings.to_diff_dict().items()
        if name not in SUPPORTED_SETTINGS and value is not False and _NEUTRAL.get(name) != value
    ]


class FastSearch:
    """Searches captions with one GIT model and one set of generation settings."""

    def __init__(
        self, network: GitNetwork, settings: GenerationConfig, prefix: list[int], sampling: Sampling | None = None
    ) -> None:
        """Prepare a search. `prefix`: the ids that every caption starts with. `sampling`: None: the most probable."""
        self.network = network
        self.task = replace(_task(settings, prefix, self.network.device), sampling=sampling)
        self.stepper = Stepper(self.network, self.task)
        self._count = UnfinishedCount(self.network.device)

    def __call__(self, pixel_values: torch.Tensor, numbers: torch.Tensor | None = None) -> SearchResult:
        """Return the captions of normalised pixels [N, 3, H, W].

        `numbers`: random numbers of sampled captions, [N, captions, limit].
        """
        search = self.stepper.search(len(pixel_values))
        self.network.encode(pixel_values, search.state)
        if isinstance(search, SampledSearch):
            assert numbers is not None
            search.numbers.copy_(numbers)
        self._start(search)
        texts, logprobs = (values.clone() for values in search.result())
        rows = torch.arange(len(pixel_values), device=texts.device)  # the image of each row of the search
        self._count.reset()
        for index in range(self.task.limit):
            self.stepper.step(search, index)
            count = self._count.after_step(search.unfinished)
            if count == 0:
                break
            if index + 1 < self.task.limit and count is not None and len(rows) > 1 and count <= len(rows) // 2:
                texts[rows], logprobs[rows] = search.result()
                search, indices = self._halve(search)
                rows = rows[indices]
        texts[rows], logprobs[rows] = search.result()
        return SearchResult(texts, logprobs)

    def _start(self, search: Search) -> None:
        """Begin the search with all tokens of the prefix but the last, which is the input of the first step."""
        search.begin()
        state = search.state
        for position, token in enumerate(self.task.prefix):
            state.tokens.fill_(token)
            state.position.fill_(position)
            if position + 1 < len(self.task.prefix):
                self.network.step(state)

    def _halve(self, search: Search) -> tuple[Search, torch.Tensor]:
        """Return a search for half of the images, with all unfinished ones, and their indices, int64 [N // 2].

        Half of them and not only the unfinished ones, so that there are few sizes, few graphs and few copies.
        """
        half = len(search.state.tokens) // 2
        indices = torch.argsort(~search.unfinished, stable=True)[:half]
        smaller = self.stepper.search(half)
        search.copy_to(indices, smaller)
        return smaller, indices


def open_network(model: Any) -> GitNetwork:
    """Return the fastest network for the device of a GitForCausalLM in evaluation mode.

    It may copy weights, which must not change afterwards.
    """
    device: torch.device = model.device
    if device.type == "cuda" and has_triton():
        from captioner.models.git.triton_network import TritonGitNetwork, can_run

        network = TritonGitNetwork(model)
        if can_run(network):
            return network
    return GitNetwork(model)


def has_triton() -> bool:
    """Return whether Triton is installed; say how to install it where it is not."""
    if find_spec("triton") is not None:
        return True
    logging.getLogger(__name__).warning(
        "triton is not installed: GIT captions more slowly without its GPU kernels; pip install 'captioner[cuda]'"
    )
    return False


def _task(settings: GenerationConfig, prefix: list[int], device: torch.device) -> Task:
    end = settings.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    return Task(
        prefix=tuple(prefix),
        limit=settings.max_new_tokens,
        ends=torch.tensor(ends, dtype=torch.long, device=device),
        padding=settings.pad_token_id or 0,
        processors=_processors(settings, len(prefix), ends, device),
        beams=settings.num_beams or 1,
        early_stopping=settings.early_stopping or False,
        length_penalty=1.0 if settings.length_penalty is None else settings.length_penalty,
    )


def _processors(settings: GenerationConfig, start: int, ends: list[int], device: torch.device) -> LogitsProcessorList:
    """Return the logits processors in the order in which `generate` applies them."""
    processors = LogitsProcessorList()
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if settings.min_length and ends:
        processors.append(MinLengthLogitsProcessor(settings.min_length, ends, device=str(device)))
    if settings.min_new_tokens and ends:
        processors.append(MinNewTokensLengthLogitsProcessor(start, settings.min_new_tokens, ends, device=str(device)))
    return processors
