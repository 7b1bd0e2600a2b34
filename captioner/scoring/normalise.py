"""Text normalisation for WER, and the tokens of CIDEr-D, BLEU and ROUGE-L.

For WER, CER and MER a text is converted to Unicode NFKC and lower case, apostrophes are removed ("dog's" is "dogs"),
every other punctuation mark or symbol becomes a space ("t-shirt" is two words) and white space is collapsed. Numbers
stay: a point or comma between two digits is kept, and "2" and "two" differ.

CIDEr-D, BLEU and ROUGE-L use the tokens of coco-caption: Penn Treebank's, lower case, without punctuation.
`caption_tokens` follows the rules of that tokenizer that matter in captions: clitics are split off ("dog's" is
"dog" "'s", "isn't" is "is" "n't"), words with hyphens and numbers stay whole.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

NORMALISATION = "Unicode NFKC, lower case, apostrophes removed, other punctuation is a space, numbers left alone"

_APOSTROPHES = re.compile(r"['’‘ʼ`]")
_MARKS = re.compile(r"(?<=\d)[.,](?=\d)|([^\w\s]|_)")
# A word with inner hyphens, points or commas between digits, and inner apostrophes; or one mark.
_WORD = re.compile(r"n't\b|\d+(?:[.,:/]\d+)+|\w+(?:[-./&]\w+)*|'\w+|[^\w\s]+")
_CLITIC = re.compile(r"(?<=\w)(n't|'s|'re|'ve|'ll|'d|'m)\b")


@lru_cache(maxsize=10_000)
def normalise(text: str) -> str:
    """Return the normalised words separated by single spaces; "" when nothing is left."""
    if text.isascii() and text.replace(" ", "").isalnum():  # a fast path for most captions
        return " ".join(text.lower().split())
    lower = unicodedata.normalize("NFKC", text).lower()
    return " ".join(_MARKS.sub(_space_or_mark, _APOSTROPHES.sub("", lower)).split())


def _space_or_mark(mark: re.Match[str]) -> str:
    """Return a space for punctuation; keep combining marks such as Hindi vowels, which are part of words."""
    sign = mark.group(1)
    return mark.group(0) if sign is None or unicodedata.category(sign).startswith("M") else " "


def caption_tokens(text: str) -> list[str]:
    """Return the tokens of coco-caption: lower case, without punctuation."""
    plain = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    words = _WORD.findall(_CLITIC.sub(r" \1", plain))
    return [word for word in words if any(char.isalnum() for char in word)]
