"""Print the verdict, the scores, and the best and worst captions on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from captioner.console.text import counted, printable, shorten
from captioner.scoring.flags import ALL_FLAGS, flag_name
from captioner.scoring.verdicts import describe

SHOWN, WIDTH = 3, 160  # rows of each kind; characters of a caption


def print_check(facts: dict[str, Any]) -> None:
    """Print a summary of OUT/report/report.json on standard output."""
    console = Console(file=sys.stdout, highlight=False)
    check = facts["check"]
    console.print(Text(printable(facts["verdict"]["title"]), style="bold"))
    for sentence in facts["verdict"]["sentences"]:
        console.print(Text(printable(sentence)), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for name, value in _figures(check):
        table.add_row(Text(name), Text(value))
    console.print(table)
    _print_flags(console, check["flags"])
    if check.get("spot_check"):
        console.print(Text("judged by people:"))
        for line in describe(check["spot_check"]):
            console.print(Text(f"  {line}"), soft_wrap=True)
    _print_comparison(console, check["comparison"])
    for name in ("best", "worst"):
        rows = [row for row in check["shown"][name] if name == "best" or row["wer"] > 0][:SHOWN]
        if rows:
            console.print(Text(f"{name}:"))
        for row in rows:
            caption, reference = shorten(row["caption"], WIDTH), shorten(row["reference"], WIDTH)
            line = f"  {row['wer']:.2f}  {row['image_id']}: {caption}  (reference: {reference})"
            console.print(Text(printable(line)), soft_wrap=True)


def _print_flags(console: Console, flags: dict[str, int]) -> None:
    """Print how many captions have each flag, and what the flag says of a caption."""
    if not flags:
        return
    console.print(Text("flagged captions:"))
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for flag, count in flags.items():
        table.add_row(Text(f"  {flag_name(flag)}"), Text(f"{count:,}"), Text(ALL_FLAGS.get(flag, "")))
    console.print(table)


def _print_comparison(console: Console, comparison: dict[str, Any] | None) -> None:
    if comparison is None:
        return
    changed = f"{comparison['changed']:,} of {counted(comparison['num_rows'], 'caption')} changed"
    console.print(Text(printable(f"against {comparison['against']}: {changed}")), soft_wrap=True)
    if left_out := comparison.get("trained_left_out"):  # absent in checks of earlier versions
        console.print(Text(f"  left out {counted(left_out, 'image')} that a model was trained on"), soft_wrap=True)
    for name, figures in comparison["differences"].items():
        low, high = figures["interval"] or (None, None)
        within = "" if low is None else f" (95 % interval {low:+.3f} to {high:+.3f})"
        console.print(Text(f"  {name} {figures['difference']:+.3f}{within}: {figures['verdict']}"), soft_wrap=True)


def _figures(check: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = check["interval"] or (None, None)
    rows = [
        ("WER", _decimal(check["wer"]) + ("" if low is None else f"   95 % interval {low:.3f} to {high:.3f}")),
        ("WER shuffled", _decimal(check["shuffled_wer"])),
        ("lift", _decimal(check["lift"])),
        ("WER of people", _decimal(check["human_wer"])),
        ("MER, CER", f"{_decimal(check['mer'])}, {_decimal(check['cer'])}"),
        ("CIDEr-D", _decimal(check["cider_d"])),
        ("BLEU-1 to 4", ", ".join(_decimal(value) for value in check["bleu"] or [None])),
        ("ROUGE-L", _decimal(check["rouge_l"])),
    ]
    return rows if check["num_rows"] else []


def _decimal(value: float | None) -> str:
    return "no data" if value is None else f"{value:.3f}"
