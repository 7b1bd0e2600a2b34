"""What a person has to decide about an alt text. Findings are flags and never change a word.

They look for words, and the words are English; --terms is for every language. A text without a finding has not been
checked: no list of words knows what a picture is for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from captioner.publishing.alt_text.rules import QUOTED, has_words

FINDINGS = {
    "maybe_decorative": "may be decorative: then its alt text is empty",
    "text_in_picture": "seems to show text, which belongs in the alt text where it is not beside the picture",
    "identity": "says what someone is (origin, age, faith, disability, kinship), which a picture does not show",
    "gender": "says that someone is a man or a woman, which may be a guess",
    "name": "holds what looks like a name, which no picture tells",
    "listed_term": "holds a term of the list given with --terms",
    "cut_short": "was cut off at the hard limit",
    "no_words": "says nothing: no words are left without special tokens",
}
SPACER_PIXELS = 24


@dataclass(frozen=True, slots=True)
class Captioned:
    """What a finding looks at. `width`, `height`: of the picture in pixels, None where unknown. `rules`: that changed
    something."""

    caption: str
    alt_text: str
    rules: tuple[str, ...] = ()
    width: int | None = None
    height: int | None = None


Finding = Callable[[Captioned], bool]


def _lexicon(words: str) -> frozenset[str]:
    """Words and their plurals in -s."""
    return frozenset(form for word in words.split() for form in (word, f"{word}s"))


_DECORATIVE = _lexicon("background pattern texture gradient wallpaper border ornament divider swirl blank")
_TEXT = _lexicon(
    "sign text word letter lettering logo label poster banner billboard caption inscription writing written says "
    "reads reading screenshot document newspaper headline graffiti license titled handwriting "
    "subtitle menu ticket map chart graph diagram"
)
_PEOPLE = _lexicon(
    "man men woman women boy girl male female person people child children kid baby couple family lady ladies guy "
    "gentleman soldier worker farmer player dancer musician student"
)
_WHAT_PEOPLE_ARE = _lexicon(  # said of people only: there are African elephants and window blinds
    "african african-american asian american european chinese japanese korean indian arab arabic mexican hispanic "
    "latino latina caucasian black white brown native indigenous tribal ethnic blind deaf disabled poor gay lesbian "
    "old elderly young middle-aged homeless foreign"
)
_IDENTITY = _lexicon(
    "eskimo gypsy gypsie immigrant refugee migrant muslim jewish jew christian hindu buddhist sikh nun rabbi imam "
    "handicapped wheelchair amputee autistic transgender pregnant beggar slave mother father mom mum dad wife wives "
    "husband bride groom son daughter sister brother sibling grandmother grandfather obese overweight"
)
_GENDER = _lexicon("man men woman women boy girl male female gentleman gentlemen lady ladies ladie he she his her guy")
_NAME = re.compile(r"\b[A-Z][a-z’']+\s+(?:(?:de|van|von|di|da|of)\s+)?[A-Z][a-z’']+")


def maybe_decorative(of: Captioned) -> bool:
    """Whether the picture is small as a spacer, or the caption begins with a background, border or pattern.

    Source: W3C WAI, Images Tutorial, alt Decision Tree: decorative pictures have an empty alt text; only who knows the
    page can tell.
    """
    sides = [side for side in (of.width, of.height) if side is not None]
    return any(side < SPACER_PIXELS for side in sides) or not _DECORATIVE.isdisjoint(_words_of(of.caption)[:3])


def text_in_picture(of: Captioned) -> bool:
    """Whether the caption quotes something or speaks of a sign, a label, a page. Source: W3C WAI, alt Decision Tree."""
    return QUOTED.search(of.caption) is not None or not _TEXT.isdisjoint(_words_of(of.caption))


def identity(of: Captioned) -> bool:
    """Whether the caption says what nobody can see of a person. Source: Cooper Hewitt, Guidelines for Image
    Description; Nasjonalmuseet: observable elements only."""
    words = _words_of(of.caption)
    said_of_people = (
        word in _WHAT_PEOPLE_ARE and not _PEOPLE.isdisjoint(words[place + 1 : place + 3])
        for place, word in enumerate(words)
    )
    return not _IDENTITY.isdisjoint(words) or any(said_of_people)


def gender(of: Captioned) -> bool:
    """Whether the caption says that someone is a man or a woman. A flag of its own: it is far more frequent than
    `identity`. Source: as there; captioning models follow the habits of their data (Hendricks et al., Women also
    Snowboard, 2018)."""
    return not _GENDER.isdisjoint(_words_of(of.caption))


def name(of: Captioned) -> bool:
    """Whether two words in a row are capitalised: a person, a place, a brand. A captioning model cannot know it."""
    return _NAME.search(of.caption) is not None


def cut_short(of: Captioned) -> bool:
    """Whether the rule `hard_limit` cut it: what is left may mislead."""
    return "hard_limit" in of.rules


def no_words(of: Captioned) -> bool:
    """Whether no words are left. Source: W3C ATAG 2.0, B.2.3.2: no strings that say nothing are put in as repairs."""
    return not has_words(re.sub(r"[\[<][^\]>]*[\]>]", "", of.alt_text))


@lru_cache(maxsize=64)
def _words_of(caption: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+(?:-\w+)*", caption.lower()))


def findings(of: Captioned, holds_term: Callable[[str], bool]) -> list[str]:
    """The flags of one alt text, in the order of FINDINGS. `holds_term`: see `captioner.scoring.terms`."""
    tests: dict[str, Finding] = {
        "maybe_decorative": maybe_decorative,
        "text_in_picture": text_in_picture,
        "identity": identity,
        "gender": gender,
        "name": name,
        "listed_term": lambda of: holds_term(of.caption),
        "cut_short": cut_short,
        "no_words": no_words,
    }
    return [flag for flag in FINDINGS if tests[flag](of)]
