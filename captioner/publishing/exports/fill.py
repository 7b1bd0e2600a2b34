"""Filling missing alt texts into the source of pages: HTML and Markdown.

A page is never written anew: texts are put in at places found by `html.parser` and patterns; every other byte stays.
Only a missing alt is filled. `alt=""` says that somebody took the picture for decorative, any other alt is a person's.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser

TextOf = Callable[[str], str | None]  # src -> the alt text, "" for a decorative picture, None: leave as it is

# Attributes by which a person has said what a picture is for, or that it is nothing.
_SAID_OTHERWISE = ("alt", "aria-label", "aria-labelledby", "aria-hidden", "role")
_RAW_TEXT = ("textarea", "title", "xmp", "iframe", "noembed", "noframes", "plaintext")  # tags in them are text
_FENCE = re.compile(r"^[ >]*(```+|~~~+)", re.M)
_INDENTED = re.compile(r"(?:\A|\n[ \t]*\n)((?:(?: {4}|\t)[^\n]*(?:\n|\Z))+)")
_INLINE_CODE = re.compile(r"(?<![`\\])(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.S)
_NOT_MARKDOWN = re.compile(r"<!--.*?-->|<(pre|script|style|textarea)\b.*?</\1>", re.S | re.I)
_MARKDOWN_IMAGE = re.compile(r"(?<!\\)!\[\]\(\s*(<[^<>\n]*>|[^\s<>()]*(?:\([^\s()]*\)[^\s()]*)*)")
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>&])")


class PageError(ValueError):
    """A page that cannot be filled: its source cannot be read with certainty."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A picture without an alt text. `place`: where in the page's text the alt goes."""

    place: int
    src: str
    markdown: bool = False


def decode(data: bytes) -> tuple[str, str]:
    """The page as text and the encoding that gives the same bytes back. Raises PageError where it is none of text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise PageError("it is no text in UTF-8 or an 8-bit encoding; save it as UTF-8")
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"  # one character a byte, whatever its encoding is


def find_gaps(text: str, markdown: bool) -> list[Gap]:
    """Pictures without alt, in order. Raises PageError where the HTML ends within a tag or comment."""
    gaps = []
    if markdown:
        text = _without_code(text)
        gaps = [
            Gap(found.start() + 2, html.unescape(found.group(1).strip("<>")), True)
            for found in _MARKDOWN_IMAGE.finditer(_NOT_MARKDOWN.sub(lambda found: _blank(found.group()), text))
            if found.group(1)
        ]
    finder = _Finder(text)
    return sorted([*gaps, *finder.gaps], key=lambda gap: gap.place)


def filled(text: str, gaps: list[Gap], text_of: TextOf, encoding: str) -> tuple[str, list[tuple[Gap, str]]]:
    """The page with what `text_of` knows put in, and what was put in."""
    done = [(gap, found) for gap in gaps if (found := text_of(gap.src)) is not None and (found or not gap.markdown)]
    for gap, alt in reversed(done):
        text = text[: gap.place] + _insertion(gap, alt, encoding) + text[gap.place :]
    return text, done


def _insertion(gap: Gap, alt: str, encoding: str) -> str:
    alt = " ".join(alt.split())
    made = _MARKDOWN_SPECIAL.sub(r"\\\1", alt) if gap.markdown else f' alt="{html.escape(alt)}"'
    if encoding == "utf-8":
        return made
    return made.encode("ascii", "xmlcharrefreplace").decode()


def _without_code(text: str) -> str:
    """Markdown with its code blanked out, of the same length."""
    for start, end in _fenced(text):
        text = text[:start] + _blank(text[start:end]) + text[end:]
    text = _INDENTED.sub(lambda found: text[found.start() : found.start(1)] + _blank(found.group(1)), text)
    return _INLINE_CODE.sub(lambda found: _blank(found.group()), text)


def _fenced(text: str) -> Iterator[tuple[int, int]]:
    opened: re.Match[str] | None = None
    for found in _FENCE.finditer(text):
        if opened is None:
            opened = found
        elif found.group(1).startswith(opened.group(1)):
            yield opened.start(), found.end()
            opened = None
    if opened is not None:
        yield opened.start(), len(text)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


class _Finder(HTMLParser):
    """Collects the <img> tags that have no alt."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.gaps: list[Gap] = []
        self._raw: str | None = None  # the element whose content is text
        self._source = text
        self._lines = [0, *(found.end() for found in re.finditer("\n", text))]
        try:
            self.feed(text)
            rest = self.rawdata
            self.close()
        except AssertionError as error:  # html.parser's own, of a damaged declaration
            raise PageError(f"it does not parse as HTML: {error}") from None
        if re.match(r"<[a-zA-Z!/?]", rest):
            line = text[: len(text) - len(rest)].count("\n") + 1
            raise PageError(f"it does not parse as HTML: a tag or comment on line {line} has no end")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._raw is None and tag in _RAW_TEXT:
            self._raw = tag
        elif self._raw is None and tag == "img":
            self._found(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._raw is None and tag == "img":
            self._found(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._raw:
            self._raw = None

    def _found(self, attributes: dict[str, str | None]) -> None:
        line, column = self.getpos()
        place = self._lines[line - 1] + column + len("<img")
        src = attributes.get("src")
        if src and not any(name in attributes for name in _SAID_OTHERWISE):
            assert self._source[place - 4 : place].lower() == "<img"
            self.gaps.append(Gap(place, src))
