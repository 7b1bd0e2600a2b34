"""GIT without the work that `generate` repeats: the same token ids from a third to two thirds of the time.

network.py   pictures -> keys and values of their image tokens, once; newest tokens -> logits
graphs.py    the step for the newest tokens as a CUDA graph, where there is a GPU
search.py    what a search is given and gives; which settings it can do
greedy.py    greedy search
beam.py      beam search as transformers scores it
"""

from __future__ import annotations

from captioner.models.git_fast.search import FastSearch, missing_settings

__all__ = ["FastSearch", "missing_settings"]
