"""GIT without the work that `generate` repeats: the same token ids in a third to two thirds of the time.

network.py          keys and values of image tokens, computed once; logits of the newest tokens
triton_network.py   the same on a CUDA GPU, with fused kernels (triton_kernels.py) between the matrix products
graphs.py           a step of a search as a CUDA graph
search.py           the search for a batch; which generation settings it supports
greedy.py, beam.py  a step of greedy search, and of beam search with the scores of transformers
task.py             the settings and the result of a search
"""

from __future__ import annotations

from captioner.models.git_fast.network import GitNetwork
from captioner.models.git_fast.search import FastSearch, open_network, unsupported_settings

__all__ = ["FastSearch", "GitNetwork", "open_network", "unsupported_settings"]
