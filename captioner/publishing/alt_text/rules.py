"""The rules that turn a machine caption into alt text; each names its source and can be switched off.

Rules never add words. Text in double quotes is visible in the image and stays unchanged, and so do names: only the
first letter of a text changes case. What needs a person's judgement is a finding, not a rule.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from captioner.console.text import printable
from captioner.scoring.chat_habits import PICTURES, QUOTED, SHOWS
from captioner.scoring.flags import SPECIAL_TOKENS
from captioner.scoring.terms import UNSPACED

_PICTURE_OF = re.compile(
    r"\W*(?:(?:this|here|there)\s+is\s+|this\s+|these\s+are\s+)?(?:an?\s+|the\s+)?"
    rf"{PICTURES}\s+(?:of|that\s+shows?|that\s+depicts?|{SHOWS})\b[\s:,]*",
    re.I,
)
_TOKEN = re.compile(rf"{QUOTED.pattern}|\w+(?:['’-]\w+)*")
_ENDED = re.compile(r"[.!?…。！？।։።؟۔]['\"”’»」)\]]*$")
_SENTENCE_END = re.compile(rf"[.!?…]['\"”’»)\]]*(?=\s)|[。！？।][」”]?|[.!?]\s*(?=[{UNSPACED}])")
_ABBREVIATED = re.compile(
    r"(?:^|[\s(])(?:\w|mr|mrs|ms|dr|prof|st|no|vs|ca|c|etc|e\.g|i\.e|jr|sr|vol|fig|approx)\.$", re.I
)
_CLAUSE_END = re.compile(r"[,;:](?=\s)|\s[–—-](?=\s)|[，、；]")
_LOOSE_END = " \t,;:–—-&(/，、；："
_DANGLING = re.compile(
    r"\s(?:an?|the|of|with|and|or|in|on|at|to|from|by|for|as|is|are|that|which|while|his|her|their|its|next)$", re.I
)
_STOPS = {"CJK": "。", "HIRAGANA": "。", "KATAKANA": "。", "DEVANAGARI": "।", "THAI": "", "LAO": ""}
_MAX_PHRASE = 12  # words


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in characters. A text may exceed `soft` rather than break a sentence, but never `hard`."""

    soft: int = 125
    hard: int = 250


def special_tokens(text: str, limits: Limits) -> str:
    """Remove special tokens of the vocabulary and control characters.

    Source: GIT generates [unused0] for words outside its vocabulary (github.com/microsoft/GenerativeImage2Text, issues
    19 and 29).
    """
    text = printable(text)
    while (shorter := SPECIAL_TOKENS.sub(" ", text)) != text:
        text = shorter
    return text


def spaces(text: str, limits: Limits) -> str:
    """Leave one space between words and none before a comma or full stop.

    Source: tokenizers that decode word pieces leave "a dog , a cat ." (Hugging Face's `clean_up_tokenization_spaces`).
    """
    return _outside_quotes(text, lambda part: re.sub(r" +([,.])(?!\w)", r"\1", re.sub(r"\s+", " ", part))).strip()


def repeats(text: str, limits: Limits) -> str:
    """Reduce a word or phrase of up to 12 words that is repeated three times or more to one occurrence.

    Two occurrences stay, since they may be intended: "Bora Bora", "a red square, a red square".
    Source: loops of greedy search, "a bald bald bald" (Holtzman et al., The Curious Case of Neural Text Degeneration,
    2020).
    """
    while (loop := _first_loop(text)) is not None:
        text = text[: loop[0]] + text[loop[1] :]
    return text


def picture_of(text: str, limits: Limits) -> str:
    """Remove "a picture of" from the start, since a screen reader announces "image" anyway.

    What carries information stays: "a drawing of", "a black and white photo of".
    Source: W3C WAI, Images Tutorial, Tips and Tricks.
    """
    while prefix := _PICTURE_OF.match(text):
        if not text[prefix.end() :].strip(" .") or any(quote in prefix.group() for quote in '"“«「'):
            break
        text = text[prefix.end() :]
    return text


def capital(text: str, limits: Limits) -> str:
    """Capitalise the first letter, except of names such as "iPhone" and of visible text in quotes.

    Source: alt text is read as a sentence (W3C WAI, Images Tutorial, Tips and Tricks: punctuation makes it easier to
    understand).
    """
    first = re.match(r"[^\w\"“«「]*(\w[\w'’-]*)", text)
    if first is None or first.group(1) != first.group(1).lower():
        return text
    index = first.start(1)
    letter = text[index].title()
    return text[:index] + letter + text[index + 1 :] if len(letter) == 1 else text


def shorten(text: str, limits: Limits) -> str:
    """Remove the last sentences above the soft limit; the first sentence always stays.

    Source: 125 characters are recommended for the IPTC Alt Text property, and many screen readers cannot pause or
    rewind a long text; W3C WAI asks for "the most concise description possible".
    """
    if len(text) <= limits.soft:
        return text
    ends = [end for end in _sentence_ends(text) if end <= limits.soft] or list(_sentence_ends(text))[:1]
    return text[: ends[-1]] if ends else text


