"""The step for the newest tokens, captured in a CUDA graph where there is a GPU.

A step is some 150 kernels of a few microseconds each; launched one by one, the launches take longer than the kernels.
A graph replays on fixed memory, so the states it was captured on are kept and used again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from captioner.models.git_fast.network import GitNetwork, State

WARM_UP_STEPS = 3  # as torch's documentation of CUDA graphs asks


@dataclass
class _Kept:
    """A state that comes again, and its captured step once it has come twice."""

    state: State
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None


class Stepper:
    """Hands out states and steps through them: plainly on a CPU, by graphs on a GPU that can capture them."""

    def __init__(self, network: GitNetwork) -> None:
        self.network = network
        self.graphs = network.device.type == "cuda"
        self._kept: dict[tuple[int, int, int], _Kept] = {}

    def state(self, pictures: int, beams: int, length: int) -> State:
        """An empty state. With graphs, the one of these sizes that was handed out before."""
        if not self.graphs:
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
        self._kept.clear()

    def _capture(self, kept: _Kept) -> None:
        """Try to; a GPU or a build of torch that cannot does without graphs from then on."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    self.network.step(kept.state)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept.logits = self.network.step(kept.state)
            kept.graph = graph
        except RuntimeError:
            torch.cuda.synchronize()
            self.graphs = False
            self.forget()
