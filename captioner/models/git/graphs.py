"""Steps of a search captured as CUDA graphs.

A step is a hundred kernels of a few microseconds each; launched one by one, the launches take longer than the kernels.
A graph replays on fixed memory, so the searches whose steps were captured are cached and reused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from captioner.console.phases import phase
from captioner.models.git.beam import BeamSearch
from captioner.models.git.network import GitNetwork
from captioner.models.git.searches import GreedySearch, SampledSearch, Search, Task

WARM_UP_STEPS = 3  # as recommended in torch's documentation of CUDA graphs


class Graph(Protocol):
    """A captured torch.cuda.CUDAGraph."""

    def replay(self) -> None: ...


@dataclass
class _CachedSearch:
    """A search to be reused, with its captured step from its second use on."""

    search: Search
    graph: Graph | None = None


class Stepper:
    """Creates searches and runs their steps, on a CUDA GPU as graphs where they can be captured."""

    def __init__(self, network: GitNetwork, task: Task) -> None:
        self.network, self.task = network, task
        # Logits processors depend on the length of the text, which only the host knows.
        self.graphs = network.device.type == "cuda" and not task.processors
        self._largest = 0
        self._cache: dict[int, _CachedSearch] = {}

    def search(self, images: int) -> Search:
        """Return a search to begin; with graphs, the cached one for this number of images.

        Only those for full batches and their halves are cached, because the last batch of a chunk can have any size and
        each cached search holds device memory.
        """
        self._largest = max(self._largest, images)
        if not self.graphs or not _is_halved(self._largest, images):
            return self._new_search(images)
        cached = self._cache.get(images)
        if cached is None:
            cached = self._cache[images] = _CachedSearch(self._new_search(images))
        elif cached.graph is None:
            self._capture(cached)
        return cached.search

    def _new_search(self, images: int) -> Search:
        kind: Callable[..., Search] = GreedySearch if self.task.beams == 1 else BeamSearch
        if self.task.sampling is not None:
            kind = SampledSearch
        return kind(self.network, self.task, images)

    def step(self, search: Search, index: int) -> None:
        """Add the token number `index` to the captions of `search`."""
        cached = self._cache.get(len(search.state.tokens))
        if cached is None or cached.search is not search or cached.graph is None:
            search.step(index)
        else:
            cached.graph.replay()

    def clear(self) -> None:
        """Remove all cached searches."""
        self._largest = 0
        self._cache.clear()

    def _capture(self, cached: _CachedSearch) -> None:
        """Capture a step; where the GPU or the build of torch cannot, continue without graphs.

        Raises torch.OutOfMemoryError, since a smaller batch may fit.
        """
        search, first = cached.search, len(self.task.prefix) - 1

        def begin() -> None:
            search.begin()
            search.state.position.fill_(first)

        try:
            with phase("capturing graphs"):
                cached.graph = capture(self.network.device, begin, lambda: search.step(0))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.graphs = False
            self.clear()


class UnfinishedCount:
    """Counts the unfinished images after each step.

    On a GPU the count is that of the step before, so that the host does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._is_delayed = device.type == "cuda"
        if self._is_delayed:
            self._buffers = [(torch.empty((), dtype=torch.long, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
        self._number = 0

    def reset(self) -> None:
        """Start with the first step of a new batch."""
        self._number = 0

    def after_step(self, unfinished: torch.Tensor) -> int | None:
        """Return how many of `unfinished`, bool [N], are set, or were set a step before; None where not known yet."""
        if not self._is_delayed:
            return int(unfinished.sum())
        count, event = self._buffers[self._number % 2]
        count.copy_(unfinished.sum(), non_blocking=True)
        event.record(torch.cuda.current_stream(unfinished.device))
        self._number += 1
        if self._number == 1:
            return None
        count, event = self._buffers[self._number % 2]
        event.synchronize()
        return int(count)


def capture(device: torch.device, begin: Callable[[], None], step: Callable[[], None]) -> Graph:
    """Return a CUDA graph of `step()`, after calling it a few times, `begin()` before each. Raises RuntimeError.

    Without `begin()` the steps would go on to positions that a short text does not have: an error that ends CUDA.
    """
    current = torch.cuda.current_stream(device)
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                begin()
                step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; only this thread's calls are captured.
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        torch.cuda.set_stream(current)  # after a failed capture torch leaves its stream current
        torch.cuda.synchronize(device)
        raise
    return graph


def _is_halved(largest: int, images: int) -> bool:
    """Return whether halving `largest`, rounding down, comes to `images`."""
    while largest > images:
        largest //= 2
    return largest == images
