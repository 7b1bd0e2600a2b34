"""`captioner alt-text`: write OUT/alt_text, with one row for each row of the captions table."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import AltTextConfig
from captioner.console.text import counted, printable, shell_command
from captioner.errors import OK, UsageError
from captioner.publishing.alt_text.findings import FINDINGS, CaptionedImage, findings
from captioner.publishing.alt_text.rules import RULES, Limits, apply_rules
from captioner.publishing.alt_text.schemas import ALT_TEXT_SCHEMA
from captioner.publishing.alt_text.texts import SETTINGS_FILE, alt_text_name, lacking, require_finished
from captioner.publishing.fields import check_field, texts_of
from captioner.scoring.terms import read_terms, term_finder
from captioner.store.lock import sole_writer
from captioner.store.read import read_parts
from captioner.store.replan import generation_of_parts
from captioner.store.table import CaptionsTable, open_table

_COLUMNS = ["image_id", "caption", "width", "height", "run_id", "created_at"]


@dataclass
class Counts:
    """How many alt texts were made, how many each rule changed and how many have each flag."""

    num_texts: int = 0
    num_changed: int = 0
    num_without: int = 0  # images without a caption, or without a value in the column
    rules: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)


def run(out: str, settings: AltTextConfig) -> int:
    """Make the alt texts of OUT, print a summary and return the exit code. Raises CaptionerError."""
    table = open_table(out)
    with sole_writer(out):
        counts = make_alt_texts(table, settings)
    _print(out, counts, settings.field)
    return OK


def make_alt_texts(table: CaptionsTable, settings: AltTextConfig) -> Counts:
    """Write OUT/alt_text, one file for each part of the table; replaces the texts of an earlier call.

    The settings are written last: without them the alt texts are incomplete. Raises UsageError for unknown rules and
    contradictory limits, OutputError when the table is not finished.
    """
    rules, limits = chosen_rules(settings), _limits(settings)
    terms = read_terms(settings.terms) if settings.terms else ()
    require_finished(table)
    check_field(table, settings.field)
    counts = Counts()
    maker = _AltTextMaker(settings.field, rules, limits, term_finder(terms), counts)
    table.directory.delete(SETTINGS_FILE)
    columns = list(dict.fromkeys([*_COLUMNS, settings.field]))
    for part, rows in zip(generation_of_parts(table), read_parts(table, columns), strict=True):
        table.directory.write_table(alt_text_name(part), maker.rows(rows))
    table.directory.write_json(SETTINGS_FILE, _record(settings, rules, terms, counts), checksum=True)
    return counts


def chosen_rules(settings: AltTextConfig) -> tuple[str, ...]:
    """Return the names of the rules to apply, in order. Raises UsageError for an unknown name."""
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
class _AltTextMaker:
    """Makes the rows of a part; caches the text of each caption, since many images have the same one.

    `field`: the column that holds the captions.
    """

    field: str
    names: tuple[str, ...]
    limits: Limits
    holds_term: Callable[[str], bool]
    counts: Counts

    def rows(self, rows: pa.Table) -> pa.Table:
        """Return the rows of ALT_TEXT_SCHEMA for one part of the captions table."""
        cached: dict[str, tuple[str, list[str]]] = {}
        texts, changed, flags = [], [], []
        captions = pc.if_else(pc.is_valid(rows["caption"]), texts_of(rows, self.field), None)
        columns_read = [captions, rows["width"], rows["height"]]
        for caption, width, height in zip(*(column.to_pylist() for column in columns_read), strict=True):
            text: str | None = None
            rules: list[str] = []
            text_flags: list[str] = []
            if caption is not None:
                if caption not in cached:
                    cached[caption] = apply_rules(caption, self.limits, self.names)
                text, rules = cached[caption]
                text_flags = findings(CaptionedImage(caption, text, tuple(rules), width, height), self.holds_term)
            self._count(text, rules, text_flags)
            texts.append(text)
            changed.append(rules)
            flags.append(text_flags)
        columns = {"alt_text": texts, "rules": changed, "flags": flags}
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else rows[field.name].combine_chunks()
            for field in ALT_TEXT_SCHEMA
        ]
        return pa.table(arrays, schema=ALT_TEXT_SCHEMA)

    def _count(self, text: str | None, rules: list[str], flags: list[str]) -> None:
        self.counts.num_without += text is None
        self.counts.num_texts += text is not None
        self.counts.num_changed += bool(rules)
        self.counts.rules.update(rules)
        self.counts.flags.update(flags)


def _record(settings: AltTextConfig, rules: tuple[str, ...], terms: tuple[str, ...], counts: Counts) -> dict[str, Any]:
    """Return the contents of SETTINGS_FILE."""
    return {
        "field": settings.field,
        "language": settings.language,
        "max_chars": settings.max_chars,
        "hard_max": settings.hard_max,
        "rules": list(rules),
        "terms": list(terms),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_texts": counts.num_texts,
        "num_changed": counts.num_changed,
        "changed_by_rule": {name: counts.rules[name] for name in rules},
        "flags": {name: counts.flags[name] for name in FINDINGS},
    }


def _print(out: str, counts: Counts, field: str) -> None:
    without = f"; {counted(counts.num_without, 'image')} {printable(lacking(field))}" if counts.num_without else ""
    print(
        f"{printable(out)}: {counted(counts.num_texts, 'alt text')}, {counts.num_changed:,} changed by rules{without}"
    )
    for title, by_name in (("changed by", counts.rules), ("for a person to check", counts.flags)):
        if by_name:
            print(f"{title}:")
        for name, count in by_name.most_common():
            print(f"  {name:<20}{count:>12,}  {FINDINGS.get(name, '')}".rstrip())
    advice = f"review them before they are published: {shell_command('review', out)}"
    print(printable(advice), file=sys.stderr)
