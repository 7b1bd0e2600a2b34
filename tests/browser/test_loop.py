"""The whole loop on a small archive: captions -> alt text -> a person's review in a browser -> export -> training pairs
-> a model -> better captions -> a report of what changed."""

import json
import os
import signal
from pathlib import Path

import pyarrow as pa
import pytest

from captioner import pipeline
from captioner.config import CaptionConfig, TrainConfig
from captioner.publishing.exports.command import FORMATS
from captioner.starter.render import render_scenes
from captioner.store.directory import Directory
from captioner.store.journal import latest_reviews, read_reviews
from captioner.store.read import read_parts
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.training import job
from captioner.training.local import LocalTrainEngine
from ray_jobs.cli import main

pytestmark = pytest.mark.browser
IMAGES = 32
# What the reviewer does, image by image; "edited" writes what is known of the image.
DECISIONS = ["edited"] * 13 + ["approved", "rejected", "decorative", "expert", "rejected", "edited", "approved"]
KEYS = {"approved": "a", "rejected": "r", "decorative": "d", "expert": "x"}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Posters: the starter has never seen any, so a person has much to write."""
    render_scenes(tmp_path / "archive", IMAGES, seed=8, width=64, family="poster")
    return tmp_path / "archive"


def caption(archive: Path, out: Path, model: str, only: str | None = None) -> None:
    tree = {
        "source": {"path": str(archive)},
        "model": {"name": model},
        "output": {"path": str(out), "only": only},
        "cluster": {"local": True},
    }
    assert pipeline.run(CaptionConfig.model_validate(tree)) == 0


def captioner(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0


def known_texts(archive: Path) -> dict[str, str]:
    lines = map(json.loads, (archive / "metadata.jsonl").read_text().splitlines())
    return {line["file_name"]: line["captions"][0] for line in lines}


def decided(out: Path) -> dict[str, str]:
    reviews, damaged = read_reviews(Directory(str(out)))
    assert not damaged
    return {image_id: review.decision for image_id, review in latest_reviews(reviews).items()}


def decide(page, decisions: list[str], texts: dict[str, str]) -> dict[str, str]:
    """Decide with the keyboard alone; returns the decisions by image, as the page took them."""
    decision_of = {}
    for decision in decisions:
        page.wait_for_selector("#card[data-state=ready]")
        card = page.locator("#card")
        image_id, index = card.get_attribute("data-image-id"), card.get_attribute("data-index")
        if page.locator("#only").is_visible():
            page.keyboard.press("o")  # others have the same text; this decision is about one image
        if decision == "edited":
            page.keyboard.press("e")
            page.keyboard.press("Control+A")
            page.keyboard.insert_text(texts[image_id].capitalize() + ".")
            page.keyboard.press("Enter")
        else:
            page.keyboard.press(KEYS[decision])
        page.wait_for_selector(f"#card:not([data-index='{index}'])", state="attached")
        decision_of[image_id] = decision
    page.wait_for_selector("#card[data-state=ready]")
    return decision_of


def test_the_whole_loop(tmp_path: Path, archive: Path, open_page, review) -> None:
    out, texts = tmp_path / "out", known_texts(archive)
    caption(archive, out, "starter")
    captioner("alt-text", out, "--language", "en")

    with review(out, "--queue", "all") as (server, address):
        decision_of = decide(open_page(address), DECISIONS[:12], texts)
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    assert decided(out) == decision_of
    with review(out, "--queue", "all") as (_, address):
        decision_of |= decide(open_page(address), DECISIONS[12:], texts)
    assert decided(out) == decision_of
    assert len(decision_of) == 20

    export_everything(out, tmp_path)

    captioner("feedback", out, tmp_path / "pairs")
    assert json.loads((tmp_path / "pairs/feedback.json").read_text())["pairs"] == {"edited": 14, "approved": 2}
    job.run(training(tmp_path), LocalTrainEngine())
    check_training_report(open_page, (tmp_path / "trained/report.html").as_uri())

    before = rows_of(out)
    caption(archive, out, str(tmp_path / "trained/model"), only="flags or logprob below 40% or rejected or expert")
    after = rows_of(out)
    again = [name for name in after if after[name]["generation"] == 1]
    assert {name for name, decision in decision_of.items() if decision in ("rejected", "expert")} <= set(again)
    assert not {name for name, decision in decision_of.items() if decision in ("approved", "edited")} & set(again)
    assert {name: row for name, row in before.items() if name not in again} == {
        name: row for name, row in after.items() if name not in again
    }
    assert verify(open_table(str(out))).proven
    assert decided(out) == decision_of

    changes = json.loads((out / "report/report.json").read_text())["check"]["changes"]
    changed = [name for name in again if before[name]["caption"] != after[name]["caption"]]
    assert (changes["num_rows"], changes["changed"]) == (len(again), len(changed))
    assert changed
    shown = open_page((out / "report/index.html").as_uri()).locator("section[aria-labelledby=changes]")
    assert shown.locator("tbody tr ins").count()
    assert shown.get_by_role("rowheader", name="WER", exact=True).count() == 1


def check_training_report(open_page, address: str) -> None:
    """Its tables and images fit a phone, in the dark too."""
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(address, phone=True, dark=True)
    assert page.get_by_role("heading", name="Result").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert Axe().run(page).response["violations"] == []


def export_everything(out: Path, root: Path) -> None:
    pages = root / "pages"
    pages.mkdir()
    image_id = next(name for name, decision in decided(out).items() if decision == "edited")
    (pages / "index.html").write_text(f'<!doctype html><title>Posters</title><img src="{image_id}">')
    for form, export_format in FORMATS.items():
        if form == "hub":  # needs the hub: tests/core/test_export_fields.py has a stand-in
            continue
        more = ["--html-dir", pages] if form == "html" else []
        captioner("export", out, root / "exports" / form, "--to", form, *more)
        assert (root / "exports" / f"{form}{export_format.suffix}").exists()


def training(root: Path) -> TrainConfig:
    tree = {
        "data": {"path": str(root / "pairs"), "eval_fraction": 0.1},
        "training": {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
        "output": {"path": str(root / "trained")},
    }
    return TrainConfig.model_validate(tree)


def rows_of(out: Path) -> dict[str, dict]:
    return {row["image_id"]: row for row in pa.concat_tables(read_parts(open_table(str(out)))).to_pylist()}
