"""From listed pairs to usable ones: images that decode and have captions, split into train, eval and test sets."""

from __future__ import annotations

import copy
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
from captioner.console.text import counted
from captioner.errors import SourceError, UsageError
from captioner.files import shown
from captioner.models.families import family_of
from captioner.models.ref import ModelRef
from captioner.models.resolving import find_local
from captioner.training.pair_sources import PAIRS_SCHEMA, PairSources
from captioner.training.pixel_cache import PixelCache

SPLITS = ("train", "eval", "test")
NUM_EXAMPLES = 20  # lines about skipped pairs


@dataclass
class Pairs:
    """The usable pairs of a run by set (tables of PAIRS_SCHEMA), and how many were skipped for which reason.

    `examples`: lines about the first skipped pairs. `num_truncated`: captions longer than the model allows.
    `num_listed`: images; `num_rows`: rows that list them, more where an image has a row for each of its captions.
    """

    tables: dict[str, pa.Table]
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    num_truncated: int = 0
    num_listed: int = 0
    num_rows: int = 0

    @property
    def fingerprint(self) -> str:
        """Return the hex sha256 over every pair and its set."""
        digest = hashlib.sha256()
        for name in SPLITS:
            digest.update(name.encode())
            if name in self.tables:
                for row in self.tables[name].select(["image_id", "sha256", "reference_captions"]).to_pylist():
                    digest.update(json.dumps(list(row.values()), ensure_ascii=False).encode())
        return digest.hexdigest()

    def counts(self) -> dict[str, Any]:
        """Return the figures that pairs.json and the report have."""
        return {
            "listed": self.num_listed,
            "rows": self.num_rows,
            **{name: len(table) for name, table in self.tables.items()},
            "skipped": self.skipped,
            "examples": self.examples,
            "truncated_captions": self.num_truncated,
        }


@dataclass(frozen=True)
class Examine:
    """Completes a table of listed images to PAIRS_SCHEMA: hashes, decodes and measures each pair once. Picklable.

    `model`: its tokenizer counts, found on this machine where it is needed. `pixel_cache`: where decoded images are
    kept for training.
    """

    sources: PairSources
    model: ModelRef
    pixel_cache: PixelCache | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        results = self._decode(rows)
        columns = {name: rows[name] for name in rows.column_names}
        for name in ("sha256", "error_code", "error_message"):
            columns[name] = [result[name] for result in results]
        columns["num_truncated"] = self._num_truncated(rows["reference_captions"].to_pylist())
        return pa.table({name: columns[name] for name in PAIRS_SCHEMA.names}, schema=PAIRS_SCHEMA)

    def _decode(self, rows: pa.Table) -> list[dict[str, Any]]:
        """Return `sha256`, `error_code` and `error_message` of each row.

        Images without captions are not decoded. They are hashed, because other rows of one may have captions, but not
        where no row has any, since such a source is refused.
        """
        counts = pc.fill_null(pc.list_value_length(rows["reference_captions"]), 0).to_pylist()
        without_caption = {"sha256": None, "error_code": "no_caption", "error_message": "the image has no caption"}
        results: list[dict[str, Any]] = [without_caption] * len(rows)
        indices = [index for index, count in enumerate(counts) if count]
        others = [index for index, count in enumerate(counts) if not count]
        if indices:
            batch = self.sources.decode(rows.take(indices), self.model.spec)
            for index, result, pixels in zip(indices, batch.rows.to_pylist(), batch.pixels, strict=True):
                results[index] = result
                if self.pixel_cache is not None and not result["error_code"]:
                    self.pixel_cache.write(result["sha256"], self.model.spec, pixels)
        if indices and others:
            for index, image in zip(others, self.sources.read(rows.take(others)), strict=True):
                if image.data:
                    results[index] = without_caption | {"sha256": hashlib.sha256(image.data).hexdigest()}
        return results

    def _num_truncated(self, captions: list[list[str] | None]) -> list[int]:
        """Return for each image how many of its captions are longer than the model allows."""
        flat = [text for texts in captions for text in texts or []]
        prompt = (self.model.prompt or "") if family_of(self.model.family).prompt == "start" else ""
        fewest = max_caption_tokens(self.model.max_positions, 1 + len(prompt.encode()))
        if fewest is None or all(len(text.encode()) <= fewest for text in flat):  # a token has at least one byte
            return [0] * len(captions)
        longest = max_caption_tokens(self.model.max_positions, 1 + len(self._token_ids([prompt])[0]))
        assert longest is not None
        lengths = iter(map(len, self._token_ids(flat)))
        return [sum(next(lengths) > longest for _ in texts or []) for texts in captions]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = _tokenizer(self.model)(texts, add_special_tokens=False).input_ids
        return ids


