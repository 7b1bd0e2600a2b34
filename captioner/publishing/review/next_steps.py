"""The end of a review: how many images have which decision, and the commands that come next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captioner.console.text import shell_command

_WORDS = {
    "approved": "approved",
    "edited": "edited",
    "decorative": "decorative",
    "rejected": "rejected",
    "expert": "left for an expert",
    "undecided": "undecided",
}


def describe_counts(counts: dict[str, int]) -> str:
    """Return the numbers of images as one line. `counts`: of each filter of the grid."""
    parts = [f"{counts[kind]:,} {word}" for kind, word in _WORDS.items() if counts[kind]]
    return f"{', '.join(parts) or 'no image'} (of {counts['all']:,})"


def next_commands(out: str, reviewer: str, counts: dict[str, int]) -> list[dict[str, Any]]:
    """Return {"purpose", "command"} of what can be done with the decisions.

    Each command runs as it is, but for SITE. `out`: the absolute path of the table. DEST is a new name beside it.
    """
    num_texts = counts["approved"] + counts["edited"]
    commands: list[tuple[str, list[str]]] = []
    if counts["undecided"]:
        commands.append(("Go on reviewing", ["review", out, "--reviewer", reviewer]))
    if num_texts or counts["decorative"]:
        commands.append(("A spreadsheet of the texts", ["export", out, _free(f"{out}-texts.csv"), "--to", "csv"]))
        commands.append(
            (
                "Copies of web pages with their missing alt texts; SITE is the folder of your pages",
                ["export", out, _free(f"{out}-pages"), "--to", "html", "--html-dir", "SITE"],
            )
        )
    if num_texts:
        commands.append(("Sidecar files with IPTC alt text", ["export", out, _free(f"{out}-xmp"), "--to", "xmp"]))
        commands.append(("Training pairs, to teach the model", ["feedback", out, _free(f"{out}-pairs")]))
    return [{"purpose": purpose, "command": shell_command(*words)} for purpose, words in commands]


def _free(path: str) -> str:
    """Return the path, or with a number in its name where it exists."""
    first = Path(path)
    candidate, number = first, 2
    while candidate.exists():
        candidate = first.with_name(f"{first.stem}-{number}{first.suffix}")
        number += 1
    return str(candidate)
