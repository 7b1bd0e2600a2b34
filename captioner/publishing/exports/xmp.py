"""Export XMP sidecars with the IPTC alt text and extended description, which WordPress, Craft and others read.

DigitalSourceType is never written: it would declare the photograph itself machine-made. Texts by others in a sidecar
stay, and so does every other field.
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
from captioner.publishing.exports.destination import new_folder, relative_path, replace_file, require_export, write_new
from captioner.publishing.exports.select import Tally, caption_writer, provenance
from captioner.publishing.exports.suffixes import with_suffix
from captioner.publishing.exports.xmp_packet import (
    ALT_TEXT,
    CAPTION_WRITER,
    EMPTY,
    EXTENDED,
    OWN,
    Packet,
    XmpError,
    add_description,
    parse,
    remove_properties,
)

_FIELDS = {  # field of the provenance -> property in our own namespace
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

SidecarPath = Callable[[dict[str, Any]], Path]


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write a sidecar for each image: in DEST, named after the image id, or with --beside-originals next to it."""
    if export.settings.beside_originals:
        _write_all(texts, export, sidecar_of_original, replace_file)
    elif export.dest.exists():  # others may have added fields to its sidecars: update them one by one
        require_export(export.dest, "xmp")
        _write_all(texts, export, sidecar_in(export.dest), replace_file)
    else:
        with new_folder(export.dest, export.record) as folder:
            _write_all(texts, export, sidecar_in(folder), write_new)


def _write_all(
    texts: Iterator[pa.Table], export: Export, path_of: SidecarPath, write_file: Callable[[Path, bytes], None]
) -> None:
    for rows in texts:
        for row in rows.to_pylist():
            try:
                path = path_of(row)
                existing = path.read_bytes() if path.exists() else None
                merged_packet = merge_text(existing, row, export.settings.automatic_mark, export.settings.update)
                if merged_packet != existing:
                    write_file(path, merged_packet)
            except (XmpError, SourceError) as error:
                export.tally.leave_out(row, str(error))
    for rows in export.unselected() if export.settings.update else ():
        for row in rows.to_pylist():
            _withdraw(row, path_of, export.tally)


def sidecar_in(folder: Path) -> SidecarPath:
    """Return a function that names sidecars in `folder` after the image ids."""
    return lambda row: folder / with_suffix(relative_path(row["image_id"]), ".xmp")


def sidecar_of_original(row: dict[str, Any]) -> Path:
    """Return the sidecar next to an image: cat.jpg.xmp when that exists, else cat.xmp.

    Raises SourceError when the image is not a file of its own on this disk.
    """
    image = Path(row["uri"])
    if not image.is_file():
        raise SourceError("there is no such file on this disk to write a sidecar for")
    full_name = image.with_name(f"{image.name}.xmp")
    return full_name if full_name.exists() else with_suffix(image, ".xmp")


def merge_text(existing: bytes | None, row: dict[str, Any], mark: str, update: bool) -> bytes:
    """Return a sidecar with the text of `row` and everything that `existing` held.

    Raises XmpError when `existing` cannot be parsed, holds a text by somebody else, or one of ours and not `update`.
    """
    packet = EMPTY
    if existing is not None:
        packet = parse(existing)
        _require_free(packet, row["image_id"], update)
        packet = remove_properties(packet, _exported_properties(packet))
    languages = ["x-default", *([row["language"]] if row["language"] else [])]
    texts = {"Iptc4xmpCore:AltTextAccessibility": dict.fromkeys(languages, row["alt_text"])}
    fields = {"captioner:ImageId": row["image_id"], "captioner:Text": row["alt_text"]}
    extended = extended_description(row, mark)
    if extended and not packet.value(EXTENDED):
        texts["Iptc4xmpCore:ExtDescrAccessibility"] = dict.fromkeys(languages, extended)
        fields["captioner:Extended"] = extended
    fields["captioner:Writer"] = caption_writer(row)
    if not packet.value(CAPTION_WRITER):
        fields["photoshop:CaptionWriter"] = caption_writer(row)
    origin = provenance(row)
    fields |= {f"captioner:{name}": str(origin[key]) for key, name in _FIELDS.items() if origin[key] is not None}
    return add_description(packet, texts, fields)


def extended_description(row: dict[str, Any], mark: str) -> str | None:
    """Return the whole caption, marked as automatic, when the alt text is a shortened one.

    None for reviewed texts, since the person has only approved the alt text, not the rest of the caption; and for texts
    that came with the source, which are not of the caption.
    """
    if row["review_status"] != UNREVIEWED or row["text_by"] == "source":
        return None
    caption, _ = apply_rules(row["caption"], _WITHOUT_LIMITS)
    description = f"{caption} {mark}"
    return description if len(description) > len(row["alt_text"]) else None


def _require_free(packet: Packet, image_id: str, update: bool) -> None:
    """Raise XmpError unless our text of this image may be written into the packet."""
    exported = packet.own_field("Text")
    if not packet.texts(ALT_TEXT) <= {exported}:
        raise XmpError("its sidecar holds a text by somebody else")
    if exported is not None and packet.own_field("ImageId") != image_id:
        raise XmpError(f"its sidecar belongs to {packet.own_field('ImageId')}")
    if exported is not None and not update:
        raise XmpError("its sidecar is from an earlier export (--update refreshes it)")


def _exported_properties(packet: Packet) -> list[str]:
    """Return the names of the properties that an earlier export wrote and nobody has changed since."""
    names = list(_OWN_NAMES)
    for name, recorded in ((ALT_TEXT, "Text"), (EXTENDED, "Extended"), (CAPTION_WRITER, "Writer")):
        if packet.texts(name) <= {packet.own_field(recorded)}:
            names.append(name)
    return names


def _withdraw(row: dict[str, Any], path_of: SidecarPath, tally: Tally) -> None:
    """Remove a text that is no longer published from an earlier export."""
    try:
        path = path_of(row)
        if not path.exists():
            return
        packet = parse(path.read_bytes())
        if packet.own_field("ImageId") != row["image_id"]:
            return
        remaining = remove_properties(packet, _exported_properties(packet))
    except (XmpError, SourceError):
        return  # then an earlier export has not written there
    if any(description.properties for description in remaining.descriptions):
        replace_file(path, remaining.data)
    else:
        path.unlink()
    tally.withdrawn += 1
