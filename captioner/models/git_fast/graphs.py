"""The step for the newest tokens, captured in a CUDA graph where there is a GPU.

A step is some 150 kernels of a few microseconds each; launched one by one, the launches take longer than the kernels.
A graph replays on fixed memory, so the states it was captured on are kept and used again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from captioner.models.git_fast.network import GitNetwork, State

WARM_UP_STEPS = 3  # as torch's documentation of CUDA graphs asks


class Graph(Protocol):
    """A torch.cuda.CUDAGraph that was captured."""

    def replay(self) -> None: ...


@dataclass
class _Kept:
    """A state that comes again, and its captured step once it has come twice."""

    state: State
    graph: Graph | None = None
    logits: torch.Tensor | None = None  # what a replay writes


class Stepper:
    """Hands out states and steps through them: plainly on a CPU, by graphs on a GPU that can capture them."""

    def __init__(self, network: GitNetwork) -> None:
        self.network = network
        self.graphs = network.device.type == "cuda"
        self._largest = 0
        self._kept: dict[tuple[int, int, int], _Kept] = {}

    def state(self, pictures: int, beams: int, length: int) -> State:
        """An empty state. With graphs, the one of these sizes that was handed out before.

        Only full batches and what halving leaves of them are kept: the last batch of a chunk may be of any size, and
        each kept state holds memory.
        """
        self._largest = max(self._largest, pictures)
        if not self.graphs or not _is_halved(self._largest, pictures):
            return self.network.new_state(pictures, beams, length)
        key = pictures, beams, length
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(self.network.new_state(*key))
        elif kept.graph is None:
            self._capture(kept)
        return kept.state

    def step(self, state: State) -> torch.Tensor:
        """`GitNetwork.step`. With graphs, the result is overwritten by the next step of a state of these sizes."""
        kept = next((kept for kept in self._kept.values() if kept.state is state), None)
        if kept is None or kept.graph is None or kept.logits is None:
            return self.network.step(state)
        kept.graph.replay()
        return kept.logits

    def forget(self) -> None:
        """Let go of the kept states."""
        self._largest = 0
        self._kept.clear()

    def _capture(self, kept: _Kept) -> None:
        """Try to; a GPU or a build of torch that cannot does without graphs from then on.

        Raises torch.OutOfMemoryError: a smaller batch may do.
        """
        try:
            kept.graph, kept.logits = capture_step(self.network, kept.state)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.graphs = False
            self.forget()


def capture_step(network: GitNetwork, state: State) -> tuple[Graph, torch.Tensor]:
    """A graph of `network.step(state)` and the logits it writes. Steps through `state` meanwhile."""
    using = torch.cuda.current_stream(network.device)
    try:
        side = torch.cuda.Stream(network.device)
        side.wait_stream(using)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                network.step(state)
        using.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of a worker may use the device meanwhile; only this one's calls are watched.
        with torch.cuda.device(network.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = network.step(state)
    except RuntimeError:
        torch.cuda.set_stream(using)  # torch leaves the stream of a capture that failed in use
        torch.cuda.synchronize(network.device)
        raise
    return graph, logits


def _is_halved(largest: int, pictures: int) -> bool:
    """Whether halving `largest`, rounding down, comes to `pictures`."""
    while largest > pictures:
        largest //= 2
    return largest == pictures
