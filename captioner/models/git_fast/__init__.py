"""GIT without the work that `generate` repeats: the same token ids from a third to two thirds of the time.

network.py          images -> keys and values of their image tokens, once; newest tokens -> logits
triton_network.py   the same on a CUDA GPU, with kernels of its own (triton_kernels.py) between the matrix products
graphs.py           a search's step as a CUDA graph, where there is a GPU
search.py           the whole search for a batch; which settings it can follow
greedy.py, beam.py  one step of greedy search, and of beam search as transformers scores it
task.py             what a search is given and what it returns
"""

from __future__ import annotations

from captioner.models.git_fast.network import GitNetwork
from captioner.models.git_fast.search import FastSearch, missing_settings, open_network

__all__ = ["FastSearch", "GitNetwork", "missing_settings", "open_network"]
