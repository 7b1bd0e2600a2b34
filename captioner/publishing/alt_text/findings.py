"""Flag alt texts that a person has to check. Findings never change a text.

They search for English words; --terms works for every language. A text without a finding is not necessarily correct:
a list of words cannot know the purpose of an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from captioner.publishing.alt_text.rules import QUOTED, has_words

FINDINGS = {
    "maybe_decorative": "may be decorative; a decorative image has an empty alt text",
    "text_in_picture": "seems to show text, which belongs in the alt text unless it stands next to the image",
    "identity": "states someone's identity (origin, age, faith, disability, kinship), which an image cannot show",
    "gender": "states that someone is a man or a woman, which may be a guess",
    "name": "seems to contain a name, which a captioning model cannot know",
    "listed_term": "contains a term of the list given with --terms",
    "cut_short": "was cut off at the hard limit",
    "no_words": "has no words besides special tokens",
}
SPACER_PIXELS = 24


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """The input of a finding.

    `width`, `height`: size of the image in pixels, None when unknown. `rules`: the rules that changed the caption.
    """

    caption: str
    alt_text: str
    rules: tuple[str, ...] = ()
    width: int | None = None
    height: int | None = None


Finding = Callable[[CaptionedImage], bool]


def _lexicon(words: str) -> frozenset[str]:
    """Return the words and their plurals in -s."""
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
_PEOPLE_ADJECTIVES = _lexicon(  # only before a word for people: there are African elephants and window blinds
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


def maybe_decorative(image: CaptionedImage) -> bool:
    """Return whether the image is as small as a spacer, or the caption begins with a background, border or pattern.

    Source: W3C WAI, Images Tutorial, alt Decision Tree: decorative images have an empty alt text; only someone who
    knows the page can decide.
    """
    sides = [side for side in (image.width, image.height) if side is not None]
    return any(side < SPACER_PIXELS for side in sides) or not _DECORATIVE.isdisjoint(_words_of(image.caption)[:3])


def text_in_picture(image: CaptionedImage) -> bool:
    """Return whether the caption quotes text or mentions a sign, a label or a page.

    Source: W3C WAI, alt Decision Tree.
    """
    return QUOTED.search(image.caption) is not None or not _TEXT.isdisjoint(_words_of(image.caption))


def identity(image: CaptionedImage) -> bool:
    """Return whether the caption states something about a person that cannot be seen.

    Source: Cooper Hewitt, Guidelines for Image Description; Nasjonalmuseet: observable elements only.
    """
    words = _words_of(image.caption)
    describes_people = (
        word in _PEOPLE_ADJECTIVES and not _PEOPLE.isdisjoint(words[index + 1 : index + 3])
        for index, word in enumerate(words)
    )
    return not _IDENTITY.isdisjoint(words) or any(describes_people)


def gender(image: CaptionedImage) -> bool:
    """Return whether the caption states that someone is a man or a woman.

    A flag of its own, since it is far more frequent than `identity`. Source: as for `identity`; captioning models
    reproduce the bias of their data (Hendricks et al., Women also Snowboard, 2018).
    """
    return not _GENDER.isdisjoint(_words_of(image.caption))


def name(image: CaptionedImage) -> bool:
    """Return whether two consecutive words are capitalised: the name of a person, a place or a brand."""
    return _NAME.search(image.caption) is not None


def cut_short(image: CaptionedImage) -> bool:
    """Return whether the rule `hard_limit` cut the text; the rest may be misleading."""
    return "hard_limit" in image.rules


def no_words(image: CaptionedImage) -> bool:
    """Return whether no words are left. Source: W3C ATAG 2.0, B.2.3.2: no meaningless strings as repairs."""
    return not has_words(re.sub(r"[\[<][^\]>]*[\]>]", "", image.alt_text))


@lru_cache(maxsize=64)
def _words_of(caption: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+(?:-\w+)*", caption.lower()))


def findings(image: CaptionedImage, holds_term: Callable[[str], bool]) -> list[str]:
    """Return the flags of one alt text, in the order of FINDINGS. `holds_term`: see `captioner.scoring.terms`."""
    tests: dict[str, Finding] = {
        "maybe_decorative": maybe_decorative,
        "text_in_picture": text_in_picture,
        "identity": identity,
        "gender": gender,
        "name": name,
        "listed_term": lambda image: holds_term(image.caption),
        "cut_short": cut_short,
        "no_words": no_words,
    }
    return [flag for flag in FINDINGS if tests[flag](image)]
