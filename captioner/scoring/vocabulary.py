"""Compare the words of captions with those of their references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

MAX_SHOWN = 15
Tokens = Sequence[str]


def compare_vocabulary(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, Any] | None:
    """Return the vocabulary figures; `None` without captions.

    A word counts once for each image, however many of its references have it. `missed`: words of references that are
    in no caption. `invented`: words of captions that are in no reference. `covered`: the share of the references'
    words that are in some caption, weighted by images.
    """
    if not captions:
        return None
    in_captions = _images_by_word(captions)
    in_references = _images_by_word([word for tokens in image for word in tokens] for image in references)
    total = in_references.total()
    covered = sum(count for word, count in in_references.items() if word in in_captions)
    return {
        "captions": len(in_captions),
        "references": len(in_references),
        "shared": len(in_captions.keys() & in_references.keys()),
        "covered": covered / total if total else None,
        "missed": _only_in(in_references, in_captions),
        "invented": _only_in(in_captions, in_references),
    }


def _images_by_word(texts: Iterable[Iterable[str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for words in texts:
        counts.update(set(words))
    return counts


def _only_in(words: Counter[str], others: Counter[str]) -> list[tuple[str, int]]:
    """Return the words that are not in `others`, by number of images, then alphabetically."""
    only = [(word, count) for word, count in words.items() if word not in others]
    return sorted(only, key=lambda item: (-item[1], item[0]))[:MAX_SHOWN]
