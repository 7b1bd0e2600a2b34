"""Guess the script of a caption, and for some Latin languages the language, to find captions unlike the others.

Captions are too short for language identification libraries: langdetect takes "red dog" for Welsh with probability
0.99. This module answers None unless function words or the script decide.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

_FUNCTION_WORDS = {
    "en": "the a an of on in with and is are at to by from for that this it its there two some near next",
    "de": "der die das ein eine einer einem einen und ist sind mit auf im am von zu den dem vor bei",
    "fr": "le la les un une des et est sont avec sur dans au aux du de à en qui près",
    "es": "el la los las un una y es son con en del de al por que sobre su junto unos",
    "it": "il lo la gli le un una e è sono con su nel nella di del della che sul al",
    "pt": "o a os as um uma e é são com em no na do da de que ao sobre dos",
    "nl": "de het een en is zijn met op in van aan te bij voor naast die",
}
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _words in _FUNCTION_WORDS.items():
    for _word in _words.split():
        _LANGUAGES_OF.setdefault(_word, []).append(_language)
_MIN_HITS = 2


@lru_cache(maxsize=10_000)
def language_of(text: str) -> str | None:
    """Return a code of _FUNCTION_WORDS or the name of a script ("cyrillic", "cjk"); `None` when undecided.

    A Latin text needs two function words, and more of one language than of any other.
    """
    script = "latin" if text.isascii() else _main_script(text)
    if script != "latin":
        return script
    words = set(text.lower().replace(",", " ").replace(".", " ").split())
    hits = Counter(language for word in words & _LANGUAGES_OF.keys() for language in _LANGUAGES_OF[word])
    best = hits.most_common(2)
    if not best or best[0][1] < _MIN_HITS or (len(best) > 1 and best[0][1] == best[1][1]):
        return None
    return best[0][0]


def _main_script(text: str) -> str | None:
    scripts = Counter(_script(char) for char in text if char.isalpha())
    return min(scripts, key=lambda script: (-scripts[script], script)) if scripts else None


@lru_cache(maxsize=10_000)
def _script(char: str) -> str:
    name = unicodedata.name(char, "other").split()[0].split("-")[0].lower()
    return {"hiragana": "japanese", "katakana": "japanese", "fullwidth": "latin"}.get(name, name)
