"""Text normalisation and word splitting for WER, and the tokens of CIDEr-D, BLEU and ROUGE-L.

For WER, CER and MER a text is converted to Unicode NFKC and lower case, apostrophes are removed ("dog's" is "dogs"),
every other punctuation mark or symbol becomes a space ("t-shirt" is two words) and white space is collapsed. Numbers
stay: a point or comma between two digits is kept, and "2" and "two" differ. Vowel marks and the letter extension of
Arabic, which most writers leave out, and invisible format characters are removed.

Words are separated at spaces. In scripts that are written without spaces between words (UNSPACED) each character, with
the marks above and below it, counts as a word, so that their WER is a character error rate. This is what Whisper's
evaluation and sacrebleu's Chinese tokenizer do; unlike a segmenter it cannot disagree with itself between two texts.

CIDEr-D, BLEU and ROUGE-L use the tokens of coco-caption: Penn Treebank's, lower case, without punctuation.
`caption_tokens` follows the rules of that tokenizer that matter in captions: clitics are split off ("dog's" is
"dog" "'s", "isn't" is "is" "n't"), words with hyphens and numbers stay whole.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache

import regex

NORMALISATION = (
    "Unicode NFKC, lower case, apostrophes and Arabic vowel marks removed, other punctuation is a space, numbers left "
    "alone; words are separated at spaces, and each character of a script without spaces is a word"
)
UNSPACED = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"

_CHARACTER = regex.compile(rf"(?={UNSPACED})\X\p{{M}}*")  # with its combining marks
_SPACE_BETWEEN = regex.compile(rf"(?<={UNSPACED}) (?={UNSPACED})")
# Apostrophes; format characters except the zero-width space; variation selectors; Arabic tatweel and vowel marks.
_REMOVED = regex.compile(r"['’‘ʼ`]|(?!\u200b)\p{Cf}|[\ufe00-\ufe0f\u0640\u064b-\u0652\u0670]")
_MARKS = regex.compile(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,]|_")  # of this library, \w includes combining marks
# A word with inner hyphens, points or commas between digits, and inner apostrophes; or one mark.
_WORD = regex.compile(r"n't\b|\d+(?:[.,:/]\d+)+|\w+(?:[-./&]\w+)*|'\w+|[^\w\s]+")
_CLITIC = regex.compile(r"(?<=\w)(n't|'s|'re|'ve|'ll|'d|'m)\b")


@lru_cache(maxsize=10_000)
def normalise(text: str) -> str:
    """Return the normalised text, its words separated by single spaces; "" when nothing is left.

    There is no space between characters of scripts without spaces, whether the text has one or not.
    """
    if text.isascii() and text.replace(" ", "").isalnum():  # a fast path for most captions
        return " ".join(text.lower().split())
    plain = _REMOVED.sub("", unicodedata.normalize("NFKC", text).lower())
    words = " ".join(_MARKS.sub(" ", plain).split())
    return words if words.isascii() else _SPACE_BETWEEN.sub("", words)


def split_words(text: str) -> list[str]:
    """Return the words of a text as its language is written: at spaces, or characters of scripts without spaces."""
    return separate_characters(text).split()


def separate_characters(text: str) -> str:
    """Put spaces around each character of scripts without spaces, which thereby counts as a word."""
    return text if text.isascii() else _CHARACTER.sub(r" \g<0> ", text)


def count_characters(text: str) -> int:
    """Return the number of words that are characters of scripts without spaces."""
    return 0 if text.isascii() else len(_CHARACTER.findall(text))


def caption_tokens(text: str) -> list[str]:
    """Return the tokens of coco-caption: lower case, without punctuation."""
    plain = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    words = _WORD.findall(separate_characters(_CLITIC.sub(r" \1", plain)))
    return [word for word in words if any(char.isalnum() for char in word)]
