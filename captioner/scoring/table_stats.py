"""Collect statistics of a run's captions, log-probabilities and failures in one pass and bounded memory."""

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
from captioner.scoring.language import language_of
from captioner.scoring.normalise import split_words

COLUMNS = ["image_id", "status", "error_code", "error_message", "sha256", "caption", "logprob_mean", "created_at"]
EXAMPLES = 5
# A caption is flagged as repeated when it belongs to at least so many different images and this share of the run.
MIN_REPEATED, MIN_REPEATED_SHARE = 10, 0.01
LOW_CONFIDENCE_SHARE = 0.01
LANGUAGE_SHARE = 0.8  # share of the captions with a detected language that makes it the language of the run
MAX_LANGUAGES = 2_000  # captions of each part whose languages are counted, which takes 31 us of CPU time for each
MAX_LENGTH = 100  # words, and tens of characters; longer captions are counted as this long
_LOGPROB_LOW, _LOGPROB_STEP = -10.0, 0.01


MAX_BUCKETS = 4_096


class CappedCounter:
    """Counts texts in bounded memory (Misra and Gries 1982): rare ones are dropped above `2 * capacity` distinct texts.

    Counts are too low by at most `error`, and exact while nothing was dropped (`error` 0).
    """

    def __init__(self, capacity: int = 50_000) -> None:
        self._capacity = capacity
        self._counts: Counter[str] = Counter()
        self.num_distinct = 0  # at least this many; exact while `error` is 0
        self.error = 0

    def add(self, counts: Mapping[str, int]) -> None:
        """Add the counts of several texts."""
        for text, count in counts.items():
            self._counts[text] += count
            self.num_distinct = max(self.num_distinct, len(self._counts))
            if len(self._counts) > 2 * self._capacity:
                dropped = self._counts.most_common(self._capacity + 1)[-1][1]
                self._counts = Counter(
                    {text: count - dropped for text, count in self._counts.items() if count > dropped}
                )
                self.error += dropped

    def most_common(self, number: int | None = None) -> list[tuple[str, int]]:
        """Return the texts with their counts, by count, then alphabetically."""
        return sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))[:number]


@dataclass
class TableStats:
    """Statistics of a run. A caption is counted once for each different image, by its sha256 within a part."""

    num_rows: int = 0
    num_ok: int = 0
    captions: CappedCounter = field(default_factory=CappedCounter)
    words: CappedCounter = field(default_factory=CappedCounter)
    num_words: int = 0
    word_lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_LENGTH + 1, np.int64))
    char_lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_LENGTH + 1, np.int64))
    over_125: int = 0
    over_250: int = 0
    logprobs: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1001, np.int64))
    languages: Counter[str] = field(default_factory=Counter)  # of MAX_LANGUAGES captions of each part
    failed: Counter[str] = field(default_factory=Counter)
    failed_examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    committed: Counter[int] = field(default_factory=Counter)  # rows by creation time, in buckets
    bucket_seconds: int = 1  # doubled when there are more than MAX_BUCKETS

    def add(self, rows: pa.Table) -> None:
        """Add rows of the captions table with COLUMNS."""
        self.num_rows += rows.num_rows
        fine = rows.filter(pc.equal(rows["status"], STATUS_OK))
        self.num_ok += fine.num_rows
        self._add_failed(rows.filter(pc.not_equal(rows["status"], STATUS_OK)))
        self._add_captions(fine)
        logprobs = fine["logprob_mean"].drop_null().to_numpy()
        bins = np.clip(np.floor((logprobs - _LOGPROB_LOW) / _LOGPROB_STEP), 0, 1000).astype(np.int64)
        self.logprobs += np.bincount(bins, minlength=1001)
        seconds = pc.cast(pc.cast(rows["created_at"], pa.timestamp("s", "UTC"), safe=False), pa.int64())
        self._add_times({item["values"]: item["counts"] for item in seconds.value_counts().to_pylist()})

    def _add_times(self, rows: Mapping[int, int]) -> None:
        """Add rows by second since the epoch."""
        for second, count in rows.items():
            self.committed[second // self.bucket_seconds] += count
        while len(self.committed) > MAX_BUCKETS:
            self.bucket_seconds *= 2
            halved: Counter[int] = Counter()
            for bucket, count in self.committed.items():
                halved[bucket // 2] += count
            self.committed = halved

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
        texts, counts = grouped["caption"].to_pylist(), grouped["caption_count"].to_pylist()
        self.captions.add(dict(zip(texts, grouped["sha256_count_distinct"].to_pylist(), strict=True)))
        words: Counter[str] = Counter()
        for text, count in zip(texts, counts, strict=True):
            tokens = split_words(text.lower())
            for word in tokens:
                words[word.strip('.,;:!?"()')] += count
            self.num_words += len(tokens) * count
            self.word_lengths[min(len(tokens), MAX_LENGTH)] += count
            self.char_lengths[min(len(text) // 10, MAX_LENGTH)] += count
            self.over_125 += count * (len(text) > 125)
            self.over_250 += count * (len(text) > 250)
        self.words.add({word: count for word, count in words.items() if word})
        self._add_languages(texts, counts)

    def _add_languages(self, texts: list[str], counts: list[int]) -> None:
        """Count the languages of different captions of a part: of every n-th one where there are many."""
        every = -(-len(texts) // MAX_LANGUAGES)
        for text, count in zip(texts[::every], counts[::every], strict=True):
            if language := language_of(text):
                self.languages[language] += count

    @property
    def repeated(self) -> dict[str, int]:
        """Captions that many different images share with the number of images, highest first."""
        threshold = max(MIN_REPEATED, MIN_REPEATED_SHARE * self.num_ok)
        return {text: count for text, count in self.captions.most_common() if count >= threshold and text}

    @property
    def language(self) -> str | None:
        """The language of most captions; `None` when none is common enough."""
        total = self.languages.total()
        if not total:
            return None
        language, count = self.languages.most_common(1)[0]
        return language if count >= LANGUAGE_SHARE * total else None

    def logprob_quantile(self, share: float) -> float | None:
        """Return the quantile rounded up to 0.01; `None` without log-probabilities."""
        total = int(self.logprobs.sum())
        if not total:
            return None
        bin_index = int(np.searchsorted(np.cumsum(self.logprobs), share * total))
        return float(_LOGPROB_LOW + (bin_index + 1) * _LOGPROB_STEP)

    @property
    def low_logprob(self) -> float | None:
        """The log-probability below which a caption is flagged: the first percentile of the run.

        `None` for fewer than 100 captions, or when nearly all log-probabilities are the same.
        """
        low, median = self.logprob_quantile(LOW_CONFIDENCE_SHARE), self.logprob_quantile(0.5)
        if low is None or median is None or self.logprobs.sum() < 100:
            return None
        return low if median - low >= 0.05 else None

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as check.json holds them."""
        edges = _LOGPROB_LOW + _LOGPROB_STEP * np.arange(1001)
        return {
            "num_rows": self.num_rows,
            "num_ok": self.num_ok,
            "failed": dict(self.failed.most_common()),
            "failed_examples": self.failed_examples,
            "distinct_captions": self.captions.num_distinct,
            "distinct_is_estimate": bool(self.captions.error),
            "top_captions": self.captions.most_common(10),
            "repeated_captions": list(self.repeated.items())[:20],
            "distinct_words": self.words.num_distinct,
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
            "committed": [(bucket * self.bucket_seconds, count) for bucket, count in sorted(self.committed.items())],
            "committed_seconds": self.bucket_seconds,
        }
