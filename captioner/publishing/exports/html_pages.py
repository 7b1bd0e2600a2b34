"""Export HTML and Markdown: copies of a site's pages with their missing alt texts filled in, and a diff of them."""

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
from captioner.publishing.exports.fill import Gap, PageError, decode, fill, find_gaps

DIFF, ORIGINS = "alt-texts.diff", "captioner-provenance.jsonl"
_HTML, _MARKDOWN = (".html", ".htm", ".xhtml"), (".md", ".markdown")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that a page shows: the sha256 of its file when the site holds it, else its path in the site."""

    sha256: str = ""
    path: str = ""


@dataclass
class Page:
    """A page with images without alt. `name`: relative to the site. `images`: src -> the image it refers to."""

    name: str
    text: str
    encoding: str
    gaps: list[Gap]
    images: dict[str, ImageRef]


class TextIndex:
    """The texts of the images that pages show, and only of those: memory does not grow with the table."""

    def __init__(self, images: Iterable[ImageRef]) -> None:
        self._hashes: set[str] = set()
        self._paths: dict[str, set[str]] = {}  # possible image id -> the paths on the site that it could mean
        for image in images:
            self._hashes.update(filter(None, [image.sha256]))
            for suffix in path_suffixes(image.path):
                self._paths.setdefault(suffix, set()).add(image.path)
        self._by_hash: dict[str, dict[str, Any]] = {}
        self._by_id: dict[str, dict[str, Any]] = {}
        self._ambiguous: set[str] = set()  # hashes of images that have several texts

    def add(self, rows: pa.Table) -> int:
        """Keep the rows whose images are on a page; returns how many."""
        by_hash = pc.is_in(rows["sha256"], pa.array(self._hashes, pa.string()))
        by_id = pc.is_in(rows["image_id"], pa.array(self._paths, pa.string()))
        matching = rows.filter(pc.or_(pc.fill_null(by_hash, False), by_id)).to_pylist()
        for row in matching:
            first = self._by_hash.setdefault(row["sha256"], row)
            if first["alt_text"] != row["alt_text"]:
                self._ambiguous.add(row["sha256"])
            self._by_id[row["image_id"]] = row
        return len(matching)

    def find(self, image: ImageRef) -> dict[str, Any] | None:
        """Return the row of an image.

        None when there is none or it is ambiguous: several texts for one image, or several images for one image id.
        """
        if image.sha256:
            return None if image.sha256 in self._ambiguous else self._by_hash.get(image.sha256)
        image_id = next((suffix for suffix in path_suffixes(image.path) if suffix in self._by_id), "")
        return self._by_id[image_id] if image_id and len(self._paths[image_id]) == 1 else None


def write(texts: Iterator[pa.Table], export: Export) -> None:
    """Write a copy of each changed page to DEST, alt-texts.diff and the provenance of the texts.

    The diff is for `patch -p1` in the site's folder; --dry-run only prints it. Pages that cannot be parsed are
    reported and left as they are. An image in the site's folder is matched by the sha256 of its file, any other by its
    path, which has to end with the whole image id. Raises UsageError without --html-dir.
    """
    site = _site_of(export)
    pages = list(_pages_with_gaps(site))
    index = TextIndex(image for page in pages for image in page.images.values())
    for rows in texts:
        unused = rows.num_rows - index.add(rows)
        if unused:
            export.tally.left_out["not used on these pages, or already with alt text"] += unused
    export.tally.written.clear()
    if export.settings.dry_run:
        for page in pages:
            sys.stdout.write(printable_diff(_fill(page, index, export)[1]))
        return
    with new_folder(export.dest, export.record) as folder:
        _write_pages(folder, pages, index, export)


def _write_pages(folder: Path, pages: list[Page], index: TextIndex, export: Export) -> None:
    with (folder / ORIGINS).open("w", encoding="utf-8") as origins, (folder / DIFF).open("wb") as diffs:
        for page in pages:
            text, diff, filled = _fill(page, index, export)
            if not filled:
                continue
            write_new(folder / page.name, text.encode(page.encoding))
            diffs.write(diff.encode(page.encoding))
            for gap, row in filled:
                write_origin(origins, row, page=page.name, src=gap.src)


def _fill(page: Page, index: TextIndex, export: Export) -> tuple[str, str, list[tuple[Gap, dict[str, Any]]]]:
    """Return the filled page, its diff, and the filled gaps with the rows of their texts."""
    rows = {src: row for src, image in page.images.items() if (row := index.find(image))}
    text_of = {src: row["alt_text"] for src, row in rows.items()}.get
    text, filled = fill(page.text, page.gaps, text_of, page.encoding)
    export.tally.written.update(rows[gap.src]["review_status"] for gap, _ in filled)
    num_unfilled = len(page.gaps) - len(filled)
    if num_unfilled:
        export.tally.left_out["alt texts missing on the pages, for images without a reviewed text"] += num_unfilled
    return text, unified_diff(page.name, page.text, text), [(gap, rows[gap.src]) for gap, _ in filled]


def _site_of(export: Export) -> Path:
    if not export.settings.html_dir:
        raise UsageError("--to html fills the pages of a folder; give it with --html-dir")
    site = Path(export.settings.html_dir).expanduser().resolve()
    if not site.is_dir():
        raise UsageError(f"--html-dir {export.settings.html_dir}: no such folder")
    dest = export.dest.resolve()
    if dest == site or site in dest.parents:
        raise UsageError(f"{export.dest} is inside --html-dir, whose pages are not changed; give another DEST")
    return site


def _pages_with_gaps(site: Path) -> Iterator[Page]:
    """Yield the pages that show an image without alt; pages that cannot be parsed are reported on standard error."""
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
            images = {gap.src: _resolve(site, name, gap.src, digest) for gap in gaps}
            yield Page(name, text, encoding, gaps, {src: image for src, image in images.items() if image})


def _resolve(site: Path, page: str, src: str, digest: Callable[[Path], str]) -> ImageRef | None:
    """Return the image that `src` refers to; None when it is not a file (data: and the like)."""
    try:
        parts = urlsplit(src.strip())
    except ValueError:
        return None
    if parts.scheme not in ("", "http", "https") or not parts.path:
        return None
    target = unquote(parts.path)
    in_site = target if parts.netloc or target.startswith("/") else posixpath.join(posixpath.dirname(page), target)
    path = posixpath.normpath("/" + in_site).lstrip("/")  # ".." cannot leave the site
    return ImageRef(sha256=sha256) if (sha256 := digest(site / path)) else ImageRef(path=path)


def _digest(file: Path) -> str:
    """Return the sha256 of a file; "" when there is no such file."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    except (OSError, ValueError):
        return ""


def path_suffixes(path: str) -> list[str]:
    """Return every trailing part of a path: a/b/c.jpg, b/c.jpg and c.jpg for a/b/c.jpg."""
    parts = path.split("/") if path else []
    return ["/".join(parts[first:]) for first in range(len(parts))]


def unified_diff(name: str, before: str, after: str) -> str:
    """Return a diff that `patch -p1` and `git apply` take; "" when nothing differs."""
    old, new = (re.findall(r"[^\n]*\n|[^\n]+", text) for text in (before, after))
    lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def printable_diff(diff: str) -> str:
    """Return the diff with control characters escaped, for a terminal."""
    return "".join(f"{printable(line)}\n" for line in diff.split("\n")[:-1])
