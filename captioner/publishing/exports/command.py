"""`captioner export`: choose the texts, write them in one form, tell what went out and what did not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.console.text import printable
from captioner.errors import OK, OutputError, UsageError
from captioner.files import shown
from captioner.publishing.alt_text.texts import read_texts
from captioner.publishing.exports import (
    coco,
    embedded,
    html_pages,
    imagefolder,
    lines,
    parquet,
    spreadsheet,
    text_files,
    webdataset,
    xmp,
)
from captioner.publishing.exports.context import Export, Form
from captioner.publishing.exports.destination import open_destination
from captioner.publishing.exports.originals import Pictures
from captioner.publishing.exports.select import Tally, choose, refused
from captioner.store.lock import sole_writer
from captioner.store.table import CaptionsTable, open_table


def _write_xmp(texts: Iterator[pa.Table], export: Export) -> None:
    """As sidecars, or with --embed inside copies of the pictures."""
    (embedded if export.settings.embed else xmp).write(texts, export)


FORMS = {
    "xmp": Form(_write_xmp),
    "html": Form(html_pages.write, says_decorative=True),
    "csv": Form(spreadsheet.write, says_decorative=True),
    "jsonl": Form(lines.write, says_decorative=True),
    "txt": Form(text_files.write),
    "coco": Form(coco.write),
    "imagefolder": Form(imagefolder.write),
    "webdataset": Form(webdataset.write),
    "parquet": Form(parquet.write, says_decorative=True),
}
_ONLY_FOR = {  # a setting -> the forms it means something for
    "beside_originals": ("xmp", "txt"),
    "existing": ("txt",),
    "columns": ("csv",),
    "preset": ("csv",),
    "html_dir": ("html",),
    "embed": ("xmp",),
    "allow_c2pa": ("xmp",),
}
_MOST_SHOWN = 20


def run(out: str, settings: ExportConfig) -> int:
    """Export OUT's texts and print what was done; returns the exit code. Raises CaptionerError."""
    check_settings(settings)
    table = open_table(out)
    with sole_writer(out):
        tally = export_texts(table, settings)
    _print(tally, settings)
    return OK


def export_texts(table: CaptionsTable, settings: ExportConfig) -> Tally:
    """Write the texts of a table in the form of `settings.to`. DEST is there whole or not at all; sidecars beside the
    originals, each of them.

    Raises OutputError where DEST is there, nothing is to be exported, or the table is not finished.
    """
    check_settings(settings)
    form = FORMS[settings.to or ""]
    dest = Path(table.directory.path("")) if settings.beside_originals else _destination(settings)
    tally = Tally()
    choice = {"include_unreviewed": settings.include_unreviewed, "says_decorative": form.says_decorative}
    chosen = choose(read_texts(table), tally, mark=settings.automatic_mark, **choice)
    record = {
        "to": settings.to,
        "table": shown(table.directory.location),
        "table_id": table.table_id,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    export = Export(dest, settings, tally, Pictures(table), lambda: refused(read_texts(table), **choice), record)
    if not settings.update:
        chosen = _require_some(chosen, tally)
    if settings.dry_run and settings.to != "html":
        for _ in chosen:
            pass
    else:
        form.write(chosen, export)
    return tally


def check_settings(settings: ExportConfig) -> None:
    """Raise UsageError for settings that exclude each other or mean nothing together."""
    if settings.to is None:
        raise UsageError(f"no form given; choose one with --to: {', '.join(FORMS)}")
    if settings.approved_only and settings.include_unreviewed:
        raise UsageError("--approved-only and --include-unreviewed exclude each other; give one of them")
    for name, forms in _ONLY_FOR.items():
        if getattr(settings, name) != ExportConfig.model_fields[name].get_default() and settings.to not in forms:
            raise UsageError(f"--{name.replace('_', '-')}: means nothing with --to {settings.to}; leave it out")
    if settings.beside_originals and (settings.path or settings.embed):
        other = "--embed" if settings.embed else f"DEST ({settings.path})"
        raise UsageError(f"--beside-originals and {other} exclude each other; give one of them")
    if settings.to == "csv":
        spreadsheet.chosen_columns(settings)


def _destination(settings: ExportConfig) -> Path:
    if settings.dry_run and not settings.path:
        return Path("captioner-export").absolute()  # nothing is written
    return open_destination(settings.path, settings.update or settings.dry_run)


def _require_some(chosen: Iterator[pa.Table], tally: Tally) -> Iterator[pa.Table]:
    """The same tables. Raises OutputError where none of them has a row: an empty export is a mistake."""
    for rows in chosen:
        if rows.num_rows:
            return itertools.chain([rows], chosen)
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in tally.left_out.most_common())
    raise OutputError(f"nothing to export: {reasons or 'there are no texts'}; review them with `captioner review`")


def _print(tally: Tally, settings: ExportConfig) -> None:
    """What went out on standard output, what did not on standard error."""
    counts = [f"{count:,} {status}" for status, count in sorted(tally.written.items()) if count]
    verb = "would be exported" if settings.dry_run else "exported"
    where = "beside the originals" if settings.beside_originals else f"to {settings.path}" if settings.path else ""
    total = f"{sum(tally.written.values()):,} texts {verb} {where}".rstrip()
    stream = sys.stderr if settings.to == "html" and settings.dry_run else sys.stdout
    print(printable(total) + (f": {', '.join(counts)}" if counts else ""), file=stream)
    if tally.withdrawn:
        print(f"{tally.withdrawn:,} of an earlier export were taken back", file=stream)
    for reason, count in tally.left_out.most_common():
        print(f"captioner: left out: {count:,} {printable(reason)}", file=sys.stderr)
    for image_id, reason in tally.named[:_MOST_SHOWN]:
        print(f"captioner: {printable(image_id)}: {printable(reason)}", file=sys.stderr)
    if len(tally.named) > _MOST_SHOWN:
        print(f"captioner: and {len(tally.named) - _MOST_SHOWN:,} more", file=sys.stderr)
