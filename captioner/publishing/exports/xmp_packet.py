"""Parse XMP packets, and add or remove our properties without changing any other byte.

Packets are not serialised again: our own block is inserted before the end of rdf:RDF, and the properties of an earlier
export are cut out by byte positions. A document type declaration is refused, which excludes entity expansion attacks.
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
    """Raised for a packet that cannot be parsed, or to which our text cannot be added."""


@dataclass
class Property:
    """One property of an image.

    `name`: namespace and local name, separated by a space. `values`: text by language, "" for a text without one.
    `start`, `end`: byte range of its element or attribute.
    """

    name: str
    start: int
    end: int = 0
    values: dict[str, str] = field(default_factory=dict)


@dataclass
class Description:
    """One rdf:Description, from byte `start` to byte `end`, with its properties."""

    start: int
    end: int = 0
    properties: list[Property] = field(default_factory=list)


@dataclass
class Packet:
    """A parsed XMP packet. `rdf_end`: the byte position of the end tag of rdf:RDF."""

    data: bytes
    descriptions: list[Description] = field(default_factory=list)
    about: str = ""
    rdf_end: int = 0

    def find(self, name: str) -> Property | None:
        """Return the first property of that name."""
        properties = (property_ for description in self.descriptions for property_ in description.properties)
        return next((property_ for property_ in properties if property_.name == name), None)

    def value(self, name: str) -> str | None:
        """Return the text of a property: its x-default text when it has several languages."""
        property_ = self.find(name)
        if property_ is None:
            return None
        return property_.values.get("x-default", next(iter(property_.values.values()), ""))

    def texts(self, name: str) -> set[str]:
        """Return the texts of a property in all languages."""
        property_ = self.find(name)
        return set() if property_ is None else {text for text in property_.values.values() if text}

    def own_field(self, name: str) -> str | None:
        """Return the value of a property in our own namespace."""
        return self.value(f"{OWN} {name}")


def parse(data: bytes) -> Packet:
    """Parse an XMP packet. Raises XmpError with the reason when that is not possible."""
    if len(data) > _MAX_BYTES:
        raise XmpError(f"larger than {_MAX_BYTES:,} bytes")
    reader = _Reader(data)
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise XmpError(f"not well-formed XML: {error}") from None
    if not reader.packet.rdf_end:
        raise XmpError("not XMP: it has no rdf:RDF element")
    return reader.packet


EMPTY = Packet(_NEW, rdf_end=_NEW.index(b"</rdf:RDF>"))


def remove_properties(packet: Packet, names: Iterable[str]) -> Packet:
    """Return the packet without these properties, and without descriptions that held nothing else."""
    names = set(names)
    cuts = []
    for description in packet.descriptions:
        removed = [property_ for property_ in description.properties if property_.name in names]
        if removed and len(removed) == len(description.properties):
            cuts.append((description.start, description.end))
        else:
            cuts += [(property_.start, property_.end) for property_ in removed]
    data = packet.data
    for start, end in sorted(cuts, reverse=True):
        data = data[: _line_start(data, start)] + data[end:]
    return parse(data)


def add_description(packet: Packet, texts: Mapping[str, Mapping[str, str]], fields: Mapping[str, str]) -> bytes:
    """Return the packet with one more rdf:Description.

    `texts`: rdf:Alt properties, text by language. `fields`: simple properties. Names are qualified, such as
    "photoshop:CaptionWriter".
    """
    lines = [f"<rdf:Description rdf:about={quoteattr(packet.about)}", f'   xmlns:rdf="{RDF}"']
    lines += [f'   xmlns:{prefix}="{uri}"' for prefix, uri in _PREFIXES.items()]
    lines[-1] += ">"
    for name, by_language in texts.items():
        items = [f'     <rdf:li xml:lang="{lang}">{_text(text)}</rdf:li>' for lang, text in by_language.items()]
        lines += [f"   <{name}>", "    <rdf:Alt>", *items, "    </rdf:Alt>", f"   </{name}>"]
    lines += [f"   <{name}>{_text(value)}</{name}>" for name, value in fields.items()]
    block = "\n  ".join(["", *lines, "</rdf:Description>"]).encode() + b"\n "
    position = packet.rdf_end
    return packet.data[:position].rstrip(b" \t\r\n") + block + packet.data[position:]


def _text(value: str) -> str:
    return escape(_NOT_IN_XML.sub("", value))


def _line_start(data: bytes, position: int) -> int:
    """Return the position before the indentation and the line break that precede `position`."""
    while position and data[position - 1 : position] in (b" ", b"\t"):
        position -= 1
    return position - 1 if position and data[position - 1 : position] == b"\n" else position


class _Reader:
    """Collects the descriptions of a packet and their properties with byte positions."""

    def __init__(self, data: bytes) -> None:
        self.packet = Packet(data)
        self._data = data
        self._path: list[str] = []
        self._starts: list[int] = []
        self._language = ""
        self._prefixes: dict[str, str] = {}
        self.parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = _refuse("it has a document type declaration, which XMP does not allow")
        parser.XmlDeclHandler = _check_encoding
        parser.StartNamespaceDeclHandler = self._declare
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text

    def _declare(self, prefix: str | None, uri: str) -> None:
        if prefix and uri:
            self._prefixes[prefix] = uri

    @property
    def _depth_in_description(self) -> int:
        """The depth inside a top-level description; 0 outside of one."""
        description = f"{RDF} Description"
        if len(self._path) >= 2 and f"{RDF} RDF" in self._path:
            top = self._path.index(f"{RDF} RDF") + 1
            if len(self._path) > top and self._path[top] == description:
                return len(self._path) - top
        return 0

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        position = self.parser.CurrentByteIndex
        depth_before = self._depth_in_description
        self._path.append(name)
        self._starts.append(position)
        if self._depth_in_description == 1 and not depth_before:
            self.packet.about = self.packet.about or attributes.get(f"{RDF} about", attributes.get("about", ""))
            self.packet.descriptions.append(Description(position))
            self.packet.descriptions[-1].properties += self._attributes(position, attributes)
        elif self._depth_in_description == 2:
            self.packet.descriptions[-1].properties.append(Property(name, position))
            self._language = attributes.get(_LANG, "")
        elif self._depth_in_description > 2:
            self._language = attributes.get(_LANG, self._language)

    def _attributes(self, position: int, attributes: dict[str, str]) -> list[Property]:
        tag = _START_TAG.match(self._data, position)
        properties = []
        for name, value in attributes.items():
            uri, _, local = name.rpartition(" ")
            if uri in ("", RDF):
                continue
            prefixes = "|".join(re.escape(prefix) for prefix, bound in self._prefixes.items() if bound == uri)
            pattern = rf"\s(?:{prefixes}):{re.escape(local)}\s*=\s*(?:\"[^\"]*\"|'[^']*')".encode()
            match = re.compile(pattern).search(tag.group()) if tag else None
            if match:
                properties.append(Property(name, position + match.start(), position + match.end(), {"": value}))
        return properties

    def _end(self, name: str) -> None:
        end = self._end_of_element()
        if self._depth_in_description == 1:
            self.packet.descriptions[-1].end = end
        elif self._depth_in_description == 2:
            self.packet.descriptions[-1].properties[-1].end = end
        elif self._depth_in_description > 2:
            self._language = ""
        if name == f"{RDF} RDF" and end > self.parser.CurrentByteIndex:
            self.packet.rdf_end = self.parser.CurrentByteIndex
        self._path.pop()

    def _end_of_element(self) -> int:
        """Return the position after the element that ends here.

        Expat's current position is that one for <a/>, but the start of the end tag for <a></a>.
        """
        position = self.parser.CurrentByteIndex
        start = self._starts.pop()
        tag = _START_TAG.match(self._data, start)
        if tag and tag.group().endswith(b"/>"):
            return tag.end()
        return self._data.index(b">", position) + 1

    def _text(self, text: str) -> None:
        if self._depth_in_description == 2 or (self._depth_in_description > 2 and self._path[-1] == f"{RDF} li"):
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
