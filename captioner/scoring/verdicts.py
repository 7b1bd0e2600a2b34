"""Spot-checks of captions by people: draw the sample, and compute the share of right captions from their verdicts.

draw       the images to look at, the same for every reviewer
figures    shares with their intervals, for all captions and for each stratum, and the agreement of reviewers
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from captioner.console.text import counted, printable
from captioner.data import STATUS_OK
from captioner.scoring.sample import LowestRanks, rank
from captioner.store.journal import SPOT_CHECKS, VERDICTS, Review, read_reviews
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable

SETTINGS_FILE = f"{SPOT_CHECKS}/sample.json"
FOLDER_OF_IMAGE = "folder"  # --by: not a column, but the folder of the image id
MIN_OF_STRATUM = 10  # captions of each stratum that has as many, so that its interval says something
MARGIN = 0.02  # half of the interval that "how many more" aims at
NUM_SHOWN = 24  # captions with faults, in the report
MAX_NAMED = 8  # strata on the terminal
VERDICT_LABELS = {
    "right": "right",
    "small_fault": "with a small fault",
    "wrong": "wrong",
    "offensive": "offensive",
}
_COLUMNS = ["image_id", "caption", "uri", "width", "height", "num_bytes", "logprob_mean", "flags"]
_COLUMNS += ["chunk_id", "chunk_row"]
_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Which captions people look at: `size` of them, drawn by `seed`, stratified `by` a column or the folder."""

    size: int = 200
    seed: int = 0
    by: str = ""


@dataclass(frozen=True, slots=True)
class SampledCaption:
    """A row of the table to look at. `row`: the columns _COLUMNS."""

    stratum: str
    row: dict[str, Any]

    @property
    def image_id(self) -> str:
        return str(self.row["image_id"])

    @property
    def text(self) -> str:
        return self.row["caption"] or ""


@dataclass(frozen=True, slots=True)
class Sample:
    """The captions to look at, in random order, and the number of captions in each stratum of the table."""

    spec: SampleSpec
    captions: list[SampledCaption]
    strata: dict[str, int]


def draw(table: CaptionsTable, spec: SampleSpec) -> Sample:
    """Draw captions by the hash of their image ids and the seed; a larger sample holds the smaller one.

    Of several strata each gets its share, but at least MIN_OF_STRATUM where it and the sample have as many. `by` must
    be one of `columns_to_stratify`.
    """
    by = [] if spec.by in ("", FOLDER_OF_IMAGE) else [spec.by]
    strata: Counter[str] = Counter()
    drawn: dict[str, LowestRanks[SampledCaption]] = {}
    for part in read_parts(table, list(dict.fromkeys([*_COLUMNS, "status", *by]))):
        rows = part.filter(pc.equal(part["status"], STATUS_OK))
        for stratum, indices in _strata_of(rows, spec.by).items():
            strata[stratum] += len(indices)
            lowest = drawn.setdefault(stratum, LowestRanks(spec.size))
            for row_rank, row in _lowest_rows(rows.select(_COLUMNS), indices, spec):
                lowest.offer(row_rank, row["image_id"], SampledCaption(stratum, row))
    counts = allocate(strata, spec.size)
    captions = [caption for name, lowest in drawn.items() for caption in itertools.islice(lowest, counts[name])]
    captions.sort(key=lambda caption: (rank(caption.image_id, spec.seed), caption.image_id))
    return Sample(spec, captions, dict(sorted(strata.items())))


def columns_to_stratify(table: CaptionsTable) -> list[str]:
    """Return what a sample can be stratified by: the folder, or a column with single values."""
    columns = [field for field in table.schema if not pa.types.is_nested(field.type)]
    return [FOLDER_OF_IMAGE, *(field.name for field in columns if "binary" not in str(field.type))]


def _strata_of(rows: pa.Table, by: str) -> dict[str, list[int]]:
    """Return the indices of the rows of each stratum."""
    if by == FOLDER_OF_IMAGE:
        names = [image_id.rpartition("/")[0] or "(no folder)" for image_id in rows["image_id"].to_pylist()]
    elif by:
        names = ["(none)" if value is None else printable(value) for value in rows[by].to_pylist()]
    else:
        return {"": list(range(rows.num_rows))} if rows.num_rows else {}
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        indices.setdefault(name, []).append(index)
    return indices