def hard_limit(text: str, limits: Limits) -> str:
    """Cut a text at the hard limit: at the end of a clause, or else of a word, leaving room for a full stop.

    A word or visible text in quotes is split only when there is no other position.
    Source: publishing systems refuse or truncate longer texts: 250 characters for the IPTC property, 255 in Wagtail.
    """
    if len(text) + len(_missing_stop(text)) <= limits.hard:
        return text
    room = max(1, limits.hard - 1)
    shortened = text[: _cut_position(text, room)].rstrip(_LOOSE_END)
    while dangling := _DANGLING.search(shortened):
        shortened = shortened[: dangling.start()].rstrip(_LOOSE_END)
    return shortened or text[:room]


def full_stop(text: str, limits: Limits) -> str:
    """End the text with the full stop of its script, unless it already ends a sentence.

    Source: a screen reader pauses at it (W3C WAI, Images Tutorial, Tips and Tricks).
    """
    stripped = text.rstrip(_LOOSE_END)
    return stripped + _missing_stop(stripped)


Rule = Callable[[str, Limits], str]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (special_tokens, spaces, repeats, picture_of, capital, shorten, hard_limit, full_stop)
}


def apply_rules(text: str, limits: Limits = Limits(), rules: Sequence[str] = tuple(RULES)) -> tuple[str, list[str]]:
    """Return the alt text of a caption, and the names of the rules that changed it.

    The function is idempotent. Its result is at most one character longer than the caption (the full stop), with
    `hard_limit` never longer than `limits.hard`, and empty only when the caption is blank: a rule that would remove
    the last word is not applied.
    """
    text, changed = text.strip(), set()
    previous = None
    while text and text != previous:  # one rule's change may enable another: repeat until nothing changes
        previous = text
        for name in rules:
            result = RULES[name](text, limits)
            if result != text and _keeps_words(text, result, name):
                text = result
                changed.add(name)
    return text, [name for name in RULES if name in changed]


def has_words(text: str) -> bool:
    """Return whether the text holds a letter or a digit."""
    return any(character.isalnum() for character in text)


def _keeps_words(text: str, result: str, name: str) -> bool:
    return bool(result.strip()) and (name == "hard_limit" or has_words(result) or not has_words(text))


def _outside_quotes(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the parts of the text that are not in double quotes."""
    parts, position = [], 0
    for quoted in QUOTED.finditer(text):
        parts += [change(text[position : quoted.start()]), quoted.group()]
        position = quoted.end()
    return "".join([*parts, change(text[position:])])


def _first_loop(text: str) -> tuple[int, int] | None:
    """Return the span to remove from the first loop: all rounds but the first, and a truncated last one."""
    tokens = list(_TOKEN.finditer(text))
    words = [token.group().casefold() for token in tokens]
    for size in range(1, _MAX_PHRASE + 1):
        for first in range(len(words) - 3 * size + 1):
            last = first + size
            while last < len(words) and words[last] == words[last - size]:
                last += 1
            phrase = words[first : first + size]
            if last - first < 3 * size or any(QUOTED.match(word) for word in phrase) or not _has_letters(phrase):
                continue
            if last < len(words):
                last -= (last - first) % size  # only at the end of the text an incomplete round is a truncated one
            return tokens[first + size - 1].end(), tokens[last - 1].end()
    return None


def _has_letters(words: Sequence[str]) -> bool:
    """Return whether there are letters: "11 11 11" may be visible in an image."""
    return any(character.isalpha() for word in words for character in word)


def _sentence_ends(text: str) -> Iterator[int]:
    """Yield the positions after the end of each sentence but the last."""
    quotes = [quoted.span() for quoted in QUOTED.finditer(text)]
    for stop in _SENTENCE_END.finditer(text):
        sentences = text[: stop.end()]
        in_quotes = any(start < stop.start() and stop.end() < end for start, end in quotes)
        if not in_quotes and not _ABBREVIATED.search(sentences) and has_words(sentences):
            yield len(sentences.rstrip())


def _missing_stop(text: str) -> str:
    if not text or _ENDED.search(text):
        return ""
    letter = next((letter for letter in reversed(text) if letter.isalpha()), "a")
    return _STOPS.get(unicodedata.name(letter, "").split(" ")[0], ".")


def _cut_position(text: str, room: int) -> int:
    """Return the best position, at most `room`, at which to cut the text."""
    quotes = [quoted.span() for quoted in QUOTED.finditer(text)]

    def unquoted(positions: list[int]) -> list[int]:
        return [position for position in positions if not any(start < position < end for start, end in quotes)]

    clauses = unquoted([clause.start() for clause in _CLAUSE_END.finditer(text, 0, room + 1)])
    words = [space.start() for space in re.finditer(r"\s", text[: room + 1])]
    for positions in ([position for position in clauses if position >= room / 2], unquoted(words), words):
        if positions and text[: positions[-1]].strip(_LOOSE_END):
            return positions[-1]
    position = room
    while position > 1 and (unicodedata.combining(text[position]) or "\u200d" in text[position - 1 : position + 1]):
        position -= 1  # do not split a character from its combining marks
    return position
