"""DATA -> usable pairs: pictures that decode and have captions, split by picture into train, eval and test."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import TrainDataConfig
from captioner.data import PixelSpec
from captioner.errors import SourceError, UsageError
from captioner.files import shown
from captioner.models.ref import ModelRef
from captioner.training.archives import PAIRS_SCHEMA, Archives

SPLITS = ("train", "eval", "test")


@dataclass
class Pairs:
    """The tables of a run (PAIRS_SCHEMA), and what was left out and why."""

    tables: dict[str, pa.Table]
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    num_truncated: int = 0
    num_listed: int = 0

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over every pair and its side of the split."""
        digest = hashlib.sha256()
        for name in SPLITS:
            digest.update(name.encode())
            if name in self.tables:
                for row in self.tables[name].select(["image_id", "sha256", "reference_captions"]).to_pylist():
                    digest.update(json.dumps(list(row.values()), ensure_ascii=False).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, Any]:
        return {
            "listed": self.num_listed,
            **{name: len(table) for name, table in self.tables.items()},
            "skipped": self.skipped,
            "examples": self.examples,
            "truncated_captions": self.num_truncated,
        }


@dataclass(frozen=True)
class Examine:
    """Table of listed pictures -> PAIRS_SCHEMA: hashed, decoded once, captions measured. Runs on any machine.

    `tokenizer`: the model's directory; `max_tokens`: of a caption, start and end token left out.
    """

    archives: Archives
    spec: PixelSpec
    tokenizer: str
    max_tokens: int | None

    def __call__(self, rows: pa.Table) -> pa.Table:
        from captioner.imaging import decode_images

        known = pc.fill_null(pc.list_value_length(rows["reference_captions"]), 0).to_pylist()
        with_captions = [place for place, count in enumerate(known) if count]
        found = {}
        if with_captions:
            raws = self.archives.read(rows.take(with_captions))
            decoded = decode_images(raws, self.spec, self.archives.max_pixels).rows
            found = dict(zip(with_captions, decoded.to_pylist(), strict=True))
        none = {"sha256": None, "error_code": "no_caption", "error_message": "the picture has no caption"}
        looks = [found.get(place, none) for place in range(len(rows))]
        columns = {name: rows[name] for name in rows.column_names}
        columns |= {name: [look[name] for look in looks] for name in ("sha256", "error_code", "error_message")}
        columns["num_truncated"] = self._too_long(rows["reference_captions"].to_pylist())
        return pa.table({one.name: columns[one.name] for one in PAIRS_SCHEMA}, schema=PAIRS_SCHEMA)

    def _too_long(self, captions: list[list[str] | None]) -> list[int]:
        if self.max_tokens is None:
            return [0] * len(captions)
        flat = [text for some in captions for text in some or []]
        if all(len(text.encode()) <= self.max_tokens for text in flat):  # no token is less than a byte
            return [0] * len(captions)
        ids = _tokenizer(self.tokenizer)(flat, add_special_tokens=False).input_ids
        lengths = iter(map(len, ids))
        return [sum(next(lengths) > self.max_tokens for _ in some or []) for some in captions]


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    from captioner.models.pretrained import open_tokenizer

    return open_tokenizer(path)


def make_pairs(config: TrainDataConfig, examined: Iterable[pa.Table], seed: int) -> Pairs:
    """Sort out what is usable, and split it. Raises SourceError, or UsageError where a split comes out empty."""
    pairs, kept, num_failed = Pairs({}), [], 0
    for table in examined:
        pairs.num_listed += len(table)
        fine = pc.equal(table["error_code"], "")
        bad = table.filter(pc.invert(fine))
        num_failed += len(bad)
        _note_skipped(pairs, bad)
        kept.append(table.filter(fine))
    if not pairs.num_listed:
        raise SourceError(f"{shown(config.path)}: no pictures")
    usable = pa.concat_tables([PAIRS_SCHEMA.empty_table(), *kept]).combine_chunks()
    _check_share(config, pairs, num_failed, len(usable))
    pairs.num_truncated = pc.sum(usable["num_truncated"]).as_py() or 0
    pairs.tables = split(usable, config, seed)
    dropped = len(usable) - sum(map(len, pairs.tables.values()))
    if dropped:
        pairs.skipped["also_in_another_split"] = dropped
    _limit_eval(pairs, config, seed)
    _refuse_empty(pairs, config)
    return pairs


