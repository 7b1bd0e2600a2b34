"""GIT (microsoft/git-*, and the starter): a decoder that reads image tokens and text in one sequence.

Captioned without the work that `generate` repeats: the same token ids in a third to two thirds of the time.

captioner.py        the captioner
network.py          keys and values of image tokens, computed once; logits of the newest tokens
triton_network.py   the same on a CUDA GPU, with fused kernels (triton_kernels.py) between the matrix products
graphs.py           a step of a search as a CUDA graph
search.py           the search for a batch; which generation settings it supports
greedy.py, beam.py  a step of greedy search, and of beam search with the scores of transformers
task.py             the settings and the result of a search
"""

from __future__ import annotations

from captioner.models.git.captioner import GitCaptioner
from captioner.models.git.network import GitNetwork
from captioner.models.git.search import FastSearch, open_network, unsupported_settings

__all__ = ["FastSearch", "GitCaptioner", "GitNetwork", "open_network", "unsupported_settings"]
