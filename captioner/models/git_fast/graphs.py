"""A search's step captured in a CUDA graph, where there is a GPU.

A step is a hundred kernels of a few microseconds each; launched one by one, the launches take longer than the kernels.
A graph replays on fixed memory, so the searches it was captured on are kept and used again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from captioner.models.git_fast.beam import BeamSearch
from captioner.models.git_fast.greedy import GreedySearch
from captioner.models.git_fast.network import GitNetwork
from captioner.models.git_fast.task import Search, Task

WARM_UP_STEPS = 3  # as torch's documentation of CUDA graphs asks


class Graph(Protocol):
    """A torch.cuda.CUDAGraph that was captured."""

    def replay(self) -> None: ...


@dataclass
class _Kept:
    """A search that is used again, and its captured step once it was used twice."""

    search: Search
    graph: Graph | None = None


class Stepper:
    """Hands out searches and steps through them: plainly on a CPU, by graphs on a GPU that can capture them."""

    def __init__(self, network: GitNetwork, task: Task) -> None:
        self.network, self.task = network, task
        # Processors look at the text so far, whose length they are given by the host.
        self.graphs = network.device.type == "cuda" and not task.processors
        self._largest = 0
        self._kept: dict[int, _Kept] = {}

    def search(self, images: int) -> Search:
        """Return a search that has not begun. With graphs, the one of this size that was handed out before.

        Only full batches and what halving leaves of them are kept: the last batch of a chunk may be of any size, and
        each kept search holds memory.
        """
        self._largest = max(self._largest, images)
        if not self.graphs or not _is_halved(self._largest, images):
            return self._new_search(images)
        kept = self._kept.get(images)
        if kept is None:
            kept = self._kept[images] = _Kept(self._new_search(images))
        elif kept.graph is None:
            self._capture(kept)
        return kept.search

    def _new_search(self, images: int) -> Search:
        kind: Callable[..., Search] = GreedySearch if self.task.beams == 1 else BeamSearch
        return kind(self.network, self.task, images)

    def step(self, search: Search, index: int) -> None:
        """Let `search` add its token number `index`."""
        kept = self._kept.get(len(search.state.tokens))
        if kept is None or kept.search is not search or kept.graph is None:
            search.step(index)
        else:
            kept.graph.replay()

    def forget(self) -> None:
        """Let go of the kept searches."""
        self._largest = 0
        self._kept.clear()

    def _capture(self, kept: _Kept) -> None:
        """Try to capture a step; on a GPU or a build of torch that cannot, go on without graphs.

        Raises torch.OutOfMemoryError: a smaller batch may do.
        """
        kept.search.begin()
        kept.search.state.position.zero_()
        try:
            kept.graph = capture(self.network.device, lambda: kept.search.step(0))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.graphs = False
            self.forget()


class UnfinishedCount:
    """Counts the unfinished images after each step.

    On a GPU the count is known one step late, so that the host need not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._is_late = device.type == "cuda"
        if self._is_late:
            self._buffers = [(torch.empty((), dtype=torch.long, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
        self._number = 0

    def begin(self) -> None:
        """Forget the steps of an earlier batch."""
        self._number = 0

    def after_step(self, unfinished: torch.Tensor) -> int | None:
        """Return how many of `unfinished`, bool [N], were set after the latest step whose count is known, if any."""
        if not self._is_late:
            return int(unfinished.sum())
        count, event = self._buffers[self._number % 2]
        count.copy_(unfinished.sum(), non_blocking=True)
        event.record()
        self._number += 1
        if self._number == 1:
            return None
        count, event = self._buffers[self._number % 2]
        event.synchronize()
        return int(count)


def capture(device: torch.device, step: Callable[[], None]) -> Graph:
    """Return a CUDA graph of `step()`, which is called a few times first. Raises RuntimeError."""
    using = torch.cuda.current_stream(device)
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(using)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                step()
        using.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a worker may use the device meanwhile; only this one's calls are watched.
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        torch.cuda.set_stream(using)  # torch leaves the stream of a capture that failed in use
        torch.cuda.synchronize(device)
        raise
    return graph


def _is_halved(largest: int, images: int) -> bool:
    """Return whether halving `largest`, rounding down, comes to `images`."""
    while largest > images:
        largest //= 2
    return largest == images
