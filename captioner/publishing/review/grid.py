"""All images of a table in a grid: which of them match a filter and a search, one page at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.errors import OutputError, UsageError
from captioner.publishing.alt_text.texts import read_alt_texts
from captioner.publishing.review.queue import Queue, rows_to_review
from captioner.store.replan import RowIndices
from captioner.store.table import CaptionsTable

PAGE_SIZE = 60
MAX_FOLDERS = 200  # in the list of folders: as many as a person can look through
DECISIONS = ("approved", "edited", "rejected", "decorative", "expert")
FAILED = "failed"  # images without a caption
FILTERS = ("all", "undecided", "flagged", *DECISIONS, "skipped", "drafts", FAILED)

_REASON = ("error_code", "error_message")

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class GridRequest:
    """What the page asks for.

    `show`: one of FILTERS. `folder`: the start of the image ids, up to a slash. `query`: words, each of which the id or
    the text of an image holds, in small or capital letters. `page`: counted from 0; one too large is the last page.
    """

    show: str = "all"
    folder: str = ""
    query: str = ""
    page: int = 0

    @classmethod
    def from_query(cls, query_string: str) -> GridRequest:
        """Parse the query of an address. Raises UsageError for anything that our page does not send."""
        values = dict(parse_qsl(query_string))
        show, page = values.get("show", "all"), values.get("page", "0")
        if show not in FILTERS:
            raise UsageError(f"show: give one of {', '.join(FILTERS)}")
        if not page.isdecimal() or len(page) > 9:
            raise UsageError("page: give a number")
        return cls(show, values.get("folder", ""), values.get("query", ""), int(page))


class Grid:
    """The images of a review session, filtered and searched, and those without a caption."""

    def __init__(self, table: CaptionsTable, queue: Queue) -> None:
        self._queue = queue
        self._search = TextSearch(table, len(queue), selected=queue.selected)
        self._failed_search = TextSearch(table, queue.num_failed, failed=True)

    def page(
        self, request: GridRequest, skipped: Collection[int], drafts: Collection[int]
    ) -> tuple[list[int], dict[str, Any]]:
        """Return the indices of one page of images, and what the page shows around them.

        Images without a caption, which only the filter FAILED shows, are counted among themselves; "num_failed" are
        those in the folder that hold the words. `skipped`, `drafts`: images that this reviewer skipped, or has an
        unsaved text about. Raises OutputError when the table was changed during the review.
        """
        masks = self._masks(skipped, drafts)
        failed = self._failed_search.matches(request.folder, request.query, {})
        if request.show == FAILED:
            matching = np.flatnonzero(failed)
        else:
            edited = {index: review.text for index, review in self._queue.decided.items() if review.text}
            is_found = self._search.matches(request.folder, request.query, edited)
            matching = np.flatnonzero(masks[request.show] & is_found)
        num_pages = max(1, -(-len(matching) // PAGE_SIZE))
        page = min(request.page, num_pages - 1)
        first = page * PAGE_SIZE
        around = {
            "page": page,
            "num_pages": num_pages,
            "first": first,
            "num_images": len(matching),
            "num_failed": int(failed.sum()),
            "total": len(self._queue),
            "counts": _sums(masks) | {FAILED: self._queue.num_failed},
            "folders": self._folders,
        }
        return matching[first : first + PAGE_SIZE].tolist(), around

    def counts(self, skipped: Collection[int], drafts: Collection[int]) -> dict[str, int]:
        """Return the number of images of each filter."""
        return _sums(self._masks(skipped, drafts))

    @cached_property
    def _folders(self) -> dict[str, dict[str, int]]:
        """The number of images in each folder, and of those among them that have no caption.

        Where there are more than MAX_FOLDERS, those that are deeper are counted with the folder above them; empty when
        there are too many at every depth.
        """
        failed = self._failed_search.count_by_folder()
        images = self._search.count_by_folder() + failed
        depth = _list_depth(images)
        images, failed = _cut_to(depth, images), _cut_to(depth, failed)
        return {folder: {"images": images[folder], "failed": failed[folder]} for folder in sorted(images)}

    def _masks(self, skipped: Collection[int], drafts: Collection[int]) -> dict[str, Mask]:
        """Return which images each filter shows; bool [N]."""
        indices: dict[str, list[int]] = {decision: [] for decision in DECISIONS}
        for index, review in self._queue.decided.items():
            indices[review.decision].append(index)
        indices |= {"skipped": list(skipped), "drafts": list(drafts)}
        masks = {
            "all": np.ones(len(self._queue), bool),
            "undecided": self._queue.undecided,
            "flagged": self._queue.flagged,
        }
        return masks | {show: _mask(len(self._queue), indices[show]) for show in FILTERS if show in indices}


def _list_depth(folders: Collection[str]) -> int:
    """Return the depth down to which there are at most MAX_FOLDERS folders; 0 where there are too many at each."""
    deepest = max((folder.count("/") + 1 for folder in folders), default=0)
    depths = range(deepest, 0, -1)
    return next((depth for depth in depths if len({_cut(folder, depth) for folder in folders}) <= MAX_FOLDERS), 0)


def _cut_to(depth: int, counts: Counter[str]) -> Counter[str]:
    """Return the counts with those of deeper folders added to the folder above them at `depth`."""
    shorter: Counter[str] = Counter()
    for folder, count in counts.items():
        shorter[_cut(folder, depth)] += count
    del shorter[""]
    return shorter


def _cut(folder: str, depth: int) -> str:
    return "/".join(folder.split("/")[:depth])


def _sums(masks: dict[str, Mask]) -> dict[str, int]:
    return {show: int(mask.sum()) for show, mask in masks.items()}


def _mask(length: int, indices: list[int]) -> Mask:
    mask = np.zeros(length, bool)
    mask[indices] = True
    return mask


class TextSearch:
    """Finds images by folder and by words of their ids and alt texts; with `failed`, those without a caption.

    Of these the reason is searched in place of the alt text. `selected`: as for `Queue`.

    Reads the ids and texts of the whole table for each new search, about 1 s for 1,000,000 images; the latest search is
    remembered. Raises OutputError when the table was changed since it was opened.
    """

    def __init__(
        self, table: CaptionsTable, num_images: int, failed: bool = False, selected: RowIndices | None = None
    ) -> None:
        self._table, self._num_images, self._failed, self._selected = table, num_images, failed, selected
        self._latest: tuple[tuple[str, tuple[str, ...]], list[Mask]] | None = None

    def count_by_folder(self) -> Counter[str]:
        """Return the number of images directly in each folder, without those in none."""
        counts: Counter[str] = Counter()
        for ids, _ in self._columns() if self._num_images else ():
            counts.update(image_id.rpartition("/")[0] for image_id in ids.to_pylist())
        del counts[""]
        return counts

    def matches(self, folder: str, query: str, edited: Mapping[int, str]) -> Mask:
        """Return which images are in a folder and hold every word of a query; bool [N].

        `edited`: the texts that people wrote, by index.
        """
        words = tuple(query.lower().split())
        if self._latest is None or self._latest[0] != (folder, words):
            self._latest = (folder, words), self._search(folder, words)
        in_folder, *by_word = self._latest[1]
        matching = in_folder.copy()
        for word, with_word in zip(words, by_word, strict=True):
            with_word_written = [index for index, text in edited.items() if word in text.lower()]
            matching &= with_word | _mask(self._num_images, with_word_written)
        return matching

    def _search(self, folder: str, words: tuple[str, ...]) -> list[Mask]:
        """Return which images are in the folder, then for each word which ones hold it."""
        parts: list[list[Mask]] = [[np.zeros(0, bool)] * (1 + len(words))]
        for ids, texts in self._columns() if self._num_images else ():
            in_folder = pc.starts_with(ids, f"{folder}/") if folder else pa.array(np.ones(len(ids), bool))
            masks = [in_folder, *(pc.or_(_holds(ids, word), _holds(texts, word)) for word in words)]
            parts.append([mask.to_numpy(zero_copy_only=False) for mask in masks])
        masks_of_table = [np.concatenate(masks) for masks in zip(*parts, strict=True)]
        if len(masks_of_table[0]) != self._num_images:
            raise OutputError(
                f"{self._table.directory.location} was changed during the review; start `captioner review` again"
            )
        return masks_of_table

    def _columns(self) -> Iterator[tuple[pa.ChunkedArray, pa.ChunkedArray]]:
        """Yield the ids of the images of each part, and their alt texts or reasons."""
        for part, rows, alt_texts in read_alt_texts(self._table, list(_REASON) if self._failed else []):
            if self._failed:
                failed = pc.is_null(alt_texts["alt_text"])
                reasons = pc.binary_join_element_wise(*(pc.fill_null(rows[name], "") for name in _REASON), " ")
                yield rows["image_id"].filter(failed), reasons.filter(failed)
            else:
                kept = rows_to_review(part, alt_texts, self._selected)
                yield rows["image_id"].take(kept), alt_texts["alt_text"].take(kept)


def _holds(texts: pa.ChunkedArray, word: str) -> pa.ChunkedArray:
    return pc.match_substring(texts, word, ignore_case=True)