def _lowest_rows(rows: pa.Table, indices: list[int], spec: SampleSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield those rows of a stratum of one part that may be in the sample, with their ranks."""
    ids = rows["image_id"].take(pa.array(indices)).to_pylist()
    ranks = np.fromiter((rank(image_id, spec.seed) for image_id in ids), np.uint64, len(ids))
    lowest = np.argsort(ranks, kind="stable")[: spec.size]
    for position, row in zip(lowest, rows.take(pa.array(np.array(indices)[lowest])).to_pylist(), strict=True):
        yield int(ranks[position]), row


def allocate(strata: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide a sample among strata in proportion to their sizes, at least MIN_OF_STRATUM to each where possible."""
    floor = min(MIN_OF_STRATUM, total // max(1, len(strata)))
    counts = {name: min(size, floor) for name, size in strata.items()}
    thinnest = [(counts[name] / size, name) for name, size in strata.items() if counts[name] < size]
    heapq.heapify(thinnest)
    for _ in range(total - sum(counts.values())):
        if not thinnest:
            break
        _, name = heapq.heappop(thinnest)
        counts[name] += 1
        if counts[name] < strata[name]:
            heapq.heappush(thinnest, (counts[name] / strata[name], name))
    return counts


def wilson(successes: float, trials: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion, which holds for few trials and near 0 and 1 too.

    Source: E. B. Wilson, Probable Inference, JASA 22, 1927.
    """
    share, spread = successes / trials, _Z95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = _Z95 / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def trials_for(share: float, margin: float = MARGIN) -> int:
    """Return the smallest number of trials with which the Wilson interval of a share is at most ±`margin`."""
    low, high = 1, 10_000
    while low < high:
        middle = (low + high) // 2
        lower, upper = wilson(share * middle, middle)
        low, high = (low, middle) if upper - lower <= 2 * margin else (middle + 1, high)
    return low


@dataclass(frozen=True, slots=True)
class Share:
    """How many captions are right. `low`, `high`: the 95 % interval; `more`: captions to look at for ±2 %.

    Of `captions`, `judged` were looked at. The share is None where none was.
    """

    captions: int
    judged: int
    right: int
    share: float | None = None
    low: float | None = None
    high: float | None = None
    more: int = 0


def share_of(judged: Sequence[tuple[str, bool]], strata: Mapping[str, int]) -> Share:
    """Return the share of right captions. `judged`: stratum, and whether the caption is right.

    A caption counts for all captions of its stratum that it stands for. The interval is Wilson's, with the number of
    trials that gives the same variance without these weights (L. Kish, Survey Sampling, 1965); where every caption was
    looked at, the share is exact.
    """
    population, right = sum(strata.values()), sum(is_right for _, is_right in judged)
    if not judged:
        return Share(population, 0, 0)
    looked_at = Counter(stratum for stratum, _ in judged)
    weights = [strata[stratum] / looked_at[stratum] for stratum, _ in judged]
    share = sum(weight for weight, (_, is_right) in zip(weights, judged, strict=True) if is_right) / sum(weights)
    trials = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    low, high = (share, share) if len(judged) == population else wilson(share * trials, trials)
    more = max(0, min(population, math.ceil(trials_for(share) * len(judged) / trials)) - len(judged))
    return Share(population, len(judged), right, share, low, high, more)


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Return Cohen's kappa of two reviewers' verdicts about the same captions; None where chance alone explains all.

    Source: J. Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    first, second = (Counter(verdicts) for verdicts in zip(*pairs, strict=True))
    same = sum(verdict == other for verdict, other in pairs) / len(pairs)
    by_chance = sum(first[verdict] * second[verdict] for verdict in first) / len(pairs) ** 2
    return None if by_chance == 1 else (same - by_chance) / (1 - by_chance)


def read_spec(table: CaptionsTable) -> SampleSpec | None:
    """Return the sample that people of this table look at; None when there is none yet.

    A column that the table no longer has, after --overwrite, is left out.
    """
    record = table.directory.read_record(SETTINGS_FILE) if table.directory.exists(SETTINGS_FILE) else {}
    try:
        spec = SampleSpec(int(record["size"]), int(record["seed"]), str(record["by"])) if record else None
    except (KeyError, TypeError, ValueError):
        return None
    return replace(spec, by="") if spec and spec.by not in columns_to_stratify(table) else spec


def write_spec(table: CaptionsTable, spec: SampleSpec) -> None:
    """Note the sample that people look at from now on."""
    table.directory.write_json(SETTINGS_FILE, asdict(spec))


def figures(table: CaptionsTable) -> dict[str, Any] | None:
    """Return the figures of the spot-check of a table; None when there is none. See `figures_of`."""
    spec = read_spec(table)
    if spec is None:
        return None
    return figures_of(draw(table, spec), read_reviews(table.directory, SPOT_CHECKS)[0])


def figures_of(sample: Sample, reviews: Iterable[Review]) -> dict[str, Any]:
    """Return the figures of a sample as check.json holds them.

    Of each reviewer the latest verdict about a caption counts; where reviewers differ, the worse one. Verdicts about
    images outside of the sample, and about captions that have changed since, are counted and not used.
    """
    latest = {(review.image_ids[0], review.reviewer): review for review in reviews if review.decision in VERDICTS}
    captions = {caption.image_id: caption for caption in sample.captions}
    by_image: dict[str, dict[str, str]] = {}
    outside = changed = 0
    for (image_id, reviewer), review in latest.items():
        outside += image_id not in captions
        if image_id in captions and review.shown != captions[image_id].text:
            changed += 1
        elif image_id in captions:
            by_image.setdefault(image_id, {})[reviewer] = review.decision
    worst = {image_id: max(verdicts.values(), key=VERDICTS.index) for image_id, verdicts in by_image.items()}
    judged = [(captions[image_id].stratum, verdict == "right") for image_id, verdict in worst.items()]
    return {
        **asdict(sample.spec),
        **asdict(share_of(judged, sample.strata)),
        "sampled": len(sample.captions),
        "verdicts": {verdict: list(worst.values()).count(verdict) for verdict in VERDICTS},
        "strata": _shares_of_strata(judged, sample.strata) if sample.spec.by else {},
        "reviewers": dict(sorted(Counter(name for verdicts in by_image.values() for name in verdicts).items())),
        "agreement": list(_agreements(by_image)),
        "outside": outside,
        "changed": changed,
        "shown": _with_faults(sample, worst),
    }


def _shares_of_strata(judged: list[tuple[str, bool]], strata: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    inside: dict[str, list[tuple[str, bool]]] = {name: [] for name in strata}
    for stratum, is_right in judged:
        inside[stratum].append((stratum, is_right))
    return {name: asdict(share_of(verdicts, {name: strata[name]})) for name, verdicts in inside.items()}


def _agreements(by_image: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the agreement of each two reviewers who have seen the same captions."""
    names = sorted({name for verdicts in by_image.values() for name in verdicts})
    for first, second in itertools.combinations(names, 2):
        both = [
            (verdicts[first], verdicts[second])
            for verdicts in by_image.values()
            if first in verdicts and second in verdicts
        ]
        if both:
            same = sum(verdict == other for verdict, other in both)
            yield {"reviewers": [first, second], "captions": len(both), "same": same, "kappa": kappa(both)}


def _with_faults(sample: Sample, worst: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the captions that people called faulty, the worst first, as the report shows them."""
    names = ("image_id", "caption", "logprob_mean", "flags", "chunk_id", "chunk_row")
    faulty = [caption for caption in sample.captions if worst.get(caption.image_id, "right") != "right"]
    faulty.sort(key=lambda caption: -VERDICTS.index(worst[caption.image_id]))
    return [
        {name: caption.row[name] for name in names} | {"verdict": worst[caption.image_id]}
        for caption in faulty[:NUM_SHOWN]
    ]


def describe(spot_check: Mapping[str, Any]) -> list[str]:
    """Return the figures of a spot-check in lines, for the terminal."""
    verdicts = ", ".join(f"{spot_check['verdicts'][verdict]:,} {VERDICT_LABELS[verdict]}" for verdict in VERDICTS)
    lines = [
        f"{percent(spot_check)} of the captions are right ({counted(spot_check['judged'], 'caption')} judged of "
        f"{spot_check['captions']:,}: {verdicts})"
        if spot_check["judged"]
        else "nobody has judged a caption of the sample yet"
    ]
    if spot_check["more"] and spot_check["judged"]:
        lines.append(f"for an interval of ±2 %, look at {counted(spot_check['more'], 'more caption')}")
    strata = sorted(spot_check["strata"].items(), key=lambda item: -item[1]["captions"])
    lines += [
        f"  {printable(name)}: {percent(share)} of {counted(share['judged'], 'caption')}"
        for name, share in strata[:MAX_NAMED]
    ]
    if len(strata) > MAX_NAMED:
        lines.append(f"  {len(strata) - MAX_NAMED:,} more are in the report")
    lines += [agreement_line(agreement) for agreement in spot_check["agreement"]]
    if spot_check["changed"]:
        lines.append(f"not counted: {counted(spot_check['changed'], 'verdict')} about a caption that has changed since")
    if spot_check["outside"]:
        lines.append(f"not counted: {counted(spot_check['outside'], 'verdict')} about an image outside of this sample")
    return lines


def percent(share: Mapping[str, Any]) -> str:
    """Return a share with its interval, such as "71.0 % (95 % interval 64.4 to 76.8 %)"; "no data" without one."""
    if share["share"] is None:
        return "no data"
    return f"{100 * share['share']:.1f} % (95 % interval {100 * share['low']:.1f} to {100 * share['high']:.1f} %)"


def agreement_line(agreement: Mapping[str, Any]) -> str:
    """Return the agreement of two reviewers as a sentence."""
    first, second = map(printable, agreement["reviewers"])
    value = "undefined" if agreement["kappa"] is None else f"{agreement['kappa']:.2f}"
    captions = counted(agreement["captions"], "caption")
    return f"{first} and {second} agree on {agreement['same']:,} of {captions} that both saw (Cohen's kappa {value})"
