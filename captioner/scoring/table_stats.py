"""One pass over a run's captions: what they have in common, how sure the model was, what failed. Bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.data import STATUS_OK
from captioner.scoring.frequent import Frequent
from captioner.scoring.language import language_of

COLUMNS = ["image_id", "status", "error_code", "error_message", "sha256", "caption", "logprob_mean", "created_at"]
EXAMPLES = 5
# "The same caption for many pictures": at least so many different ones, and at least this share of the run.
SAME_AT_LEAST, SAME_SHARE = 10, 0.01
LOW_CONFIDENCE_SHARE = 0.01
LANGUAGE_SHARE = 0.8  # a run has a language where so many of the captions that tell theirs share it
MAX_LENGTH = 100  # words, and tens of characters; longer ones are counted there
_LOGPROB_LOW, _LOGPROB_STEP = -10.0, 0.01


MOST_BUCKETS = 4_096


class Timeline:
    """Rows by time, in buckets of `width` seconds: 1 at first, doubled whenever there are too many buckets."""

    def __init__(self, most: int = MOST_BUCKETS) -> None:
        self._most = most
        self._rows: Counter[int] = Counter()  # number of the bucket since the epoch -> rows
        self.width = 1

    def add(self, rows: Mapping[int, int]) -> None:
        """`rows`: second since the epoch -> rows made in it."""
        for second, count in rows.items():
            self._rows[second // self.width] += count
        while len(self._rows) > self._most:
            self._halve()

    def _halve(self) -> None:
        self.width *= 2
        merged: Counter[int] = Counter()
        for bucket, count in self._rows.items():
            merged[bucket // 2] += count
        self._rows = merged

    def to_list(self) -> list[tuple[int, int]]:
        """(first second of the bucket, rows) of each bucket with rows, in order."""
        return [(bucket * self.width, count) for bucket, count in sorted(self._rows.items())]


@dataclass
class Survey:
    """What a run's rows say together. Counts of captions are of different pictures, by their sha256 within a part."""

    num_rows: int = 0
    num_ok: int = 0
    captions: Frequent = field(default_factory=Frequent)
    words: Frequent = field(default_factory=Frequent)
    num_words: int = 0
    word_lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_LENGTH + 1, np.int64))
    char_lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_LENGTH + 1, np.int64))
    over_125: int = 0
    over_250: int = 0
    logprobs: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1001, np.int64))
    languages: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    failed_examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    committed: Timeline = field(default_factory=Timeline)

    def add(self, rows: pa.Table) -> None:
        """Rows of the captions table with COLUMNS."""
        self.num_rows += rows.num_rows
        fine = rows.filter(pc.equal(rows["status"], STATUS_OK))
        self.num_ok += fine.num_rows
        self._add_failed(rows.filter(pc.not_equal(rows["status"], STATUS_OK)))
        self._add_captions(fine)
        known = fine["logprob_mean"].drop_null().to_numpy()
        bins = np.clip(np.floor((known - _LOGPROB_LOW) / _LOGPROB_STEP), 0, 1000).astype(np.int64)
        self.logprobs += np.bincount(bins, minlength=1001)
        seconds = pc.cast(pc.cast(rows["created_at"], pa.timestamp("s", "UTC"), safe=False), pa.int64())
        self.committed.add({item["values"]: item["counts"] for item in seconds.value_counts().to_pylist()})

    def _add_failed(self, failed: pa.Table) -> None:
        for code, image_id, message in zip(
            failed["error_code"].to_pylist(),
            failed["image_id"].to_pylist(),
            failed["error_message"].to_pylist(),
            strict=True,
        ):
            self.failed[code] += 1
            examples = self.failed_examples.setdefault(code, [])
            if len(examples) < EXAMPLES:
                examples.append({"image_id": image_id, "message": message or ""})

    def _add_captions(self, fine: pa.Table) -> None:
        if not fine.num_rows:
            return
        grouped = fine.group_by("caption", use_threads=False).aggregate(
            [("sha256", "count_distinct"), ("caption", "count")]
        )
        texts = grouped["caption"].to_pylist()
        self.captions.add(dict(zip(texts, grouped["sha256_count_distinct"].to_pylist(), strict=True)))
        words: Counter[str] = Counter()
        for text, count in zip(texts, grouped["caption_count"].to_pylist(), strict=True):
            said = text.lower().split()
            for word in said:
                words[word.strip('.,;:!?"()')] += count
            self.num_words += len(said) * count
            self.word_lengths[min(len(said), MAX_LENGTH)] += count
            self.char_lengths[min(len(text) // 10, MAX_LENGTH)] += count
            self.over_125 += count * (len(text) > 125)
            self.over_250 += count * (len(text) > 250)
            language = language_of(text)
            if language:
                self.languages[language] += count
        self.words.add({word: count for word, count in words.items() if word})

    @property
    def repeated(self) -> dict[str, int]:
        """Captions that many different pictures share, with their number, most first."""
        least = max(SAME_AT_LEAST, SAME_SHARE * self.num_ok)
        return {text: count for text, count in self.captions.most_common() if count >= least and text}

    @property
    def language(self) -> str | None:
        """The run's own: that of most captions; `None` where they do not agree."""
        total = self.languages.total()
        if not total:
            return None
        language, count = self.languages.most_common(1)[0]
        return language if count >= LANGUAGE_SHARE * total else None

    def logprob_quantile(self, share: float) -> float | None:
        """Upper edge of the bin (0.01 wide) below which `share` of the captions lie; `None` where none is known."""
        total = int(self.logprobs.sum())
        if not total:
            return None
        place = int(np.searchsorted(np.cumsum(self.logprobs), share * total))
        return float(_LOGPROB_LOW + (place + 1) * _LOGPROB_STEP)

    @property
    def low_logprob(self) -> float | None:
        """Captions below are of low confidence: the run's own first percentile. `None` for fewer than 100 captions, or
        where the model was about as sure of all."""
        low, middle = self.logprob_quantile(LOW_CONFIDENCE_SHARE), self.logprob_quantile(0.5)
        if low is None or middle is None or self.logprobs.sum() < 100:
            return None
        return low if middle - low >= 0.05 else None

    def to_json(self) -> dict[str, Any]:
        edges = _LOGPROB_LOW + _LOGPROB_STEP * np.arange(1001)
        return {
            "num_rows": self.num_rows,
            "num_ok": self.num_ok,
            "failed": dict(self.failed.most_common()),
            "failed_examples": self.failed_examples,
            "distinct_captions": len(self.captions),
            "distinct_is_estimate": bool(self.captions.error),
            "top_captions": self.captions.most_common(10),
            "repeated_captions": list(self.repeated.items())[:20],
            "distinct_words": len(self.words),
            "distinct_words_is_estimate": bool(self.words.error),
            "num_words": self.num_words,
            "top_words": self.words.most_common(30),
            "word_lengths": {str(n): int(count) for n, count in enumerate(self.word_lengths) if count},
            "char_lengths_by_10": {str(10 * n): int(count) for n, count in enumerate(self.char_lengths) if count},
            "over_125": self.over_125,
            "over_250": self.over_250,
            "language": self.language,
            "languages": dict(self.languages.most_common()),
            "logprobs": {f"{edges[n]:.2f}": int(count) for n, count in enumerate(self.logprobs) if count},
            "low_logprob": self.low_logprob,
            "committed": self.committed.to_list(),
            "committed_seconds": self.committed.width,
        }
