"""XMP sidecars: alt text and extended description where IPTC put them, so that WordPress, Craft and others find them.

Never DigitalSourceType: it would call the photograph itself machine-made. A text that somebody else put into a sidecar
stays, and so does every other field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner.errors import SourceError
from captioner.publishing.alt_text.rules import Limits, apply_rules
from captioner.publishing.alt_text.schemas import UNREVIEWED
from captioner.publishing.exports.context import Export
from captioner.publishing.exports.destination import inside, new_folder, put, require_export, write_new
from captioner.publishing.exports.select import Tally, provenance, writer_of
from captioner.publishing.exports.suffixes import beside
from captioner.publishing.exports.xmp_packet import (
    ALT_TEXT,
    CAPTION_WRITER,
    EMPTY,
    EXTENDED,
    OWN,
    Packet,
    XmpError,
    parse,
    with_block,
    without,
)

_FIELDS = {  # of provenance -> in our own namespace
    "review_status": "Status",
    "text_by": "TextBy",
    "reviewer": "Reviewer",
    "reviewed_at": "ReviewedAt",
    "model": "Model",
    "model_revision": "ModelRevision",
    "model_sha256": "ModelSha256",
    "training_run_id": "TrainingRunId",
    "run_id": "RunId",
    "created_at": "CaptionedAt",
}
_OWN_NAMES = [f"{OWN} {name}" for name in ("ImageId", "Text", "Extended", "Writer", *_FIELDS.values())]
_WITHOUT_LIMITS = Limits(10**9, 10**9)

PlaceOf = Callable[[dict[str, Any]], Path]


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """A sidecar for each picture: in DEST under the name of its image id, or with --beside-originals next to it."""
    if export.settings.beside_originals:
        _write_all(texts, export, sidecar_of_original, put)
    elif export.dest.exists():  # other fields may have been added to its sidecars: they are refreshed one by one
        require_export(export.dest, "xmp")
        _write_all(texts, export, sidecar_in(export.dest), put)
    else:
        with new_folder(export.dest, export.record) as folder:
            _write_all(texts, export, sidecar_in(folder), write_new)


def _write_all(
    texts: Iterator[pa.Table], export: Export, place_of: PlaceOf, store: Callable[[Path, bytes], None]
) -> None:
    for rows in texts:
        for row in rows.to_pylist():
            try:
                path = place_of(row)
                before = path.read_bytes() if path.exists() else None
                after = merged(before, row, export.settings.automatic_mark, export.settings.update)
                if after != before:
                    store(path, after)
            except (XmpError, SourceError) as error:
                export.tally.leave_out(row, str(error))
    for rows in export.refused() if export.settings.update else ():
        for row in rows.to_pylist():
            _withdraw(row, place_of, export.tally)


def sidecar_in(folder: Path) -> PlaceOf:
    """Sidecars named after the image ids."""
    return lambda row: folder / beside(inside(row["image_id"]), ".xmp")


def sidecar_of_original(row: dict[str, Any]) -> Path:
    """The sidecar next to a picture: cat.jpg.xmp where that is there already, else cat.xmp.

    Raises SourceError where the picture is no file of its own on this disk.
    """
    picture = Path(row["uri"])
    if not picture.is_file():
        raise SourceError("there is no such file on this disk to put a sidecar beside")
    full = picture.with_name(f"{picture.name}.xmp")
    return full if full.exists() else beside(picture, ".xmp")


def merged(existing: bytes | None, row: dict[str, Any], mark: str, update: bool) -> bytes:
    """A sidecar with the text of `row` and everything it held before.

    Raises XmpError where it cannot be read, holds a text that is not ours, or one of ours and not `update`.
    """
    packet = EMPTY
    if existing is not None:
        packet = parse(existing)
        _require_free(packet, row["image_id"], update)
        packet = without(packet, _ours(packet))
    languages = ["x-default", *([row["language"]] if row["language"] else [])]
    texts = {"Iptc4xmpCore:AltTextAccessibility": dict.fromkeys(languages, row["alt_text"])}
    fields = {"captioner:ImageId": row["image_id"], "captioner:Text": row["alt_text"]}
    extended = extended_description(row, mark)
    if extended and not packet.value(EXTENDED):
        texts["Iptc4xmpCore:ExtDescrAccessibility"] = dict.fromkeys(languages, extended)
        fields["captioner:Extended"] = extended
    fields["captioner:Writer"] = writer_of(row)
    if not packet.value(CAPTION_WRITER):
        fields["photoshop:CaptionWriter"] = writer_of(row)
    origin = provenance(row)
    fields |= {f"captioner:{name}": str(origin[key]) for key, name in _FIELDS.items() if origin[key] is not None}
    return with_block(packet, texts, fields)


def extended_description(row: dict[str, Any], mark: str) -> str | None:
    """The whole caption, marked as automatic, where the alt text is a shortened one that nobody has reviewed. What a
    person let pass is the alt text, not the rest."""
    if row["review_status"] != UNREVIEWED:
        return None
    whole, _ = apply_rules(row["caption"], _WITHOUT_LIMITS)
    whole = f"{whole} {mark}"
    return whole if len(whole) > len(row["alt_text"]) else None


def _require_free(packet: Packet, image_id: str, update: bool) -> None:
    own = packet.own("Text")
    if not packet.texts(ALT_TEXT) <= {own}:
        raise XmpError("its sidecar holds a text by somebody else")
    if own is not None and packet.own("ImageId") != image_id:
        raise XmpError(f"its sidecar is that of {packet.own('ImageId')}")
    if own is not None and not update:
        raise XmpError("its sidecar is of an earlier export (--update refreshes it)")


def _ours(packet: Packet) -> list[str]:
    """Names of the properties that an earlier export wrote and nobody has changed since."""
    found = list(_OWN_NAMES)
    for name, recorded in ((ALT_TEXT, "Text"), (EXTENDED, "Extended"), (CAPTION_WRITER, "Writer")):
        if packet.texts(name) <= {packet.own(recorded)}:
            found.append(name)
    return found


def _withdraw(row: dict[str, Any], place_of: PlaceOf, tally: Tally) -> None:
    """Take an earlier export of a text back that is no longer published."""
    try:
        path = place_of(row)
        if not path.exists():
            return
        packet = parse(path.read_bytes())
        if packet.own("ImageId") != row["image_id"]:
            return
        rest = without(packet, _ours(packet))
    except (XmpError, SourceError):
        return  # nothing of ours can be there
    if any(one.properties for one in rest.descriptions):
        put(path, rest.data)
    else:
        path.unlink()
    tally.withdrawn += 1
