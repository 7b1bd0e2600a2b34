"""What a run comes to, in a few words: the first thing on the page and on the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["good", "mixed", "bad", "unknown"]
# Lift over shuffled captions. People who describe the same photo reach about 0.2 against the best of four others.
GOOD_LIFT, SOME_LIFT = 0.3, 0.1
MANY_FLAGGED = 0.1  # of the captions


@dataclass(frozen=True, slots=True)
class Verdict:
    level: Level
    title: str
    sentences: list[str]


def verdict_of(counts: dict[str, Any], check: dict[str, Any]) -> Verdict:
    """`counts`: TableCounts as JSON; `check`: what OUT/checks/check.json holds."""
    sentences = [_completeness(counts), *_about_scores(check), *_about_flags(check), *_about_the_part(counts, check)]
    if check["failed_gates"]:
        return Verdict("bad", "Not good enough", [*map(_capital, check["failed_gates"]), *sentences])
    if not counts["ok"]:
        return Verdict("bad", "No picture has a caption", sentences)
    level, title = _judged(check)
    if level in ("good", "unknown") and (_flagged_share(check) > MANY_FLAGGED or counts["failed"] > counts["ok"]):
        return Verdict("mixed", f"{title}, but look closer", sentences)
    return Verdict(level, title, sentences)


def _judged(check: dict[str, Any]) -> tuple[Level, str]:
    lift = check["lift"]
    if lift is None:
        return "unknown", "Captioned; nothing says how right the captions are"
    if lift >= GOOD_LIFT:
        return "good", "The captions fit their pictures"
    if lift >= SOME_LIFT:
        return "mixed", "The captions fit their pictures in part"
    return "bad", "The captions hardly fit their pictures"


def _completeness(counts: dict[str, Any]) -> str:
    words = [f"{counts['ok']:,} of {counts['planned']:,} pictures have a caption"]
    words += [f"{counts['failed']:,} failed, each with a reason"] if counts["failed"] else []
    waiting = counts["planned"] - counts["ok"] - counts["failed"]
    words += [f"{waiting:,} are still to be done"] if waiting else []
    return "; ".join(words) + "."


def _about_scores(check: dict[str, Any]) -> list[str]:
    if check["wer"] is None:
        return [
            "No references: give known captions with --references to learn how right the captions are."
            if not check["with_references"]
            else "No caption was scored."
        ]
    words = (
        f"{check['wer']:.2f} word errors for each word of the reference (WER, {check['num_rows']:,} captions scored)"
    )
    if check["shuffled_wer"] is not None:
        words += f"; the same captions on other pictures have {check['shuffled_wer']:.2f}"
    if check["human_wer"] is not None:
        words += f", one person against the others {check['human_wer']:.2f}"
    return [words + "."]


def _about_flags(check: dict[str, Any]) -> list[str]:
    total, flags = check["survey"]["num_ok"], check["flags"]
    if not flags or not total:
        return []
    flag, count = max(flags.items(), key=lambda item: item[1])
    return [f"The most frequent flag is “{flag.replace('_', ' ')}”: {count:,} captions ({100 * count / total:.1f} %)."]


def _about_the_part(counts: dict[str, Any], check: dict[str, Any]) -> list[str]:
    there, seen = counts["ok"] + counts["failed"], check["survey"]["num_rows"]
    if seen >= there:
        return []
    return [
        f"The table is large: scores, flags and figures are of {seen:,} of its {there:,} rows, every n-th file; "
        "captioner check takes all of them."
    ]


def _flagged_share(check: dict[str, Any]) -> float:
    """Of the flag that most captions have; length and confidence are no faults."""
    faults = [count for flag, count in check["flags"].items() if flag not in ("over_125", "low_confidence")]
    return max(faults, default=0) / max(1, check["survey"]["num_ok"])


def _capital(text: str) -> str:
    return text if text.startswith("--") or not text else text[0].upper() + text[1:] + "."