def _note_skipped(pairs: Pairs, bad: pa.Table) -> None:
    counted = Counter(pairs.skipped) + Counter(bad["error_code"].to_pylist())
    pairs.skipped = dict(counted.most_common())
    for row in bad.slice(0, max(0, 20 - len(pairs.examples))).to_pylist():
        pairs.examples.append(f"{row['image_id']}: {row['error_code']}: {row['error_message']}")


def _check_share(config: TrainDataConfig, pairs: Pairs, num_failed: int, num_usable: int) -> None:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in pairs.skipped.items())
    if not num_usable:
        raise SourceError(
            f"{shown(config.path)}: no pairs: {pairs.num_listed:,} pictures ({reasons}); captions come from "
            "metadata.jsonl, .csv, .parquet (file_name and text, caption or captions), a column (--reference-column), "
            "or .txt or .json members"
        )
    if num_failed / pairs.num_listed > config.max_failed:
        raise SourceError(
            f"{shown(config.path)}: {num_failed:,} of {pairs.num_listed:,} pictures are unusable ({reasons}), for "
            f"instance {pairs.examples[0]}; mend them, or allow more with --max-failed"
        )


def split(pairs: pa.Table, config: TrainDataConfig, seed: int) -> dict[str, pa.Table]:
    """Train, eval and perhaps test. By the pictures' sha256, so that no picture and no copy of it is on two sides.

    Test and eval take the pictures with the smallest seeded hashes; pictures of --eval-data and --test-data that are
    in DATA as well are taken out of train (and out of eval where they are test pictures).
    """
    shas, data = pairs["sha256"].to_pylist(), pairs["data"].to_pylist()
    ranked = sorted({sha for sha, number in zip(shas, data, strict=True) if number == 0}, key=_hash_with(seed))
    numbers = {"eval": 1 if config.eval_data else None, "test": (2 if config.eval_data else 1)}
    if not config.test_data:
        numbers["test"] = None
    taken: set[str] = set()
    tables = {}
    for name, fraction in (("test", config.test_fraction), ("eval", config.eval_fraction)):
        if numbers[name] is not None:
            own = {sha for sha, number in zip(shas, data, strict=True) if number == numbers[name]} - taken
            tables[name] = _rows_with(pairs, own, numbers[name] or 0)
        else:
            count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1) if fraction else 0
            own = set([sha for sha in ranked if sha not in taken][:count])
            tables[name] = _rows_with(pairs, own, 0)
        taken |= own
    tables["train"] = _rows_with(pairs, set(ranked) - taken, 0)
    wants_test = config.test_fraction or config.test_data
    return {name: tables[name] for name in SPLITS if name != "test" or wants_test}


def _rows_with(pairs: pa.Table, shas: set[str], data: int) -> pa.Table:
    wanted = pa.array(list(shas), pa.string())
    mask = pc.and_(pc.is_in(pairs["sha256"], value_set=wanted), pc.equal(pairs["data"], data))
    return pairs.filter(mask).combine_chunks()


def _limit_eval(pairs: Pairs, config: TrainDataConfig, seed: int) -> None:
    """Keep the --max-eval-samples pictures with the smallest hashes, in their order."""
    table, most = pairs.tables["eval"], config.max_eval_samples
    if most is not None and len(table) > most:
        key, shas, ids = _hash_with(seed), table["sha256"].to_pylist(), table["image_id"].to_pylist()
        places = sorted(range(len(table)), key=lambda place: (key(shas[place]), ids[place]))[:most]
        pairs.tables["eval"] = table.take(sorted(places))


def _refuse_empty(pairs: Pairs, config: TrainDataConfig) -> None:
    if not len(pairs.tables["train"]):
        raise SourceError(
            f"{shown(config.path)}: no pictures are left to train on; every one is in the eval or test set"
        )
    for name in ("eval", "test"):
        if name in pairs.tables and not len(pairs.tables[name]):
            raise UsageError(
                f"the {name} set is empty: {len(pairs.tables['train']):,} pictures to train on, --{name}-fraction "
                f"{getattr(config, f'{name}_fraction'):g}; raise it, or give --{name}-data"
            )


def _hash_with(seed: int) -> Callable[[str], bytes]:
    return lambda text: blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()


TRAINABLE = ("git", "blip", "vision-encoder-decoder")  # families whose loss is in loss.py


def max_caption_tokens(ref: ModelRef) -> int | None:
    """The longest caption the model has text positions for: start and end token take one each."""
    return None if ref.max_positions is None else ref.max_positions - 2
