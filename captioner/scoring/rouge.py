"""ROUGE-L (Lin 2004) of one caption, as coco-caption computes it: beta 1.2, the best precision and the best recall over
the references."""

from __future__ import annotations

from collections.abc import Sequence

BETA = 1.2
Tokens = Sequence[str]


def rouge_l(caption: Tokens, references: Sequence[Tokens]) -> float:
    """0 to 1."""
    common = [longest_common(caption, known) for known in references]
    precision = max((length / len(caption) for length in common), default=0.0) if caption else 0.0
    recalls = (length / len(known) for length, known in zip(common, references, strict=True) if known)
    recall = max(recalls, default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def longest_common(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if token == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
