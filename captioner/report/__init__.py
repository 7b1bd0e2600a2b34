"""OUT/report: one page for people to look at, and the same figures as JSON."""

from __future__ import annotations

from captioner.report.facts import collect
from captioner.report.page import render
from captioner.report.page_images import thumbnails
from captioner.store.table import CaptionsTable

PAGE, FIGURES = "report/index.html", "report/report.json"


def make_report(table: CaptionsTable) -> str:
    """Write the report of a table that was checked; returns the page's location.

    Pictures are read from the source again, a few hundred at most; where that fails the page says so.
    """
    facts = collect(table)
    shown = [row for rows in facts["check"]["shown"].values() for row in rows]
    for part in ("comparison", "changes"):
        shown += (facts["check"][part] or {}).get("shown", [])
    pictures, problem = thumbnails(table, shown)
    facts["pictures_problem"] = problem
    table.directory.write_json(FIGURES, facts)
    table.directory.write_bytes(PAGE, render(facts, pictures).encode())
    return f"{table.directory.location.rstrip('/')}/{PAGE}"
