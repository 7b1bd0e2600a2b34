"""OUT/report.html: curves, and contact sheets of what the model was shown and what it says. One file, no network."""

from __future__ import annotations

import base64
import io
from typing import Any

import pyarrow as pa

from captioner.data import RawImage
from captioner.store.directory import Directory
from captioner.training.archives import Archives
from captioner.training.schedule import evaluations

SHEET = 12
_THUMBNAIL = 160  # pixels, the longer side


def write_report(
    out: Directory,
    record: dict[str, Any],
    archives: Archives,
    tables: dict[str, pa.Table],
    counts: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
) -> None:
    """Write the report: before training `history` and `result` are empty."""
    from jinja2 import Environment, PackageLoader

    page = Environment(
        loader=PackageLoader("captioner.training", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.j2")
    known, chosen = evaluations(history), result.get("step")
    html = page.render(
        record=record,
        counts=counts,
        result=result,
        curves=[
            _curve("training loss", [(one["step"], one["loss"]) for one in history if "loss" in one], None),
            _curve("eval loss", [(one["step"], one["eval_loss"]) for one in known], chosen),
            _curve("eval WER", [(one["step"], one["eval_wer"]) for one in known], chosen),
        ],
        train_sheet=_sheet(archives, tables["train"].slice(0, SHEET)),
        eval_sheet=_eval_sheet(archives, tables["eval"], result),
    )
    out.write_bytes("report.html", html.encode())


def _curve(name: str, points: list[tuple[int, float | None]], chosen: int | None) -> dict[str, Any] | None:
    """Points of an SVG polyline in a box of 300 x 100, where the chosen step is on it, and the range it spans."""
    known = [(step, value) for step, value in points if value is not None]
    if len(known) < 2:
        return None
    steps, values = [step for step, _ in known], [value for _, value in known]
    first, low, high = min(steps), min(values), max(values)
    across, up = max(steps) - first or 1, (high - low) or 1
    places = [(step, 300 * (step - first) / across, 100 - 100 * (value - low) / up) for step, value in known]
    return {
        "name": name,
        "line": " ".join(f"{x:.1f},{y:.1f}" for _, x, y in places),
        "mark": next(((x, y) for step, x, y in places if step == chosen), None),
        "low": low,
        "high": high,
        "last": values[-1],
        "first_step": first,
        "last_step": max(steps),
    }


def _sheet(archives: Archives, rows: pa.Table) -> list[dict[str, Any]]:
    columns = zip(archives.read(rows), rows["reference_captions"].to_pylist(), strict=True)
    return [
        {"image_id": raw.image_id, "picture": _thumbnail(raw, archives.max_pixels), "references": captions}
        for raw, captions in columns
    ]


def _eval_sheet(archives: Archives, rows: pa.Table, result: dict[str, Any]) -> list[dict[str, Any]]:
    if not result:
        return []
    after = {one["image_id"]: one["caption"] for one in result["measured"]["eval"]["captions"]}
    before = {one["image_id"]: one["caption"] for one in result["before"]["captions"]}
    cards = _sheet(archives, rows.slice(0, SHEET))
    return [card | {"before": before.get(card["image_id"]), "after": after.get(card["image_id"])} for card in cards]


def _thumbnail(raw: RawImage, max_pixels: int) -> str | None:
    """A data: URI, or None where the picture cannot be read now."""
    from captioner.imaging import ImageError, open_image

    try:
        image = open_image(raw.data or b"", max_pixels).rgb
    except ImageError:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
