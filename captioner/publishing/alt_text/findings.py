"""Flag alt texts that a person has to check. Findings never change a text.

They search for English words; --terms works for every language. A text without a finding is not necessarily correct:
a list of words cannot know the purpose of an image.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from captioner.publishing.alt_text.rules import has_words
from captioner.scoring.chat_habits import (
    CONDITIONS,
    FAITHS,
    ORIGINS,
    PEOPLE,
    QUOTED,
    VISIBLE_TEXT,
    are_described,
    lexicon,
    words_of,
)

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


_DECORATIVE = lexicon("background pattern texture gradient wallpaper border ornament divider swirl blank")
_PEOPLE_ADJECTIVES = (  # only before a word for people: there are African elephants and window blinds
    ORIGINS | CONDITIONS | lexicon("black white brown poor gay lesbian old elderly young middle-aged homeless foreign")
)
_IDENTITY = (
    FAITHS
    | lexicon("handicapped autistic pregnant obese overweight wheelchair amputee transgender")
    | lexicon("eskimo gypsy gypsie immigrant refugee migrant nun rabbi imam beggar slave")
    | lexicon("mother father mom mum dad wife wives husband bride groom son daughter sister brother sibling")
    | lexicon("grandmother grandfather")
)
_GENDER = lexicon("man men woman women boy girl male female gentleman gentlemen lady ladies ladie he she his her guy")
_NAME = re.compile(r"\b[A-Z][a-z’']+\s+(?:(?:de|van|von|di|da|of)\s+)?[A-Z][a-z’']+")


def maybe_decorative(image: CaptionedImage) -> bool:
    """Return whether the image is as small as a spacer, or the caption begins with a background, border or pattern.

    Source: W3C WAI, Images Tutorial, alt Decision Tree: decorative images have an empty alt text; only someone who
    knows the page can decide.
    """
    sides = [side for side in (image.width, image.height) if side is not None]
    return any(side < SPACER_PIXELS for side in sides) or not _DECORATIVE.isdisjoint(words_of(image.caption)[:3])


def text_in_picture(image: CaptionedImage) -> bool:
    """Return whether the caption quotes text or mentions a sign, a label or a page.

    Source: W3C WAI, alt Decision Tree.
    """
    return QUOTED.search(image.caption) is not None or not VISIBLE_TEXT.isdisjoint(words_of(image.caption))


def identity(image: CaptionedImage) -> bool:
    """Return whether the caption states something about a person that cannot be seen.

    Source: Cooper Hewitt, Guidelines for Image Description; Nasjonalmuseet: observable elements only.
    """
    words = words_of(image.caption)
    return not _IDENTITY.isdisjoint(words) or are_described(words, _PEOPLE_ADJECTIVES, PEOPLE, reach=2)


def gender(image: CaptionedImage) -> bool:
    """Return whether the caption states that someone is a man or a woman.

    A flag of its own, since it is far more frequent than `identity`. Source: as for `identity`; captioning models
    reproduce the bias of their data (Hendricks et al., Women also Snowboard, 2018).
    """
    return not _GENDER.isdisjoint(words_of(image.caption))


def name(image: CaptionedImage) -> bool:
    """Return whether two consecutive words are capitalised: the name of a person, a place or a brand."""
    return _NAME.search(image.caption) is not None


def cut_short(image: CaptionedImage) -> bool:
    """Return whether the rule `hard_limit` cut the text; the rest may be misleading."""
    return "hard_limit" in image.rules


def no_words(image: CaptionedImage) -> bool:
    """Return whether no words are left. Source: W3C ATAG 2.0, B.2.3.2: no meaningless strings as repairs."""
    return not has_words(re.sub(r"[\[<][^\]>]*[\]>]", "", image.alt_text))


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
