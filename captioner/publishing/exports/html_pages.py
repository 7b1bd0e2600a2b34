"""HTML and Markdown: copies of the pages of a site in which missing alt texts are filled, and a diff of them."""

from __future__ import annotations

import difflib
import hashlib
import posixpath
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import printable
from captioner.errors import UsageError
from captioner.publishing.exports.context import Export, write_origin
from captioner.publishing.exports.destination import new_folder, write_new
from captioner.publishing.exports.fill import Gap, PageError, decode, filled, find_gaps

DIFF, ORIGINS = "alt-texts.diff", "captioner-provenance.jsonl"
_HTML, _MARKDOWN = (".html", ".htm", ".xhtml"), (".md", ".markdown")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A picture that a page shows: the hash of its file where the site holds it, else its path in the site."""

    sha256: str = ""
    path: str = ""


@dataclass
class Page:
    """A page with gaps. `name`: relative to the site. `pictures`: src -> what picture is meant by it."""

    name: str
    text: str
    encoding: str
    gaps: list[Gap]
    pictures: dict[str, Wanted]


class Known:
    """The texts of the pictures that pages show: only of those, so that a million texts stream past."""

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self._hashes: set[str] = set()
        self._paths: dict[str, set[str]] = {}  # what may be an image id -> the paths that it would stand for
        for one in wanted:
            self._hashes.update(filter(None, [one.sha256]))
            for tail in tails(one.path):
                self._paths.setdefault(tail, set()).add(one.path)
        self._by_hash: dict[str, dict[str, Any]] = {}
        self._by_id: dict[str, dict[str, Any]] = {}
        self._disputed: set[str] = set()  # hashes of pictures with several texts

    def add(self, rows: pa.Table) -> int:
        """Take what is wanted of `rows`; returns how many that are."""
        by_hash = pc.is_in(rows["sha256"], pa.array(self._hashes, pa.string()))
        by_id = pc.is_in(rows["image_id"], pa.array(self._paths, pa.string()))
        found = rows.filter(pc.or_(pc.fill_null(by_hash, False), by_id)).to_pylist()
        for row in found:
            first = self._by_hash.setdefault(row["sha256"], row)
            if first["alt_text"] != row["alt_text"]:
                self._disputed.add(row["sha256"])
            self._by_id[row["image_id"]] = row
        return len(found)

    def row_of(self, wanted: Wanted) -> dict[str, Any] | None:
        """None too where it is not certain: several texts for one picture, several pictures for one image id."""
        if wanted.sha256:
            return None if wanted.sha256 in self._disputed else self._by_hash.get(wanted.sha256)
        image_id = next((tail for tail in tails(wanted.path) if tail in self._by_id), "")
        return self._by_id[image_id] if image_id and len(self._paths[image_id]) == 1 else None


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """DEST gets a copy of each page that changes, alt-texts.diff (for `patch -p1` in the site's folder) and where the
    texts come from; --dry-run prints the diff. Pages that do not parse are named and left as they are.

    A picture in the site's folder is told by the sha256 of its file; any other by its path, which has to end with the
    whole image id. Raises UsageError without --html-dir.
    """
    site = _site_of(export)
    pages = list(_pages_with_gaps(site))
    known = Known(one for page in pages for one in page.pictures.values())
    for rows in texts:
        unused = rows.num_rows - known.add(rows)
        if unused:
            export.tally.left_out["of pictures that no page shows without an alt"] += unused
    export.tally.written.clear()
    if export.settings.dry_run:
        for page in pages:
            sys.stdout.write(printable_diff(_fill(page, known, export)[1]))
        return
    with new_folder(export.dest, export.record) as folder:
        _write_pages(folder, pages, known, export)


def _write_pages(folder: Path, pages: list[Page], known: Known, export: Export) -> None:
    with (folder / ORIGINS).open("w", encoding="utf-8") as origins, (folder / DIFF).open("wb") as diffs:
        for page in pages:
            text, diff, done = _fill(page, known, export)
            if not done:
                continue
            write_new(folder / page.name, text.encode(page.encoding))
            diffs.write(diff.encode(page.encoding))
            for gap, row in done:
                write_origin(origins, row, page=page.name, src=gap.src)


def _fill(page: Page, known: Known, export: Export) -> tuple[str, str, list[tuple[Gap, dict[str, Any]]]]:
    """The filled page, the diff to it, and which texts went in where."""
    rows = {src: row for src, wanted in page.pictures.items() if (row := known.row_of(wanted))}
    text, done = filled(page.text, page.gaps, lambda src: rows[src]["alt_text"] if src in rows else None, page.encoding)
    export.tally.written.update(rows[gap.src]["review_status"] for gap, _ in done)
    unknown = len(page.gaps) - len(done)
    if unknown:
        export.tally.left_out["missing alt texts on the pages, for which there is no text"] += unknown
    return text, unified_diff(page.name, page.text, text), [(gap, rows[gap.src]) for gap, _ in done]


def _site_of(export: Export) -> Path:
    if not export.settings.html_dir:
        raise UsageError("--to html fills the pages of a folder; name it with --html-dir")
    site = Path(export.settings.html_dir).expanduser().resolve()
    if not site.is_dir():
        raise UsageError(f"--html-dir {export.settings.html_dir}: no such folder")
    dest = export.dest.resolve()
    if dest == site or site in dest.parents:
        raise UsageError(f"{export.dest}: lies in --html-dir, whose pages are not changed; give another DEST")
    return site


def _pages_with_gaps(site: Path) -> Iterator[Page]:
    """Pages in which a picture has no alt; those that cannot be read are named on standard error."""
    digest = cache(_digest)
    for path in sorted(site.rglob("*")):
        suffix = path.suffix.lower()
        if suffix not in (*_HTML, *_MARKDOWN) or not path.is_file():
            continue
        name = path.relative_to(site).as_posix()
        try:
            text, encoding = decode(path.read_bytes())
            gaps = find_gaps(text, markdown=suffix in _MARKDOWN)
        except (PageError, OSError) as error:
            print(f"captioner: {printable(name)} is left as it is: {printable(error)}", file=sys.stderr)
            continue
        if gaps:
            wanted = {gap.src: _wanted(site, name, gap.src, digest) for gap in gaps}
            yield Page(name, text, encoding, gaps, {src: one for src, one in wanted.items() if one})


def _wanted(site: Path, page: str, src: str, digest: Callable[[Path], str]) -> Wanted | None:
    """Which picture `src` means; None where it is no file at all (data: and the like)."""
    try:
        parts = urlsplit(src.strip())
    except ValueError:
        return None
    if parts.scheme not in ("", "http", "https") or not parts.path:
        return None
    whole = unquote(parts.path)
    in_site = whole if parts.netloc or whole.startswith("/") else posixpath.join(posixpath.dirname(page), whole)
    path = posixpath.normpath("/" + in_site).lstrip("/")  # ".." ends at the site's root
    return Wanted(sha256=found) if (found := digest(site / path)) else Wanted(path=path)


def _digest(file: Path) -> str:
    """The sha256 of a file; "" where there is none."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    except (OSError, ValueError):
        return ""


def tails(path: str) -> list[str]:
    """a/b/c.jpg -> a/b/c.jpg, b/c.jpg, c.jpg."""
    parts = path.split("/") if path else []
    return ["/".join(parts[first:]) for first in range(len(parts))]


def unified_diff(name: str, before: str, after: str) -> str:
    """What `patch -p1` and `git apply` take; "" where nothing differs."""
    old, new = (re.findall(r"[^\n]*\n|[^\n]+", text) for text in (before, after))
    lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def printable_diff(diff: str) -> str:
    return "".join(f"{printable(line)}\n" for line in diff.split("\n")[:-1])
