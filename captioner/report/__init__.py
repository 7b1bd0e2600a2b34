"""Write OUT/report: an HTML page about a run, and the same figures as JSON."""

from __future__ import annotations

from captioner.report.facts import collect
from captioner.report.page import render
from captioner.report.page_images import thumbnails
from captioner.store.table import CaptionsTable

PAGE, FIGURES = "report/index.html", "report/report.json"


def make_report(table: CaptionsTable) -> str:
    """Write the report of a checked table and return the page's location.

    At most a few hundred images are read again from the source; when that fails, the page says so.
    """
    facts = collect(table)
    rows = [row for rows in facts["check"]["shown"].values() for row in rows]
    for part in ("comparison", "changes", "spot_check"):
        rows += (facts["check"].get(part) or {}).get("shown", [])
    rows += (facts["judge"] or {}).get("weakest", []) + (facts["objects"] or {}).get("shown", [])
    images, problem = thumbnails(table, rows)
    facts["pictures_problem"] = problem
    table.directory.write_json(FIGURES, facts)
    table.directory.write_bytes(PAGE, render(facts, images).encode())
    return f"{table.directory.location.rstrip('/')}/{PAGE}"
