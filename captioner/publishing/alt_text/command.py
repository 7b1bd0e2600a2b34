"""Alt texts of a captions table: OUT/alt_text, beside it row for row."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from captioner.config import AltTextConfig
from captioner.console.text import printable
from captioner.errors import OK, UsageError
from captioner.publishing.alt_text.findings import FINDINGS, Captioned, findings
from captioner.publishing.alt_text.rules import RULES, Limits, apply_rules
from captioner.publishing.alt_text.schemas import ALT_TEXT_SCHEMA
from captioner.publishing.alt_text.texts import SETTINGS_FILE, alt_text_name, require_finished
from captioner.scoring.terms import finder, read_terms
from captioner.store.lock import sole_writer
from captioner.store.read import read_parts
from captioner.store.table import CaptionsTable, open_table

_COLUMNS = ["image_id", "caption", "width", "height", "run_id", "created_at"]


@dataclass
class Made:
    """What was made: how many texts, how many each rule changed, how many have each flag."""

    num_texts: int = 0
    num_changed: int = 0
    num_uncaptioned: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)


def run(out: str, settings: AltTextConfig) -> int:
    """Make the alt texts of OUT and print what was done; returns the exit code. Raises CaptionerError."""
    table = open_table(out)
    with sole_writer(out):
        made = make_alt_texts(table, settings)
    _print(out, made)
    return OK


def make_alt_texts(table: CaptionsTable, settings: AltTextConfig) -> Made:
    """Write OUT/alt_text, one file for each part of the table, and its settings last: while they are not there, the alt
    texts are not complete. Texts of an earlier call are replaced.

    Raises UsageError for unknown rules and limits that exclude each other, OutputError where the table is not
    finished.
    """
    rules, limits = chosen_rules(settings), _limits(settings)
    terms = read_terms(settings.terms) if settings.terms else ()
    require_finished(table)
    made = Made()
    maker = _Maker(rules, limits, finder(terms), made)
    table.directory.delete(SETTINGS_FILE)
    for part, rows in zip(sorted(table.published_parts()), read_parts(table, _COLUMNS), strict=True):
        table.directory.write_table(alt_text_name(part), maker.rows(rows))
    table.directory.write_json(SETTINGS_FILE, _record(settings, rules, terms, made))
    return made


def chosen_rules(settings: AltTextConfig) -> tuple[str, ...]:
    """The names of the rules to apply, in their order. Raises UsageError naming an unknown one and its like."""
    for flag, names in (("--rules", settings.rules), ("--no-rule", settings.no_rule)):
        for name in names:
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"rules are {', '.join(RULES)}"
                raise UsageError(f"{flag} {name}: no such rule; {hint}")
    wanted = settings.rules or list(RULES)
    return tuple(name for name in RULES if name in wanted and name not in settings.no_rule)


def _limits(settings: AltTextConfig) -> Limits:
    if settings.hard_max < settings.max_chars:
        raise UsageError(f"--hard-max {settings.hard_max}: must not be less than --max-chars {settings.max_chars}")
    return Limits(settings.max_chars, settings.hard_max)


@dataclass
class _Maker:
    """Makes the rows of a part; byte-equal pictures and dull models say the same again and again, so texts are kept."""

    names: tuple[str, ...]
    limits: Limits
    holds_term: Callable[[str], bool]
    made: Made

    def rows(self, rows: pa.Table) -> pa.Table:
        """A part's rows of ALT_TEXT_SCHEMA."""
        known: dict[str, tuple[str, list[str]]] = {}
        texts, changed, flags = [], [], []
        for caption, width, height in zip(*(rows[name].to_pylist() for name in _COLUMNS[1:4]), strict=True):
            text: str | None = None
            rules: list[str] = []
            found: list[str] = []
            if caption is not None:
                if caption not in known:
                    known[caption] = apply_rules(caption, self.limits, self.names)
                text, rules = known[caption]
                found = findings(Captioned(caption, text, tuple(rules), width, height), self.holds_term)
            self._count(text, rules, found)
            texts.append(text)
            changed.append(rules)
            flags.append(found)
        columns = {"alt_text": texts, "rules": changed, "flags": flags}
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else rows[field.name].combine_chunks()
            for field in ALT_TEXT_SCHEMA
        ]
        return pa.table(arrays, schema=ALT_TEXT_SCHEMA)

    def _count(self, text: str | None, rules: list[str], flags: list[str]) -> None:
        self.made.num_uncaptioned += text is None
        self.made.num_texts += text is not None
        self.made.num_changed += bool(rules)
        self.made.rules.update(rules)
        self.made.flags.update(flags)


def _record(settings: AltTextConfig, rules: tuple[str, ...], terms: tuple[str, ...], made: Made) -> dict[str, Any]:
    return {
        "language": settings.language,
        "max_chars": settings.max_chars,
        "hard_max": settings.hard_max,
        "rules": list(rules),
        "terms": list(terms),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_texts": made.num_texts,
        "num_changed": made.num_changed,
        "changed_by_rule": {name: made.rules[name] for name in rules},
        "flags": {name: made.flags[name] for name in FINDINGS},
    }


def _print(out: str, made: Made) -> None:
    without = f"; {made.num_uncaptioned:,} pictures have no caption" if made.num_uncaptioned else ""
    print(f"{printable(out)}: {made.num_texts:,} alt texts, {made.num_changed:,} changed by rules{without}")
    for title, counts in (("changed by", made.rules), ("for a person to decide", made.flags)):
        if counts:
            print(f"{title}:")
        for name, count in counts.most_common():
            print(f"  {name:<20}{count:>12,}  {FINDINGS.get(name, '')}".rstrip())
    print("review them before they are published: captioner review", file=sys.stderr)
