"""Texts that a reviewer has typed and not saved yet: one small file for each, in OUT/reviews/drafts."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

from captioner.console.text import valid_unicode
from captioner.store.directory import Directory
from captioner.store.journal import FOLDER, journal_name


class Drafts:
    """One reviewer's unsaved texts, by image id. A draft is on the disk when `keep` returns.

    Damaged files are ignored. Raises OutputError when OUT cannot be written.
    """

    def __init__(self, out: Directory, reviewer: str) -> None:
        self._out = out
        self._folder = f"{FOLDER}/drafts/{PurePosixPath(journal_name(reviewer)).stem}"
        self._texts: dict[str, str] = {}
        for name in out.list_names(self._folder):
            draft = out.read_record(f"{self._folder}/{name}")
            if isinstance(draft.get("image_id"), str) and isinstance(draft.get("text"), str):
                self._texts[draft["image_id"]] = draft["text"]

    def image_ids(self) -> list[str]:
        """Return the ids of the images that have an unsaved text."""
        return list(self._texts)

    def get(self, image_id: str) -> str | None:
        """Return the unsaved text about an image, if any."""
        return self._texts.get(image_id)

    def keep(self, image_id: str, text: str) -> None:
        """Keep a text until it is discarded."""
        whole = valid_unicode(text)  # a browser may send half of a surrogate pair
        self._out.write_json(self._file(image_id), {"image_id": image_id, "text": whole})
        self._texts[image_id] = whole

    def discard(self, image_id: str) -> None:
        """Forget the unsaved text about an image."""
        if image_id in self._texts:
            self._out.delete(self._file(image_id))
            del self._texts[image_id]

    def _file(self, image_id: str) -> str:
        return f"{self._folder}/{hashlib.sha256(image_id.encode()).hexdigest()[:32]}.json"
