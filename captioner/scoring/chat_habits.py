"""Habits of chat models that do not belong in a caption: refusals, preambles, markdown, guesses about people.

The words are English, except for refusals. Text in double quotes is visible in the image and is not looked at. Words
such as "young" and "woman" describe what is seen; a guess is what an image cannot show.
"""

from __future__ import annotations

import re
from functools import lru_cache

from captioner.scoring.terms import UNSPACED

HABITS = {
    "refusal": "refuses to describe the image, or says that there is none",
    "preamble": "begins with words such as “The image shows” or “Here is”",
    "markdown": "contains markdown: headings, bold text, lists, links or code",
    "second_person": "speaks to the reader (“you can see”)",
    "guess_about_person": "guesses at someone’s identity, origin, age or health, which an image cannot show",
    "repeats_prompt": "repeats the prompt",
}

QUOTED = re.compile(r'"[^"]*"|“[^”]*”|«[^»]*»|「[^」]*」')
PICTURES = r"(?:image|picture|photo|photograph|pic)s?"  # kinds of image whose name tells a reader nothing
KINDS = rf"(?:{PICTURES}|(?:photography|drawing|illustration|screenshot|graphic|icon)s?)"
SHOWS = r"(?:showing|shows?|depicting|depicts?|featuring|features?)"


def lexicon(words: str) -> frozenset[str]:
    """Return the words and their plurals in -s."""
    return frozenset(form for word in words.split() for form in (word, f"{word}s"))


VISIBLE_TEXT = lexicon(  # words that announce text in the image
    "sign text word letter lettering logo label poster banner billboard caption inscription writing written says "
    "reads reading screenshot document newspaper headline graffiti license titled handwriting "
    "subtitle menu ticket map chart graph diagram"
)
PEOPLE = lexicon(
    "man men woman women boy girl male female person people child children kid baby couple family lady ladies guy "
    "gentleman soldier worker farmer player dancer musician student"
)
ORIGINS = lexicon(
    "african african-american asian american european chinese japanese korean indian arab arabic mexican hispanic "
    "latino latina caucasian native indigenous tribal ethnic"
)
FAITHS = lexicon("muslim jewish jew christian hindu buddhist sikh")
CONDITIONS = lexicon("blind deaf disabled handicapped autistic pregnant obese overweight")

# Right before a word for a person: there are African elephants, window blinds and white babies of animals.
_GUESSES = ORIGINS | FAITHS | CONDITIONS | lexicon("gay lesbian transgender middle-aged black white")
_ADULTS = PEOPLE - lexicon("baby couple family kid child children player")
_SECOND_PERSON = lexicon("you your yourself yourselves")
_SPOKEN = VISIBLE_TEXT | lexicon("saying say tell telling showing asking thank wishing inviting it")


def _any_of(*phrases: str) -> re.Pattern[str]:
    """Return a pattern that finds one of the phrases as whole words."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)", re.I)


_REFUSAL = _any_of(
    r"i(?:'m| am) (?:\w+ )?sorry|i apologi[sz]e",
    r"as an ai|as a(?: large)? language model|i(?:'m| am) an ai",
    r"i (?:can(?:not|'t| not)|am (?:not able|unable) to|(?:do not|don't) have the ability to|will not|won't) "
    r"(?:help|assist|see|view|access|identify|describe|process|analy[sz]e|provide|comply|fulfil|generate|determine|open)",
    r"i(?:'m| am) (?:not able|unable) to",
    r"no (?:image|picture|photo) (?:was |is |has been )?(?:provided|attached|uploaded|included)",
    r"please (?:provide|upload|share|attach|send) (?:an?|the|your|another|me) (?:\w+ )?(?:image|picture|photo)",
    r"es tut mir leid|je suis désolée?|lo siento|mi dispiace|sinto muito",
)
_REFUSAL_UNSPACED = re.compile("抱歉|对不起|對不起|申し訳|ごめんなさい|죄송합니다")
_PREAMBLE = re.compile(
    r"\W*(?:"
    r"(?:sure|certainly|of course|absolutely|okay|alright)[,!.:]"
    r"|here(?:'s| is| are) (?:an?|the|your|my|some|one)\b"
    r"|(?:caption|description|answer|output|response|alt text)\s?:"
    rf"|(?:based on|looking at|judging by|in) (?:the|this|your|these) {PICTURES}\b"
    rf"|(?:the|this|an?|your|these) (?:\w+ )?{KINDS} (?:that )?(?:shows?|depicts?|features?|provided|above|captures?"
    r"|contains?|displays?|presents?|portrays?|showcases?|appears?|seems?|includes?|illustrates?|consists?)\b"
    r"|i (?:can |could )?(?:see|notice|observe|think|believe)\b"
    r")",
    re.I,
)
_MARKDOWN = re.compile(
    r"^\s*(?:#{1,6}|[-*•>])\s+\S"  # a heading, an item of a list, a quotation
    r"|^\s*\d+[.)]\s+\S.*\n+\s*\d+[.)]\s"  # two numbered items
    r"|^\s*\|.+\|\s*$"  # a row of a table
    r"|\*\*[^\s*][^*]*\*\*|(?<![\w*])\*[a-z][^*\n]*[a-z.,:]\*(?![\w*])"  # bold and italic text
    r"|```|`[^`\n]+`|\[[^\]\n]+\]\([^)\s]+\)",  # code, links and images
    re.M | re.I,
)
_HEDGE = r"(?:appears?|seems?|looks?|possibly|likely|probably|perhaps|may|might|could)(?: (?:to be|be|like))?"
_CELEBRITIES = "actor|actress|singer|politician|president|celebrity|senator|comedian|rapper"
_ABOUT_PERSON = _any_of(
    r"in (?:his|her|their) (?:(?:early|mid|late)[ -])?(?:teens|twenties|thirties|forties|fifties|sixties|seventies"
    r"|eighties|[1-9]0'?s)",
    rf"\d{{1,2}}[ -]years?[ -]old (?:\w+ )?(?:{'|'.join(sorted(PEOPLE))})",
    r"(?:is|are|appears?|seems?|looks?)(?: to be)? (?:\w+ ){0,2}\d{1,2}(?: to \d{1,2})? years old",
    r"aged? (?:about |around |between )?\d{1,2}",
    r"of (?:\w+ ){1,2}(?:descent|ethnicity|heritage|ancestry)",
    r"suffer(?:s|ing)? from|diagnosed with|mentally ill",
    r"(?:has|have|having) (?:down'?s? syndrome|dementia|autism|depression|cancer"
    r"|an? (?:\w+ )?(?:disability|disorder|disease|illness|medical condition))",
    rf"{_HEDGE} (?:\w+ )?(?:ill|sick|unwell|depressed|drunk|intoxicated|malnourished|pregnant|disabled|homeless)",
    rf"{_HEDGE} (?:an? |the |of )?(?:\w+ )?(?:{'|'.join(sorted(ORIGINS | FAITHS))}|{_CELEBRITIES})",
    r"identified as",
)
_LIKE_SOMEBODY = re.compile(
    r"\b(?:[Mm]an|[Ww]oman|[Bb]oy|[Gg]irl|[Pp]erson|[Hh]e|[Ss]he|[Ii]ndividual)(?: who)?,? "
    rf"(?:{_HEDGE}|resembl(?:es|ing)) (?:\w+ )?[A-Z][a-z']+ [A-Z][a-z']+"
)
MIN_PROMPT_WORDS, SHARED_WORDS = 4, 8
_PROMPT_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def chat_habits(text: str, prompt: str = "") -> set[str]:
    """Return the names of the HABITS that a caption shows. `prompt`: the question that the model was asked, if any."""
    unquoted = QUOTED.sub('""', text).replace("’", "'")
    line = " ".join(unquoted.split())
    words = words_of(line)
    shows = {
        "refusal": _refuses(line, words),
        "preamble": _PREAMBLE.match(line) is not None,
        "markdown": _has_markdown(unquoted),
        "second_person": _speaks_to_reader(line, words),
        "guess_about_person": _guesses_about_person(line, words),
        "repeats_prompt": repeats_prompt(text, prompt),
    }
    return {name for name, applies in shows.items() if applies}


@lru_cache(maxsize=64)
def words_of(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case; a hyphenated word is one."""
    return tuple(re.findall(r"\w+(?:-\w+)*", text.lower()))


