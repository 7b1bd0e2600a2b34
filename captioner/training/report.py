"""OUT/report.html: curves, training pairs, and captions before and after training, in one self-contained file."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from captioner.data import RawImage
from captioner.store.directory import Directory
from captioner.training.advice import warnings_of
from captioner.training.pair_sources import PairSources
from captioner.training.schedule import evaluations

if TYPE_CHECKING:
    from jinja2 import Template

NUM_IMAGES = 12  # shown of each set
_THUMBNAIL_EDGE = 160  # pixels, the longer side


def write_report(
    out: Directory,
    record: dict[str, Any],
    sources: PairSources,
    tables: dict[str, pa.Table],
    counts: dict[str, Any],
    history: list[dict[str, Any]],
    result: dict[str, Any],
) -> None:
    """Write the report. Before training, `history` and `result` are empty."""
    evaluated, best_step = evaluations(history), result.get("step")
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    html = _template().render(
        record=record,
        counts=counts,
        result=result,
        curves=[
            _curve("training loss", losses, None),
            _curve("eval loss", [(entry["step"], entry["eval_loss"]) for entry in evaluated], best_step),
            _curve("eval WER", [(entry["step"], entry["eval_wer"]) for entry in evaluated], best_step),
            _curve("eval CIDEr-D", _points(evaluated, "eval_cider"), best_step),
            _curve("share of the most frequent caption", _points(evaluated, "eval_equal_share"), best_step),
        ],
        warnings=warnings_of(history),
        train_sheet=_sheet(sources, tables["train"].slice(0, NUM_IMAGES)),
        eval_sheet=_eval_sheet(sources, tables["eval"], result),
    )
    out.write_bytes("report.html", html.encode())


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("captioner.training", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2")


def _points(evaluated: list[dict[str, Any]], name: str) -> list[tuple[int, float | None]]:
    return [(entry["step"], entry.get(name)) for entry in evaluated]


def _curve(name: str, points: list[tuple[int, float | None]], best_step: int | None) -> dict[str, Any] | None:
    """Return an SVG polyline in a box of 300 x 100, the point of `best_step` on it, and the range it spans.

    None where there are fewer than two values.
    """
    measured = [(step, value) for step, value in points if value is not None]
    if len(measured) < 2:
        return None
    steps, values = [step for step, _ in measured], [value for _, value in measured]
    first, low, high = min(steps), min(values), max(values)
    width, height = max(steps) - first or 1, (high - low) or 1
    drawn = [(step, 300 * (step - first) / width, 100 - 100 * (value - low) / height) for step, value in measured]
    return {
        "name": name,
        "line": " ".join(f"{x:.1f},{y:.1f}" for _, x, y in drawn),
        "mark": next(((x, y) for step, x, y in drawn if step == best_step), None),
        "low": low,
        "high": high,
        "last": values[-1],
        "first_step": first,
        "last_step": max(steps),
    }


def _sheet(sources: PairSources, rows: pa.Table) -> list[dict[str, Any]]:
    """Return the id, thumbnail and references of each pair."""
    columns = zip(sources.read(rows), rows["reference_captions"].to_pylist(), strict=True)
    return [
        {"image_id": image.image_id, "image": _thumbnail(image, sources.max_pixels), "references": captions}
        for image, captions in columns
    ]


def _eval_sheet(sources: PairSources, rows: pa.Table, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `_sheet` of the first eval pairs, with their captions before and after training."""
    if not result:
        return []
    after = {row["image_id"]: row["caption"] for row in result["measured"]["eval"]["captions"]}
    before = {row["image_id"]: row["caption"] for row in result["before"]["captions"]}
    cards = _sheet(sources, rows.slice(0, NUM_IMAGES))
    return [card | {"before": before.get(card["image_id"]), "after": after.get(card["image_id"])} for card in cards]


def _thumbnail(raw: RawImage, max_pixels: int) -> str | None:
    """Return a data: URI, or None where the image cannot be decoded."""
    from captioner.imaging import ImageError, open_image

    try:
        image = open_image(raw.data or b"", max_pixels).rgb
    except ImageError:
        return None
    image.thumbnail((_THUMBNAIL_EDGE, _THUMBNAIL_EDGE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
