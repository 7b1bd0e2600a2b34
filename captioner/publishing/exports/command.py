"""`captioner export`: select the texts, write them in one format and report what was exported and what was not."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pyarrow as pa

from captioner.config import ExportConfig
from captioner.console.text import counted, printable, shell_command
from captioner.errors import OK, OutputError, UsageError
from captioner.files import shown
from captioner.publishing.alt_text.texts import read_field, read_texts
from captioner.publishing.exports import (
    coco,
    embedded,
    html_pages,
    hub_dataset,
    imagefolder,
    lines,
    parquet,
    spreadsheet,
    text_files,
    webdataset,
    xmp,
)
from captioner.publishing.exports.context import Export, Format
from captioner.publishing.exports.destination import open_destination
from captioner.publishing.exports.originals import Originals
from captioner.publishing.exports.select import Tally, Wording, select_texts, unselected_texts
from captioner.store.journal import read_reviews
from captioner.store.lock import sole_writer
from captioner.store.table import CaptionsTable, open_table


def _write_xmp(texts: Iterator[pa.Table], export: Export) -> None:
    """Write sidecars, or with --embed copies of the images with the XMP inside."""
    (embedded if export.settings.embed else xmp).write(texts, export)


FORMATS = {
    "xmp": Format(_write_xmp),
    "html": Format(html_pages.write, supports_decorative=True),
    "csv": Format(spreadsheet.write, supports_decorative=True, suffix=".csv"),
    "jsonl": Format(lines.write, supports_decorative=True, suffix=".jsonl"),
    "txt": Format(text_files.write),
    "coco": Format(coco.write, suffix=".json"),
    "imagefolder": Format(imagefolder.write),
    "webdataset": Format(webdataset.write),
    "parquet": Format(parquet.write, supports_decorative=True, suffix=".parquet"),
    "hub": Format(hub_dataset.write),
}
TRAINING_FORMATS = ("txt", "jsonl", "coco", "imagefolder", "webdataset", "parquet", "hub")
_ONLY_FOR = {  # setting -> the formats it applies to
    "beside_originals": ("xmp", "txt"),
    "existing": ("txt",),
    "columns": ("csv",),
    "preset": ("csv",),
    "coco_results": ("coco",),
    "html_dir": ("html",),
    "embed": ("xmp",),
    "allow_c2pa": ("xmp",),
    "prefix": TRAINING_FORMATS,
    "suffix": TRAINING_FORMATS,
}
_MAX_PROBLEMS_PRINTED = 20


def run(out: str, settings: ExportConfig) -> int:
    """Export the texts of OUT, print a summary and return the exit code. Raises CaptionerError."""
    check_settings(settings)
    settings = _with_suffix(settings)
    table = open_table(out)
    with sole_writer(out):
        tally = export_texts(table, settings)
    _print(tally, settings)
    return OK


_FORMAT_NAMES = {"imagefolder": "ImageFolder", "webdataset": "WebDataset", "hub": "the hub"}  # the others: upper case


def export_texts(table: CaptionsTable, settings: ExportConfig) -> Tally:
    """Write the texts of a table in the format `settings.to`.

    A new DEST appears only when it is complete; files written next to the original images are replaced one by one,
    each atomically. Raises OutputError when DEST exists, there is nothing to export, or the table is not finished.
    """
    check_settings(settings)
    settings = _with_suffix(settings)
    chosen_format = FORMATS[settings.to or ""]
    dest = Path(table.directory.path("")) if settings.beside_originals else _destination(settings)
    tally = Tally()
    if damaged := read_reviews(table.directory)[1]:
        tally.left_out["damaged lines of the review journals, and the decisions in them"] = damaged
    rules = {
        "include_unreviewed": settings.include_unreviewed,
        "supports_decorative": chosen_format.supports_decorative,
    }
    name = _FORMAT_NAMES.get(str(settings.to), str(settings.to).upper())
    read = read_texts if settings.field is None else partial(read_field, field=settings.field)
    # A model that learns from marked texts would write the mark; the texts' provenance says who wrote them.
    is_marked = settings.field is None or settings.to not in TRAINING_FORMATS
    wording = Wording(settings.automatic_mark if is_marked else "", settings.prefix, settings.suffix)
    texts = read(table, leave_out=tally.leave_out_all)
    selected = select_texts(texts, tally, name, wording, field=settings.field, **rules)
    record = {
        "to": settings.to,
        "table": shown(table.directory.location),
        "table_id": table.table_id,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    originals = Originals(table)
    export = Export(dest, settings, tally, originals, lambda: unselected_texts(read(table), **rules), record, wording)
    if not settings.update:
        selected = _require_texts(selected, tally, table.directory.shown(""))
    if settings.dry_run and settings.to != "html":
        for _ in selected:
            pass
    else:
        chosen_format.write(selected, export)
    return tally


def check_settings(settings: ExportConfig) -> None:
    """Raise UsageError for settings that exclude each other or do not apply to the chosen format."""
    if settings.to is None:
        raise UsageError(f"no format given; choose one with --to: {', '.join(FORMATS)}")
    if settings.approved_only and settings.include_unreviewed:
        raise UsageError("--approved-only and --include-unreviewed exclude each other; give one of them")
    for name, formats in _ONLY_FOR.items():
        if getattr(settings, name) != ExportConfig.model_fields[name].get_default() and settings.to not in formats:
            raise UsageError(f"--{name.replace('_', '-')}: does not apply to --to {settings.to}; leave it out")
    if settings.beside_originals and (settings.path or settings.embed):
        other = "--embed" if settings.embed else f"DEST ({settings.path})"
        raise UsageError(f"--beside-originals and {other} exclude each other; give one of them")
    if settings.to == "csv":
        spreadsheet.chosen_columns(settings)


def _destination(settings: ExportConfig) -> Path:
    if settings.to == "hub":
        return Path(hub_dataset.checked_repository(settings))
    if settings.dry_run and not settings.path:
        return Path("captioner-export").absolute()  # nothing is written
    return open_destination(settings.path, settings.update or settings.dry_run)


def _with_suffix(settings: ExportConfig) -> ExportConfig:
    """Return the settings with the format's suffix at the end of a DEST that has none."""
    suffix = FORMATS[settings.to or ""].suffix
    if not settings.path or Path(settings.path).suffix or not suffix:
        return settings
    return settings.model_copy(update={"path": settings.path.rstrip("/") + suffix})


