"""XMP as bytes: what a packet says, and putting our fields into it without touching anything else.

A packet is never written anew: our own block is put in before the end of rdf:RDF, and what an earlier export of ours
left is taken out, by byte positions. A document type declaration is refused, and with it every entity bomb.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"
PHOTOSHOP = "http://ns.adobe.com/photoshop/1.0/"
OWN = "urn:captioner:xmp:1.0#"
ALT_TEXT, EXTENDED = f"{IPTC} AltTextAccessibility", f"{IPTC} ExtDescrAccessibility"
CAPTION_WRITER = f"{PHOTOSHOP} CaptionWriter"
_PREFIXES = {"Iptc4xmpCore": IPTC, "photoshop": PHOTOSHOP, "captioner": OWN}
_LANG = "http://www.w3.org/XML/1998/namespace lang"
_MAX_BYTES = 16_000_000
_NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_START_TAG = re.compile(rb"""<[^>"']*(?:"[^"]*"[^>"']*|'[^']*'[^>"']*)*>""")
_NEW = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
    b' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
    b" </rdf:RDF>\n"
    b'</x:xmpmeta>\n<?xpacket end="w"?>\n'
)


class XmpError(ValueError):
    """A packet that cannot be read, or not be added to."""


@dataclass
class Property:
    """One property of a picture. `name`: namespace and local name with a space between. `values`: text by language; ""
    where it has none. `start`, `end`: bytes of its element, or of its attribute."""

    name: str
    start: int
    end: int = 0
    values: dict[str, str] = field(default_factory=dict)


@dataclass
class Description:
    """One rdf:Description, from byte `start` to `end`, with its properties."""

    start: int
    end: int = 0
    properties: list[Property] = field(default_factory=list)


@dataclass
class Packet:
    """What an XMP packet says. `rdf_end`: where the end tag of rdf:RDF begins."""

    data: bytes
    descriptions: list[Description] = field(default_factory=list)
    about: str = ""
    rdf_end: int = 0

    def find(self, name: str) -> Property | None:
        return next((p for one in self.descriptions for p in one.properties if p.name == name), None)

    def value(self, name: str) -> str | None:
        """The text of a property, x-default of one with languages."""
        found = self.find(name)
        return None if found is None else found.values.get("x-default", next(iter(found.values.values()), ""))

    def texts(self, name: str) -> set[str]:
        """What a property says, in whatever language."""
        found = self.find(name)
        return set() if found is None else {text for text in found.values.values() if text}

    def own(self, name: str) -> str | None:
        """A field of our own namespace."""
        return self.value(f"{OWN} {name}")


def parse(data: bytes) -> Packet:
    """Raises XmpError saying what is wrong."""
    if len(data) > _MAX_BYTES:
        raise XmpError(f"larger than {_MAX_BYTES:,} bytes")
    reader = _Reader(data)
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise XmpError(f"not well-formed XML: {error}") from None
    if not reader.packet.rdf_end:
        raise XmpError("no XMP: it has no rdf:RDF to add to")
    return reader.packet


EMPTY = Packet(_NEW, rdf_end=_NEW.index(b"</rdf:RDF>"))


def without(packet: Packet, names: Iterable[str]) -> Packet:
    """The packet without these properties; a description that held nothing else goes as well."""
    gone = set(names)
    cuts = []
    for one in packet.descriptions:
        mine = [found for found in one.properties if found.name in gone]
        whole = bool(mine) and len(mine) == len(one.properties)
        cuts += [(one.start, one.end)] if whole else [(found.start, found.end) for found in mine]
    data = packet.data
    for start, end in sorted(cuts, reverse=True):
        data = data[: _line_start(data, start)] + data[end:]
    return parse(data)


def with_block(packet: Packet, texts: Mapping[str, Mapping[str, str]], fields: Mapping[str, str]) -> bytes:
    """The packet with one more rdf:Description. `texts`: rdf:Alt properties, text by language. `fields`: simple ones.
    Names are qualified: "photoshop:CaptionWriter"."""
    lines = [f"<rdf:Description rdf:about={quoteattr(packet.about)}", f'   xmlns:rdf="{RDF}"']
    lines += [f'   xmlns:{prefix}="{uri}"' for prefix, uri in _PREFIXES.items()]
    lines[-1] += ">"
    for name, by_language in texts.items():
        items = [f'     <rdf:li xml:lang="{lang}">{_text(text)}</rdf:li>' for lang, text in by_language.items()]
        lines += [f"   <{name}>", "    <rdf:Alt>", *items, "    </rdf:Alt>", f"   </{name}>"]
    lines += [f"   <{name}>{_text(value)}</{name}>" for name, value in fields.items()]
    block = "\n  ".join(["", *lines, "</rdf:Description>"]).encode() + b"\n "
    place = packet.rdf_end
    return packet.data[:place].rstrip(b" \t\r\n") + block + packet.data[place:]


def _text(value: str) -> str:
    return escape(_NOT_IN_XML.sub("", value))


def _line_start(data: bytes, place: int) -> int:
    """Back over the indentation and the line break before `place`."""
    while place and data[place - 1 : place] in (b" ", b"\t"):
        place -= 1
    return place - 1 if place and data[place - 1 : place] == b"\n" else place


class _Reader:
    """Collects descriptions and their properties with byte positions."""

    def __init__(self, data: bytes) -> None:
        self.packet = Packet(data)
        self._data = data
        self._path: list[str] = []
        self._starts: list[int] = []
        self._language = ""
        self._prefixes: dict[str, str] = {}
        self.parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = _refuse("it has a document type declaration, which XMP has not")
        parser.XmlDeclHandler = _check_encoding
        parser.StartNamespaceDeclHandler = self._declare
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text

    def _declare(self, prefix: str | None, uri: str) -> None:
        if prefix and uri:
            self._prefixes[prefix] = uri

    @property
    def _in_description(self) -> int:
        """How deep inside a description of the packet's top level; 0 where outside."""
        description = f"{RDF} Description"
        if len(self._path) >= 2 and f"{RDF} RDF" in self._path:
            top = self._path.index(f"{RDF} RDF") + 1
            if len(self._path) > top and self._path[top] == description:
                return len(self._path) - top
        return 0

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        place = self.parser.CurrentByteIndex
        depth_before = self._in_description
        self._path.append(name)
        self._starts.append(place)
        if self._in_description == 1 and not depth_before:
            self.packet.about = self.packet.about or attributes.get(f"{RDF} about", attributes.get("about", ""))
            self.packet.descriptions.append(Description(place))
            self.packet.descriptions[-1].properties += self._attributes(place, attributes)
        elif self._in_description == 2:
            self.packet.descriptions[-1].properties.append(Property(name, place))
            self._language = attributes.get(_LANG, "")
        elif self._in_description > 2:
            self._language = attributes.get(_LANG, self._language)

    def _attributes(self, place: int, attributes: dict[str, str]) -> list[Property]:
        tag = _START_TAG.match(self._data, place)
        found = []
        for name, value in attributes.items():
            uri, _, local = name.rpartition(" ")
            if uri in ("", RDF):
                continue
            prefixes = "|".join(re.escape(prefix) for prefix, bound in self._prefixes.items() if bound == uri)
            pattern = rf"\s(?:{prefixes}):{re.escape(local)}\s*=\s*(?:\"[^\"]*\"|'[^']*')".encode()
            where = re.compile(pattern).search(tag.group()) if tag else None
            if where:
                found.append(Property(name, place + where.start(), place + where.end(), {"": value}))
        return found

    def _end(self, name: str) -> None:
        end = self._end_of_element()
        if self._in_description == 1:
            self.packet.descriptions[-1].end = end
        elif self._in_description == 2:
            self.packet.descriptions[-1].properties[-1].end = end
        elif self._in_description > 2:
            self._language = ""
        if name == f"{RDF} RDF" and end > self.parser.CurrentByteIndex:
            self.packet.rdf_end = self.parser.CurrentByteIndex
        self._path.pop()

    def _end_of_element(self) -> int:
        """Behind the element that ends here. Of <a/> expat tells that place, of <a></a> where the end tag begins."""
        place = self.parser.CurrentByteIndex
        start = self._starts.pop()
        tag = _START_TAG.match(self._data, start)
        if tag and tag.group().endswith(b"/>"):
            return tag.end()
        return self._data.index(b">", place) + 1

    def _text(self, text: str) -> None:
        if self._in_description == 2 or (self._in_description > 2 and self._path[-1] == f"{RDF} li"):
            values = self.packet.descriptions[-1].properties[-1].values
            if text.strip() or self._language in values:
                values[self._language] = values.get(self._language, "") + text


def _refuse(reason: str) -> Callable[..., None]:
    def handler(*_: Any) -> None:
        raise XmpError(reason)

    return handler


def _check_encoding(version: str, encoding: str | None, standalone: int) -> None:
    if encoding is not None and encoding.lower() not in ("utf-8", "us-ascii", "ascii"):
        raise XmpError(f"it is written in {encoding}; XMP sidecars are UTF-8")