@lru_cache(maxsize=1)
def _tokenizer(model: ModelRef) -> Any:
    from captioner.models.pretrained import open_tokenizer

    return plain_text_tokenizer(open_tokenizer(find_local(model).path))


def plain_text_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer for captions, in which the name of a special token is text like any other.

    Captions of LLaVA's data have an "<image>" in them, which chat models would take for the place of an image. It is a
    copy because its setting is one of the Rust tokenizer, and another thread may put questions together meanwhile.
    """
    plain = copy.deepcopy(tokenizer)
    plain.split_special_tokens = True
    return plain


def make_pairs(config: TrainDataConfig, examined: Iterable[pa.Table], seed: int) -> Pairs:
    """Select the usable pairs, join those of one image, and split them.

    Raises SourceError where too few are usable, UsageError where the eval or test set would be empty.
    """
    pairs, usable_tables, failed_tables = Pairs({}), [PAIRS_SCHEMA.empty_table()], [PAIRS_SCHEMA.empty_table()]
    for table in examined:
        pairs.num_rows += len(table)
        is_usable = pc.equal(table["error_code"], "")
        failed_tables.append(table.filter(pc.invert(is_usable)))
        usable_tables.append(table.filter(is_usable))
    if not pairs.num_rows:
        raise SourceError(f"{shown(config.path)}: no images")
    usable = join_captions(pa.concat_tables(usable_tables).combine_chunks())
    num_failed = _count_skipped(pairs, pa.concat_tables(failed_tables), usable)
    pairs.num_listed = len(usable) + num_failed
    _check_num_failed(config, pairs, num_failed, len(usable))
    pairs.num_truncated = pc.sum(usable["num_truncated"]).as_py() or 0
    pairs.tables = split(usable, config, seed)
    num_overlapping = len(usable) - sum(map(len, pairs.tables.values()))
    if num_overlapping:
        pairs.skipped["also_in_another_split"] = num_overlapping
    _limit_eval(pairs, config, seed)
    _refuse_empty(pairs, config, set(usable["data"].to_pylist()))
    return pairs


def join_captions(rows: pa.Table) -> pa.Table:
    """Return one row for each image of a source, the first, with the captions of all its rows, each caption once.

    `rows`: usable pairs. Raises SourceError where one id names two images of a source.
    """
    images = zip(rows["data"].to_pylist(), rows["sha256"].to_pylist(), strict=True)
    first_rows: dict[tuple[int, str], int] = {}
    captions: dict[int, dict[str, None]] = {}  # by first row; a dict for its order
    truncated: Counter[int] = Counter()
    columns = zip(images, rows["reference_captions"].to_pylist(), rows["num_truncated"].to_pylist(), strict=True)
    for row, (image, texts, num_truncated) in enumerate(columns):
        first = first_rows.setdefault(image, row)
        captions.setdefault(first, {}).update(dict.fromkeys(texts))
        truncated[first] += num_truncated
    joined = rows.take(pa.array(list(captions), pa.int64()))
    _refuse_shared_ids(joined)
    values = {
        "reference_captions": [list(texts) for texts in captions.values()],
        "num_truncated": [truncated[row] for row in captions],
    }
    for name, column in values.items():
        field_ = PAIRS_SCHEMA.field(name)
        joined = joined.set_column(joined.schema.get_field_index(name), field_, pa.array(column, field_.type))
    return joined


def _refuse_shared_ids(images: pa.Table) -> None:
    ids: set[tuple[int, str]] = set()
    for key in zip(images["data"].to_pylist(), images["image_id"].to_pylist(), strict=True):
        if key in ids:
            raise SourceError(f"the id {key[1]!r} occurs more than once, with different images; make ids unique")
        ids.add(key)


def _count_skipped(pairs: Pairs, failed: pa.Table, usable: pa.Table) -> int:
    """Count the images of failed rows, each once, and return their number.

    An image of a usable row is not one of them: the others of its rows may lack a caption.
    """
    images: set[tuple[int, str]] = set(zip(usable["data"].to_pylist(), usable["sha256"].to_pylist(), strict=True))
    counts: Counter[str] = Counter()
    for row in failed.select(["data", "sha256", "image_id", "error_code", "error_message"]).to_pylist():
        image = row["data"], row["sha256"] or row["image_id"]
        if image in images:
            continue
        images.add(image)
        counts[row["error_code"]] += 1
        if len(pairs.examples) < NUM_EXAMPLES:
            pairs.examples.append(f"{row['image_id']}: {row['error_code']}: {row['error_message']}")
    pairs.skipped = dict(counts.most_common())
    return counts.total()


def _check_num_failed(config: TrainDataConfig, pairs: Pairs, num_failed: int, num_usable: int) -> None:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in pairs.skipped.items())
    if not num_usable:
        raise SourceError(
            f"{shown(config.path)}: no pairs: {counted(pairs.num_listed, 'image')} ({reasons}); captions come from "
            "metadata.jsonl, .csv, .parquet (file_name and text, caption or captions), a column (--reference-column), "
            "or .txt or .json members"
        )
    if num_failed / pairs.num_listed > config.max_failed:
        raise SourceError(
            f"{shown(config.path)}: {num_failed:,} of {counted(pairs.num_listed, 'image')} unusable ({reasons}), for "
            f"instance {pairs.examples[0]}; fix them, or allow more with --max-failed"
        )


def split(pairs: pa.Table, config: TrainDataConfig, seed: int) -> dict[str, pa.Table]:
    """Split pairs into train, eval and, where one is asked for, test set by their images' sha256.

    No image and no copy of it is in two sets. Test and eval sets take the images with the smallest seeded hashes;
    images of --eval-data and --test-data that are in DATA as well are removed from train (and from eval where they are
    test images).
    """
    shas, numbers = pairs["sha256"].to_pylist(), pairs["data"].to_pylist()
    shas_by_source: dict[int, set[str]] = {}
    for sha, number in zip(shas, numbers, strict=True):
        shas_by_source.setdefault(number, set()).add(sha)
    ranked = sorted(shas_by_source.get(0, set()), key=_hash_with(seed))
    taken: set[str] = set()
    tables = {}
    for name, number, fraction in _held_out_sets(config):
        if number:
            chosen = shas_by_source.get(number, set()) - taken
        else:
            count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1) if fraction else 0
            chosen = set([sha for sha in ranked if sha not in taken][:count])
        tables[name] = _rows_with(pairs, chosen, number)
        taken |= chosen
    tables["train"] = _rows_with(pairs, set(ranked) - taken, 0)
    has_test = config.test_fraction or config.test_data
    return {name: tables[name] for name in SPLITS if name != "test" or has_test}


def _held_out_sets(config: TrainDataConfig) -> list[tuple[str, int, float]]:
    """Return (set, number of its source, fraction of DATA): 0 is DATA itself. The test set is chosen first."""
    eval_source = 1 if config.eval_data else 0
    test_source = eval_source + 1 if config.test_data else 0
    return [("test", test_source, config.test_fraction), ("eval", eval_source, config.eval_fraction)]


def _rows_with(pairs: pa.Table, shas: set[str], number: int) -> pa.Table:
    """Return the pairs of one source whose images have one of these hashes."""
    has_sha = pc.is_in(pairs["sha256"], value_set=pa.array(list(shas), pa.string()))
    return pairs.filter(pc.and_(has_sha, pc.equal(pairs["data"], number))).combine_chunks()


def _limit_eval(pairs: Pairs, config: TrainDataConfig, seed: int) -> None:
    """Keep the --max-eval-samples images with the smallest hashes, in their order."""
    table, limit = pairs.tables["eval"], config.max_eval_samples
    if limit is not None and len(table) > limit:
        key, shas, ids = _hash_with(seed), table["sha256"].to_pylist(), table["image_id"].to_pylist()
        indices = sorted(range(len(table)), key=lambda index: (key(shas[index]), ids[index]))[:limit]
        pairs.tables["eval"] = table.take(sorted(indices))


def _refuse_empty(pairs: Pairs, config: TrainDataConfig, numbers: set[int]) -> None:
    """Raise an error where a set is empty. `numbers`: of the sources that have usable images."""
    if not len(pairs.tables["train"]):
        raise SourceError(f"{shown(config.path)}: no images are left to train on; every one is in the eval or test set")
    for name, number, fraction in _held_out_sets(config):
        if name not in pairs.tables or len(pairs.tables[name]):
            continue
        if number:
            why = (
                "every one of its images is in the test set" if number in numbers else "none of its images can be used"
            )
            path = getattr(config, f"{name}_data")
            raise UsageError(f"the {name} set is empty: --{name}-data {shown(path)}: {why}; give other images")
        raise UsageError(
            f"the {name} set is empty: {counted(len(pairs.tables['train']), 'image')} to train on, "
            f"--{name}-fraction {fraction:g}; raise it, or give --{name}-data"
        )


def _hash_with(seed: int) -> Callable[[str], bytes]:
    return lambda text: blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()


# The families that `CaptionLoss` supports.
TRAINABLE = (
    "git",
    "blip",
    "blip-2",
    "vision-encoder-decoder",
    "florence2",
    "idefics3",
    "smolvlm",
    "qwen2_vl",
    "qwen2_5_vl",
)


def max_caption_tokens(max_positions: int | None, num_start: int) -> int | None:
    """Return how many tokens a caption may have after `num_start` tokens, the start token and the prompt.

    Without a prompt one text position is left for the end token, although training does not read that token.
    """
    return None if max_positions is None else max_positions - max(num_start, 2)
