"""Read the descriptions that people have written into an image file: XMP, IPTC-IIM and EXIF.

They are shown to reviewers. Damaged metadata is ignored, and no file is changed.
"""

from __future__ import annotations

import contextlib
from xml.etree import ElementTree

from PIL import IptcImagePlugin
from PIL.ImageFile import ImageFile

from captioner.console.text import printable
from captioner.imaging.formats import identify
from captioner.imaging.pillow import ImageError, decoding

_MAX_LENGTH = 2_000
_MAX_XMP = 1_000_000
_EXIF_IMAGE_DESCRIPTION = 0x010E
_IPTC_CAPTION = (2, 120)
_TIFF_XMP = 700

_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
# IPTC Photo Metadata Standard 2021.1 (alt text, extended description); Dublin Core in XMP, ISO 16684-1.
_IPTC_CORE = "{http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/}"
_XMP_PROPERTIES = {
    "XMP alt text": f"{_IPTC_CORE}AltTextAccessibility",
    "XMP extended description": f"{_IPTC_CORE}ExtDescrAccessibility",
    "XMP description": "{http://purl.org/dc/elements/1.1/}description",
}


def descriptions_of(data: bytes, max_pixels: int) -> dict[str, str]:
    """Return the descriptions in the file by field, each as one line, without empty ones and damaged metadata.

    XMP: alt text, extended description, description; IPTC caption; EXIF and PNG description.
    """
    descriptions: dict[str, str] = {}
    try:
        with decoding(max_pixels):
            file = identify(data)
            for read in (_from_xmp, _from_iptc, _from_exif, _from_png_text):
                with contextlib.suppress(Exception):
                    descriptions |= read(file)
    except ImageError:
        return {}
    lines = {field: printable(text).strip()[:_MAX_LENGTH] for field, text in descriptions.items()}
    return {field: line for field, line in lines.items() if line}


def _from_xmp(file: ImageFile) -> dict[str, str]:
    packet = file.info.get("xmp") or getattr(file, "tag_v2", {}).get(_TIFF_XMP) or b""
    data = packet.encode() if isinstance(packet, str) else bytes(packet)
    if len(data) > _MAX_XMP or b"<!DOCTYPE" in data or b"<!ENTITY" in data:  # XMP has none; entities can explode
        return {}
    root = ElementTree.fromstring(data.strip(b"\0 \r\n\t"))
    texts = {field: _language_alternative(root, name) for field, name in _XMP_PROPERTIES.items()}
    return {field: text for field, text in texts.items() if text}


def _language_alternative(root: ElementTree.Element, name: str) -> str:
    """Return the text of an XMP property in the default language, else in the first."""
    for element in root.iter(name):
        items = list(element.iter(f"{_RDF}li"))
        default = [item for item in items if item.get(_XML_LANG) == "x-default"]
        chosen = (default or items or [element])[0]
        return chosen.text or ""
    for holder in root.iter(f"{_RDF}Description"):
        if name in holder.attrib:
            return holder.attrib[name]
    return ""


def _from_iptc(file: ImageFile) -> dict[str, str]:
    value = (IptcImagePlugin.getiptcinfo(file) or {}).get(_IPTC_CAPTION, b"")
    return {"IPTC caption": _decoded(value[0] if isinstance(value, list) else value)}


def _from_exif(file: ImageFile) -> dict[str, str]:
    value = file.getexif().get(_EXIF_IMAGE_DESCRIPTION, "")
    return {"EXIF description": value if isinstance(value, str) else _decoded(value)}


def _from_png_text(file: ImageFile) -> dict[str, str]:
    value = file.info.get("Description") if file.format == "PNG" else None
    return {"PNG description": str(value or "")}


def _decoded(data: bytes) -> str:
    """Decode a text as UTF-8, else as Latin-1: the encoding that IPTC-IIM and EXIF name is often missing or wrong."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
