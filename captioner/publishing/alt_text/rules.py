"""What is done to a machine caption so that it can stand as alt text: small rules, each with its source and a switch.

No rule adds a word. What stands in double quotes is visible text of the picture and left as it is, and so are names:
letters change case at the very start only. Whatever needs a person's judgement is a finding and no rule.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from captioner.console.text import printable
from captioner.scoring.terms import UNSPACED

QUOTED = re.compile(r'"[^"]*"|“[^”]*”|«[^»]*»|「[^」]*」')
_SPECIAL = re.compile(
    r"\[(?:unused\d+|unk|pad|cls|sep|mask)\]|<(?:/?s|pad|unk|bos|eos|mask|image|\|[^|>]*\|)>|\ufffd", re.I
)
_PICTURE_OF = re.compile(
    r"\W*(?:(?:this|here|there)\s+is\s+|this\s+|these\s+are\s+)?(?:an?\s+|the\s+)?"
    r"(?:image|picture|photo|photograph|pic)s?\s+"
    r"(?:of|that\s+shows?|that\s+depicts?|showing|shows?|depicting|depicts?|featuring|features?)\b[\s:,]*",
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
    """In characters. `soft` is passed where a sentence would break, `hard` never."""

    soft: int = 125
    hard: int = 250


def special_tokens(text: str, limits: Limits) -> str:
    """Drop tokens of the vocabulary that are no words, and control characters.

    Source: GIT writes [unused0] for things it has no word for (github.com/microsoft/GenerativeImage2Text, issues 19
    and 29).
    """
    text = printable(text)
    while (shorter := _SPECIAL.sub(" ", text)) != text:
        text = shorter
    return text


def spaces(text: str, limits: Limits) -> str:
    """One space between words, none before a comma or full stop.

    Source: tokenizers that decode word pieces leave "a dog , a cat ." (Hugging Face's `clean_up_tokenization_spaces`).
    """
    return _outside_quotes(text, lambda part: re.sub(r" +([,.])(?!\w)", r"\1", re.sub(r"\s+", " ", part))).strip()


def repeats(text: str, limits: Limits) -> str:
    """A word, or a phrase of up to 12 words, that stands three times in a row or more is said once. Twice may be meant:
    "Bora Bora", "a red square, a red square".

    Source: loops of greedy search, "a bald bald bald" (Holtzman et al., The Curious Case of Neural Text Degeneration,
    2020).
    """
    while (loop := _first_loop(text)) is not None:
        text = text[: loop[0]] + text[loop[1] :]
    return text


def picture_of(text: str, limits: Limits) -> str:
    """Drop "a picture of" from the start: a screen reader has said "image" already. What tells something stays: "a
    drawing of", "a black and white photo of".

    Source: W3C WAI, Images Tutorial, Tips and Tricks.
    """
    while found := _PICTURE_OF.match(text):
        if not text[found.end() :].strip(" .") or any(quote in found.group() for quote in '"“«「'):
            break
        text = text[found.end() :]
    return text


def capital(text: str, limits: Limits) -> str:
    """The first letter is a capital. "iPhone" is a name and stays, and so does what starts with visible text.

    Source: alt text is read as a sentence (W3C WAI, Images Tutorial, Tips and Tricks: punctuation makes it easier to
    understand).
    """
    first = re.match(r"[^\w\"“«「]*(\w[\w'’-]*)", text)
    if first is None or first.group(1) != first.group(1).lower():
        return text
    place = first.start(1)
    letter = text[place].title()
    return text[:place] + letter + text[place + 1 :] if len(letter) == 1 else text


def shorten(text: str, limits: Limits) -> str:
    """Above the soft limit, drop the last sentences: as many whole ones stay as fit, the first in any case.

    Source: 125 characters is the advice for the IPTC Alt Text property, and long texts cannot be paused and gone back
    in by many screen readers; W3C WAI asks for "the most concise description possible".
    """
    if len(text) <= limits.soft:
        return text
    ends = [end for end in _sentence_ends(text) if end <= limits.soft] or list(_sentence_ends(text))[:1]
    return text[: ends[-1]] if ends else text


def hard_limit(text: str, limits: Limits) -> str:
    """Cut what is longer than the hard limit, at the end of a clause, else of a word; in the middle of visible text or
    of a word only where nothing else is left. A full stop still fits.

    Source: systems that publish alt text refuse or cut it there: 250 characters for the IPTC property, 255 in Wagtail.
    """
    if len(text) + len(_missing_stop(text)) <= limits.hard:
        return text
    room = max(1, limits.hard - 1)
    cut = text[: _place_to_cut(text, room)].rstrip(_LOOSE_END)
    while found := _DANGLING.search(cut):
        cut = cut[: found.start()].rstrip(_LOOSE_END)
    return cut or text[:room]


def full_stop(text: str, limits: Limits) -> str:
    """End with a full stop, that of the script; the end of a sentence that is there stays.

    Source: a screen reader pauses at it (W3C WAI, Images Tutorial, Tips and Tricks).
    """
    kept = text.rstrip(_LOOSE_END)
    return kept + _missing_stop(kept)


Rule = Callable[[str, Limits], str]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (special_tokens, spaces, repeats, picture_of, capital, shorten, hard_limit, full_stop)
}


def apply_rules(text: str, limits: Limits = Limits(), rules: Sequence[str] = tuple(RULES)) -> tuple[str, list[str]]:
    """The alt text of a caption, and the names of the rules that changed something.

    Applied to its own answer it changes nothing. The answer is at most one character, the full stop, longer than the
    caption; with `hard_limit` never longer than `limits.hard`; and empty only where the caption is blank: a rule that
    would take the last word is passed over.
    """
    text, changed = text.strip(), set()
    before = None
    while text and text != before:  # what one rule leaves may be another's to change: until none changes anything
        before = text
        for name in rules:
            made = RULES[name](text, limits)
            if made != text and _keeps_something(text, made, name):
                text = made
                changed.add(name)
    return text, [name for name in RULES if name in changed]


def has_words(text: str) -> bool:
    return any(letter.isalnum() for letter in text)


def _keeps_something(text: str, made: str, name: str) -> bool:
    return bool(made.strip()) and (name == "hard_limit" or has_words(made) or not has_words(text))


def _outside_quotes(text: str, change: Callable[[str], str]) -> str:
    made, place = [], 0
    for quoted in QUOTED.finditer(text):
        made += [change(text[place : quoted.start()]), quoted.group()]
        place = quoted.end()
    return "".join([*made, change(text[place:])])


def _first_loop(text: str) -> tuple[int, int] | None:
    """From where to where the first loop has to go: all but its first round, and a last one that was cut off."""
    found = list(_TOKEN.finditer(text))
    words = [token.group().casefold() for token in found]
    for size in range(1, _MAX_PHRASE + 1):
        for first in range(len(words) - 3 * size + 1):
            last = first + size
            while last < len(words) and words[last] == words[last - size]:
                last += 1
            phrase = words[first : first + size]
            if last - first < 3 * size or any(QUOTED.match(word) for word in phrase) or not _has_letters(phrase):
                continue
            if last < len(words):
                last -= (last - first) % size  # a round that was cut off goes only with the end of the text
            return found[first + size - 1].end(), found[last - 1].end()
    return None


def _has_letters(words: Sequence[str]) -> bool:
    """Whether there are letters: "11 11 11" may be what a picture shows."""
    return any(letter.isalpha() for word in words for letter in word)


def _sentence_ends(text: str) -> Iterator[int]:
    """Places behind the end of a sentence, not counting that of the text."""
    quoted = [found.span() for found in QUOTED.finditer(text)]
    for found in _SENTENCE_END.finditer(text):
        inside = any(start < found.start() and found.end() < end for start, end in quoted)
        if not inside and not _ABBREVIATED.search(text[: found.end()]) and has_words(text[: found.end()]):
            yield len(text[: found.end()].rstrip())


def _missing_stop(text: str) -> str:
    if not text or _ENDED.search(text):
        return ""
    letter = next((letter for letter in reversed(text) if letter.isalpha()), "a")
    return _STOPS.get(unicodedata.name(letter, "").split(" ")[0], ".")


def _place_to_cut(text: str, room: int) -> int:
    quoted = [found.span() for found in QUOTED.finditer(text)]

    def outside(place: int) -> bool:
        return not any(start < place < end for start, end in quoted)

    clauses = [found.start() for found in _CLAUSE_END.finditer(text, 0, room + 1) if outside(found.start())]
    words = [found.start() for found in re.finditer(r"\s", text[: room + 1])]
    for places in ([place for place in clauses if place >= room / 2], [p for p in words if outside(p)], words):
        if places and text[: places[-1]].strip(_LOOSE_END):
            return places[-1]
    place = room
    while place > 1 and (unicodedata.combining(text[place]) or "\u200d" in text[place - 1 : place + 1]):
        place -= 1
    return place
