"""GIT (microsoft/git-*, and the starter): a decoder that reads image tokens and text in one sequence.

Captioned without the work that `generate` repeats: the same token ids in a third to two thirds of the time.

captioner.py        the captioner: its search for a batch, and which generation settings that supports
network.py          keys and values of image tokens, computed once; logits of the newest tokens
triton_network.py   the same on a CUDA GPU, with fused kernels (triton_kernels.py) between the matrix products
searches.py         greedy and sampled search; the settings and the result of a search
beam.py             beam search with the scores of transformers
graphs.py           a step of a search as a CUDA graph
"""

from __future__ import annotations

from captioner.models.git.captioner import FastSearch, GitCaptioner, open_network, unsupported_settings
from captioner.models.git.network import GitNetwork

__all__ = ["FastSearch", "GitCaptioner", "GitNetwork", "open_network", "unsupported_settings"]
