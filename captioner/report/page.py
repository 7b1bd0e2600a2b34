"""Render the facts as one self-contained HTML page without scripts or network access; all data is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from captioner.console.text import counted, printable
from captioner.report import charts
from captioner.report.page_images import MAX_BYTES
from captioner.scoring.flags import flag_name
from captioner.scoring.normalise import normalise, split_words
from captioner.scoring.verdicts import VERDICT_LABELS, agreement_line, percent

_FLAG = re.compile(r"((?<![\w-])--[a-z][\w-]*)")


def render(facts: dict[str, Any], images: Mapping[str, str]) -> str:
    """Return the page. `images`: data URIs of thumbnails by image id."""
    check, survey = facts["check"], facts["check"]["survey"]
    return _template().render(
        facts=facts,
        check=check,
        survey=survey,
        unit=check.get("unit", "words"),  # absent in checks of earlier versions
        run=facts["run"],
        image=_Thumbnails(images),
        charts=_charts(facts),
        worst=[row for row in check["shown"]["worst"] if row["wer"] > 0],
        spot_check=check.get("spot_check"),
        flagged={flag: check["shown"].get(flag, []) for flag in check["flags"]},
        diff=word_diff,
        when=_when,
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = template_environment()
    environment.filters |= {"number": _number, "decimal": _decimal, "interval": _interval, "words": _words}
    environment.filters |= {
        "percent": _percent,
        "capital": _capital,
        "flag_name": flag_name,
        "whole_flags": _whole_flags,
    }
    environment.filters |= {"share": percent, "agreement": agreement_line, "verdict": VERDICT_LABELS.__getitem__}
    environment.filters |= {"moment": _moment, "counted": counted}
    return environment.get_template("page.html")


def template_environment() -> Environment:
    """Return what the templates of this package are rendered in."""
    loader = PackageLoader("captioner", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = printable
    return environment


class _Thumbnails:
    """Returns thumbnails until their total size reaches MAX_BYTES."""

    def __init__(self, uris: Mapping[str, str]) -> None:
        self._uris, self._left = uris, MAX_BYTES

    def __call__(self, image_id: str) -> str:
        uri = self._uris.get(image_id, "")
        self._left -= len(uri)
        return uri if self._left >= 0 else ""


def _charts(facts: dict[str, Any]) -> dict[str, Markup | None]:
    check, survey = facts["check"], facts["check"]["survey"]
    return {
        "wer": _wer_histogram(check),
        "throughput": _throughput(facts["throughput"]),
        "stages": _stages(facts["stages"]),
        "lengths": _lengths(survey),
        "confidence": _confidence(survey),
        "wer_by_confidence": _wer_by_confidence(check["wer_by_confidence"]),
    }


def _wer_histogram(check: dict[str, Any]) -> Markup | None:
    if not check["num_rows"]:
        return None
    labels = ["0", *[f"{n / 10:.1f}" if n and n % 5 == 0 else "" for n in range(20)], "2+"]
    names = {"wer": "this run", "shuffled_wer": "shuffled", "human_wer": "people"}
    rates = [(check[key], name) for key, name in names.items() if check[key] is not None]
    marks = [(1 + 10 * min(2.0, value), f"{name} {value:.2f}") for value, name in rates]
    description = (
        f"WER of {counted(check['num_rows'], 'caption')}, clipped at 2; {check['exact']:,} without an error. "
        + ", ".join(f"{name} {value:.3f}" for value, name in rates)
    )
    return charts.bars(check["wer_histogram"], labels, description, marks)


def _throughput(throughput: dict[str, Any]) -> Markup | None:
    rates, width = throughput["rates"], throughput["bin_seconds"]
    if len(rates) < 2:
        return None
    last = len(rates) - 1
    labels = [_span(index * width) if index in (0, last // 2, last) else "" for index in range(len(rates))]
    description = f"Images per second over {_span(len(rates) * width)}: at most {max(rates):,.1f}."
    return charts.bars(rates, labels, description)


def _stages(stages: list[dict[str, Any]]) -> Markup | None:
    if not stages:
        return None
    parts = [(stage["stage"], stage["seconds"]) for stage in stages]
    return charts.shares(parts, "Seconds by stage: " + ", ".join(f"{name} {value:,.1f}" for name, value in parts))


def _lengths(survey: dict[str, Any]) -> Markup | None:
    counts = {int(start): count for start, count in survey["char_lengths_by_10"].items()}
    if not counts:
        return None
    bins = range(0, max(260, min(max(counts), 400) + 10), 10)
    values = [counts.get(start, 0) for start in bins]
    labels = [str(start) if start % 50 == 0 else "" for start in bins]
    description = f"Length of captions in characters; {survey['over_125']:,} over 125, {survey['over_250']:,} over 250."
    return charts.bars(values, labels, description, [(12.5, "125"), (25, "250")])


def _confidence(survey: dict[str, Any]) -> Markup | None:
    counts = {float(low): count for low, count in survey["logprobs"].items()}
    if not counts:
        return None
    low = min(-0.1, max(-5.0, min(counts)))
    values, width = [0.0] * 20, -low / 20
    for value, count in counts.items():
        values[max(0, min(19, int((value - low) / width)))] += count
    labels = [f"{low + index * width:.2g}" if index % 5 == 0 else "" for index in range(20)]
    return charts.bars(values, labels, "Mean log-probability of the tokens of each caption; 0 is certain.")


def _wer_by_confidence(groups: list[dict[str, float]]) -> Markup | None:
    if len(groups) < 2:
        return None
    rates = [group["wer"] for group in groups]
    labels = ["lowest", *[""] * (len(groups) - 2), "highest"]
    figures = ", ".join(f"{rate:.2f}" for rate in rates)
    return charts.bars(rates, labels, f"WER by confidence, from the tenth with the lowest log-probability: {figures}")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _moment(timestamp: str) -> str:
    return _when(datetime.fromisoformat(timestamp).timestamp())


def _number(value: float | None) -> str:
    return "no data" if value is None else f"{value:,}"


def _decimal(value: float | None, digits: int = 3) -> str:
    return "no data" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 avoids "-0.00"


def _percent(value: float | None) -> str:
    return "no data" if value is None else f"{100 * value:.0f} %"


def _interval(value: list[float] | None) -> str:
    return "" if value is None else f"{_decimal(value[0])} to {_decimal(value[1])}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _whole_flags(text: str) -> Markup:
    """Return a text as HTML in which no flag is broken after its hyphens; what is copied from it is the same text."""
    flag = Markup('<span class="word">{}</span>')
    parts = _FLAG.split(printable(text))
    return Markup("").join(flag.format(part) if _FLAG.fullmatch(part) else part for part in parts)


def _words(name: str) -> str:
    return name.replace("_", " ")


Piece = tuple[str, str]  # "same", "missing" (in the reference only) or "added" (in the caption only); words


def word_diff(reference: str, caption: str) -> list[Piece]:
    """Return the difference between a reference and a caption in pieces of words; both normalised as for WER."""
    import jiwer

    expected, actual = split_words(normalise(reference)), split_words(normalise(caption))
    if not expected or not actual:
        return [piece for piece in (("missing", " ".join(expected)), ("added", " ".join(actual))) if piece[1]]
    pieces: list[Piece] = []
    for chunk in jiwer.process_words(" ".join(expected), " ".join(actual)).alignments[0]:
        missing = " ".join(expected[chunk.ref_start_idx : chunk.ref_end_idx])
        added = " ".join(actual[chunk.hyp_start_idx : chunk.hyp_end_idx])
        if chunk.type == "equal":
            pieces.append(("same", missing))
        else:
            pieces += [piece for piece in (("missing", missing), ("added", added)) if piece[1]]
    return pieces
