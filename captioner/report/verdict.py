"""The verdict on a run in a few sentences, shown first on the page and on the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from captioner.console.text import counted
from captioner.scoring.flags import flag_name
from captioner.scoring.verdicts import percent

Level = Literal["good", "mixed", "bad", "unknown"]
# Lift over shuffled captions. A person's caption of a photo reaches about 0.2 against the best of four others.
GOOD_LIFT, SOME_LIFT = 0.3, 0.1
MANY_FLAGGED = 0.1  # of the captions
# Share of right captions, where people judged them and there are no references.
GOOD_SHARE, SOME_SHARE, MIN_JUDGED = 0.9, 0.7, 30


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict: a level, a title and the sentences that explain it."""

    level: Level
    title: str
    sentences: list[str]


def verdict_of(counts: dict[str, Any], check: dict[str, Any]) -> Verdict:
    """Return the verdict on a run. `counts`: TableCounts as JSON; `check`: the contents of OUT/checks/check.json."""
    sentences = [
        _completeness(counts),
        *_about_scores(check),
        *_about_people(check),
        *_about_flags(check),
        *_about_coverage(counts, check),
    ]
    if check["failed_gates"]:
        return Verdict("bad", "Not good enough", [*map(_capital, check["failed_gates"]), *sentences])
    if not counts["ok"]:
        return Verdict("bad", "No image has a caption", sentences)
    level, title = _level_of(check)
    if level in ("good", "unknown") and (_flagged_share(check) > MANY_FLAGGED or counts["failed"] > counts["ok"]):
        return Verdict("mixed", f"{title}; look at the flags and failures", sentences)
    return Verdict(level, title, sentences)


def _level_of(check: dict[str, Any]) -> tuple[Level, str]:
    lift, spot_check = check["lift"], check.get("spot_check") or {}
    if lift is None and spot_check.get("judged", 0) >= MIN_JUDGED:
        share = spot_check["share"]
        level: Level = "good" if share >= GOOD_SHARE else "mixed" if share >= SOME_SHARE else "bad"
        return level, f"About {100 * share:.0f} of 100 captions are right"
    if lift is None:
        return "unknown", "Captioned, not scored"
    if lift >= GOOD_LIFT:
        return "good", "The captions match their images"
    if lift >= SOME_LIFT:
        return "mixed", "The captions partly match their images"
    return (
        "bad",
        "The captions are no better than shuffled ones"
        if lift <= 0
        else "The captions are hardly better than shuffled ones",
    )


def _completeness(counts: dict[str, Any]) -> str:
    clauses = [f"{counts['ok']:,} of {counted(counts['planned'], 'image')} captioned"]
    clauses += [f"{counts['failed']:,} failed, each with a reason"] if counts["failed"] else []
    remaining = counts["planned"] - counts["ok"] - counts["failed"]
    clauses += [f"{remaining:,} left to do"] if remaining else []
    return "; ".join(clauses) + "."


def _about_scores(check: dict[str, Any]) -> list[str]:
    if check["wer"] is None:
        return [
            "No references: give reference captions with --references to measure how good the captions are."
            if not check["with_references"]
            else "No caption was scored."
        ]
    names = {"shuffled_wer": "captions shuffled", "human_wer": "people"}
    beside = ", ".join(f"{name} {check[key]:.2f}" for key, name in names.items() if check[key] is not None)
    compared = f" ({beside})" if beside else ""
    unit = check.get("unit", "words")  # absent in checks of earlier versions
    measure = "WER" if unit == "words" else f"WER in {unit}"
    return [f"{measure} {check['wer']:.2f}{compared}, {counted(check['num_rows'], 'caption')} scored."]


def _about_people(check: dict[str, Any]) -> list[str]:
    spot_check = check.get("spot_check")
    if not spot_check or spot_check["share"] is None:
        return []
    judges = counted(len(spot_check["reviewers"]), "person", "people")
    return [
        f"{percent(spot_check)} of the captions are right: {judges} judged {spot_check['judged']:,}, drawn at random."
    ]


def _about_flags(check: dict[str, Any]) -> list[str]:
    total, flags = check["survey"]["num_ok"], check["flags"]
    if not flags or not total:
        return []
    flag, count = max(flags.items(), key=lambda item: item[1])
    share = f"{counted(count, 'caption')} ({100 * count / total:.1f} %)"
    return [f"The most frequent flag is “{flag_name(flag)}”: {share}."]


def _about_coverage(counts: dict[str, Any], check: dict[str, Any]) -> list[str]:
    num_rows, num_checked = counts["ok"] + counts["failed"], check["survey"]["num_rows"]
    if num_checked >= num_rows:
        return []
    return [
        f"The table is large: scores, flags and figures are of {num_checked:,} of {counted(num_rows, 'row')}, every "
        "n-th file; captioner check OUT --sample all reads all of them."
    ]


def _flagged_share(check: dict[str, Any]) -> float:
    """Return the share of captions with the most frequent flag; length and confidence are not counted as faults."""
    faults = [count for flag, count in check["flags"].items() if flag not in ("over_125", "low_confidence")]
    share: float = max(faults, default=0) / max(1, check["survey"]["num_ok"])
    return share


def _capital(text: str) -> str:
    return text if text.startswith("--") or not text else text[0].upper() + text[1:] + "."