def _require_texts(tables: Iterator[pa.Table], tally: Tally, out: str) -> Iterator[pa.Table]:
    """Return the same tables. Raises OutputError when none of them has a row: an empty export is a mistake."""
    for table in tables:
        if table.num_rows:
            return itertools.chain([table], tables)
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in tally.left_out.most_common())
    raise OutputError(
        f"nothing to export: {reasons or 'there are no texts'}; review them with `{shell_command('review', out)}`"
    )


def _print(tally: Tally, settings: ExportConfig) -> None:
    """Print what was exported to standard output and what was left out to standard error."""
    counts = [f"{count:,} {status}" for status, count in sorted(tally.written.items()) if count]
    verb = "would be exported" if settings.dry_run else "exported"
    where = "beside the originals" if settings.beside_originals else f"to {settings.path}" if settings.path else ""
    total = f"{counted(sum(tally.written.values()), 'text')} {verb} {where}".rstrip()
    stream = sys.stderr if settings.to == "html" and settings.dry_run else sys.stdout
    print(printable(total) + (f": {', '.join(counts)}" if counts else ""), file=stream)
    if tally.withdrawn:
        print(f"removed {counted(tally.withdrawn, 'text')} of an earlier export", file=stream)
    for reason, count in tally.left_out.most_common():
        print(f"captioner: left out: {count:,} {printable(reason)}", file=sys.stderr)
    for image_id, reason in tally.problems[:_MAX_PROBLEMS_PRINTED]:
        print(f"captioner: {printable(image_id)}: {printable(reason)}", file=sys.stderr)
    if len(tally.problems) > _MAX_PROBLEMS_PRINTED:
        print(f"captioner: and {len(tally.problems) - _MAX_PROBLEMS_PRINTED:,} more", file=sys.stderr)
