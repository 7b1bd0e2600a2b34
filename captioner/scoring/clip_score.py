"""CLIPScore and RefCLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718), and retrieval.

    CLIPScore(c, v)       = 2.5 * max(cos(c, v), 0)
    RefCLIPScore(c, R, v) = harmonic mean of CLIPScore(c, v) and max(max over r in R of cos(c, r), 0)

c, r and v are the embeddings of "A photo depicts " + caption, of a reference with the same words before it, and of the
image. Scores depend on the model, so each is set beside that of the same caption on other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

WEIGHT = 2.5
PREFIX = "A photo depicts "

Floats = npt.NDArray[np.float32]


def clip_scores(cosines: Floats) -> Floats:
    """Return the CLIPScore of each cosine."""
    scores: Floats = np.float32(WEIGHT) * np.maximum(cosines, np.float32(0))
    return scores


def ref_clip_score(clip_score: float, reference_cosines: Sequence[float]) -> float:
    """Return the RefCLIPScore of a caption from its CLIPScore and its cosines with the references."""
    to_references = max(0.0, *reference_cosines)
    total = clip_score + to_references
    return 2 * clip_score * to_references / total if total else 0.0


@dataclass(frozen=True)
class ImageScores:
    """Captions compared with their own image and with others; each [N].

    `own`: CLIPScore. `others`: the mean CLIPScore of the same caption on other images, NaN where there are none.
    `retrieved`: whether no other image scores as high as its own. `num_others`: of the images compared with.
    """

    own: Floats
    others: Floats
    retrieved: npt.NDArray[np.bool_]
    num_others: npt.NDArray[np.int32]


def compare_with_images(
    texts: Floats, images: Floats, digests: Sequence[str], num_others: int, seed: Any
) -> ImageScores:
    """Compare each caption with its image and with up to `num_others` different ones, drawn from the rest.

    `texts`, `images`: unit vectors [N, D], row i of one image. `digests`: the sha256 of the images: copies of an image
    are not compared with it. `seed`: anything that `numpy.random.default_rng` takes.
    """
    scores = clip_scores(texts @ images.T)
    first_of = {digest: index for index, digest in reversed(list(enumerate(digests)))}
    different = np.array(sorted(first_of.values()), np.int64)
    random = np.random.default_rng(seed)
    own = scores.diagonal().copy()
    means, best, counts = np.full(len(own), np.nan, np.float32), np.full(len(own), -1, np.float32), []
    for index, digest in enumerate(digests):
        candidates = different[different != first_of[digest]]
        if len(candidates) > num_others:
            candidates = random.choice(candidates, num_others, replace=False)
        counts.append(len(candidates))
        if len(candidates):
            means[index], best[index] = scores[index, candidates].mean(), scores[index, candidates].max()
    return ImageScores(own, means, own > best, np.array(counts, np.int32))
