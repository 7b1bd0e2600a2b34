"""The words of captions beside those of their references: what the captions never say, and what only they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

MOST_SHOWN = 15
Tokens = Sequence[str]


def compare_vocabulary(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, Any] | None:
    """Counts are of pictures: a word counts once for a picture, however many of its references have it.

    `missed`: words of references in no caption. `invented`: words of captions in no reference. `covered`: the share of
    the references' words that some caption has, each weighted by its pictures. `None` without captions.
    """
    if not captions:
        return None
    said = _pictures_with(captions)
    known = _pictures_with([word for one in several for word in one] for several in references)
    total = known.total()
    return {
        "captions": len(said),
        "references": len(known),
        "shared": len(said.keys() & known.keys()),
        "covered": sum(count for word, count in known.items() if word in said) / total if total else None,
        "missed": _most(known, said),
        "invented": _most(said, known),
    }


def _pictures_with(texts: Iterable[Iterable[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for words in texts:
        found.update(set(words))
    return found


def _most(words: Counter[str], but: Counter[str]) -> list[tuple[str, int]]:
    """The words of the one and not of the other, by pictures, then by word."""
    only = [(word, count) for word, count in words.items() if word not in but]
    return sorted(only, key=lambda item: (-item[1], item[0]))[:MOST_SHOWN]