def are_described(words: tuple[str, ...], adjectives: frozenset[str], people: frozenset[str], reach: int = 1) -> bool:
    """Return whether one of the adjectives stands before a word for people, at most `reach` words before it."""
    return any(
        word in adjectives and not people.isdisjoint(words[index + 1 : index + 1 + reach])
        for index, word in enumerate(words)
    )


# The patterns are slow on every caption: a caption without these words or characters needs no search.
_OF_REFUSALS = frozenset(
    ["sorry", "apologize", "apologise", "ai", "language", "i", "no", "please", "es", "je", "lo", "mi", "sinto"]
)
_OF_MARKDOWN = frozenset("#*`[|>•\n")


def _refuses(line: str, words: tuple[str, ...]) -> bool:
    in_words = not _OF_REFUSALS.isdisjoint(words) and _REFUSAL.search(line) is not None
    return in_words or (not line.isascii() and _REFUSAL_UNSPACED.search(line) is not None)


def _has_markdown(text: str) -> bool:
    if _OF_MARKDOWN.isdisjoint(text) and not text.lstrip().startswith("-"):
        return False
    return _MARKDOWN.search(text) is not None


def _speaks_to_reader(line: str, words: tuple[str, ...]) -> bool:
    """Return whether a sentence says "you" and no word before it announces text: "a sign telling you to stop"."""
    if _SECOND_PERSON.isdisjoint(words):
        return False
    for sentence in re.split(r"[.!?]\s", line):
        words = words_of(sentence)
        index = next((index for index, word in enumerate(words) if word in _SECOND_PERSON), None)
        if index is not None and _SPOKEN.isdisjoint(words[:index]):
            return True
    return False


def _guesses_about_person(line: str, words: tuple[str, ...]) -> bool:
    if PEOPLE.isdisjoint(words) and {"he", "she", "they", "individual", "individuals"}.isdisjoint(words):
        return False
    return bool(are_described(words, _GUESSES, _ADULTS) or _ABOUT_PERSON.search(line) or _LIKE_SOMEBODY.search(line))


def repeats_prompt(text: str, prompt: str) -> bool:
    """Return whether a text holds 8 words in a row of the prompt, or all of one that has fewer.

    A prompt of fewer than 4 words may be part of a right caption. In scripts without spaces a character is a word.
    """
    asked = _prompt_words(prompt)
    if len(asked) < MIN_PROMPT_WORDS:
        return False
    size = min(len(asked), SHARED_WORDS)
    words = f" {' '.join(_PROMPT_WORD.findall(text.casefold()))} "
    return any(f" {' '.join(asked[first : first + size])} " in words for first in range(len(asked) - size + 1))


@lru_cache(maxsize=4)
def _prompt_words(prompt: str) -> tuple[str, ...]:
    return tuple(_PROMPT_WORD.findall(prompt.casefold()))
