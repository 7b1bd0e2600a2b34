"""Fill missing alt texts into the source of HTML and Markdown pages.

Pages are not reformatted: texts are inserted at positions found by `html.parser` and regular expressions, and every
other byte stays. Only a missing alt is filled: `alt=""` means that an author considers the image decorative, and any
other alt was written by a person.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser

TextOf = Callable[[str], str | None]  # src -> the alt text, "" for a decorative image, None: leave as it is

# Attributes with which an author has already described an image or marked it as decorative.
_DESCRIBING_ATTRIBUTES = ("alt", "aria-label", "aria-labelledby", "aria-hidden", "role")
_RAW_TEXT = ("textarea", "title", "xmp", "iframe", "noembed", "noframes", "plaintext")  # their content is text
_FENCE = re.compile(r"^[ >]*(```+|~~~+)", re.M)
_INDENTED = re.compile(r"(?:\A|\n[ \t]*\n)((?:(?: {4}|\t)[^\n]*(?:\n|\Z))+)")
_INLINE_CODE = re.compile(r"(?<![`\\])(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.S)
_NOT_MARKDOWN = re.compile(r"<!--.*?-->|<(pre|script|style|textarea)\b.*?</\1>", re.S | re.I)
_MARKDOWN_IMAGE = re.compile(r"(?<!\\)!\[\]\(\s*(<[^<>\n]*>|[^\s<>()]*(?:\([^\s()]*\)[^\s()]*)*)")
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>&])")


class PageError(ValueError):
    """Raised for a page whose source cannot be parsed reliably."""


@dataclass(frozen=True, slots=True)
class Gap:
    """An image without an alt text. `position`: the index in the page's text at which the alt is inserted."""

    position: int
    src: str
    markdown: bool = False


def decode(data: bytes) -> tuple[str, str]:
    """Return the page as text and the encoding that gives the same bytes back. Raises PageError for binary data."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data:
        raise PageError("it is not text in UTF-8 or an 8-bit encoding; save it as UTF-8")
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        return data.decode("latin-1"), "latin-1"  # maps every byte to one character, whatever the real encoding is


def find_gaps(text: str, markdown: bool) -> list[Gap]:
    """Return the images without alt, in page order. Raises PageError when the HTML ends inside a tag or comment."""
    gaps = []
    if markdown:
        text = _without_code(text)
        gaps = [
            Gap(image.start() + 2, html.unescape(image.group(1).strip("<>")), True)
            for image in _MARKDOWN_IMAGE.finditer(_NOT_MARKDOWN.sub(lambda match: _blank(match.group()), text))
            if image.group(1)
        ]
    parser = _ImageParser(text)
    return sorted([*gaps, *parser.gaps], key=lambda gap: gap.position)


def fill(text: str, gaps: list[Gap], text_of: TextOf, encoding: str) -> tuple[str, list[tuple[Gap, str]]]:
    """Return the page with the alt texts that `text_of` returns inserted, and the list of insertions."""
    filled = [(gap, alt) for gap in gaps if (alt := text_of(gap.src)) is not None and (alt or not gap.markdown)]
    for gap, alt in reversed(filled):
        text = text[: gap.position] + _insertion(gap, alt, encoding) + text[gap.position :]
    return text, filled


def _insertion(gap: Gap, alt: str, encoding: str) -> str:
    alt = " ".join(alt.split())
    insertion = _MARKDOWN_SPECIAL.sub(r"\\\1", alt) if gap.markdown else f' alt="{html.escape(alt)}"'
    if encoding == "utf-8":
        return insertion
    return insertion.encode("ascii", "xmlcharrefreplace").decode()


def _without_code(text: str) -> str:
    """Return the Markdown with its code blanked out, of the same length."""
    for start, end in _fenced(text):
        text = text[:start] + _blank(text[start:end]) + text[end:]
    text = _INDENTED.sub(lambda match: text[match.start() : match.start(1)] + _blank(match.group(1)), text)
    return _INLINE_CODE.sub(lambda match: _blank(match.group()), text)


def _fenced(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of every fenced code block."""
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence.group(1).startswith(opening.group(1)):
            yield opening.start(), fence.end()
            opening = None
    if opening is not None:
        yield opening.start(), len(text)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


class _ImageParser(HTMLParser):
    """Collects the <img> tags that have no alt."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.gaps: list[Gap] = []
        self._raw: str | None = None  # the element whose content is text
        self._source = text
        self._line_starts = [0, *(line_break.end() for line_break in re.finditer("\n", text))]
        try:
            self.feed(text)
            rest = self.rawdata
            self.close()
        except AssertionError as error:  # raised by html.parser for a damaged declaration
            raise PageError(f"it does not parse as HTML: {error}") from None
        if re.match(r"<[a-zA-Z!/?]", rest):
            line = text[: len(text) - len(rest)].count("\n") + 1
            raise PageError(f"it does not parse as HTML: a tag or comment on line {line} has no end")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._raw is None and tag in _RAW_TEXT:
            self._raw = tag
        elif self._raw is None and tag == "img":
            self._add_image(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._raw is None and tag == "img":
            self._add_image(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._raw:
            self._raw = None

    def _add_image(self, attributes: dict[str, str | None]) -> None:
        line, column = self.getpos()
        position = self._line_starts[line - 1] + column + len("<img")
        src = attributes.get("src")
        if src and not any(name in attributes for name in _DESCRIBING_ATTRIBUTES):
            assert self._source[position - 4 : position].lower() == "<img"
            self.gaps.append(Gap(position, src))
