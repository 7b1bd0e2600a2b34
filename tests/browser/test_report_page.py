"""The report in a real browser, with everything on it that a report can have: on a desk, on a phone, in the dark, on
paper."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner import pipeline
from captioner.config import CaptionConfig, CheckConfig, JudgeConfig, JudgeTableConfig
from captioner.run import judging, quality
from captioner.store.table import open_table
from captioner.testing import make_folder
from captioner.testing.model_server import ModelServer, saying
from captioner.testing.tiny_clip import make_tiny_clip

pytestmark = pytest.mark.browser


def captioned(archive: Path, out: Path, words: int) -> str:
    """A table whose captions are the first words of the references, flagged here and there."""
    config: dict[str, Any] = {"source": {"path": str(archive)}, "model": {"name": "fake"}, "cluster": {"local": True}}
    pipeline.run(CaptionConfig.model_validate(config | {"output": {"path": str(out)}}))
    file = out / "captions/part-00000.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        if row["reference_captions"]:
            caption_words = row["reference_captions"][0].split()[: words + number % 5]
            row["caption"] = " ".join(caption_words * (10 if number == 3 else 1))
            row["logprob_mean"] = -(number % 9) / 10
            row["flags"] = ["truncated"] * (number % 4 == 0)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    return str(out)


def judged(out: str, clip: Path) -> None:
    """Judge the captions by a CLIP with random weights, and by a chat model that sees one thing of three."""
    objects = [
        {"name": name, "seen": seen} for name, seen in (("image", True), ("a very small dog", False), ("sea", False))
    ]
    judging.judge(out, JudgeTableConfig(judge=JudgeConfig(name=str(clip), device="cpu")), judging.LocalJudgeEngine())
    with ModelServer(lambda asked: saying(json.dumps({"objects": objects}))) as server:
        command = ("judge", out, "--endpoint", server.url, "--model", server.model, "--sample", "30")
        # A process of its own: an event loop of the browser runs in this one.
        subprocess.run([sys.executable, "-m", "ray_jobs.cli", *command], check=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("report")
    archive = make_folder(root / "archive", 60)
    (archive / ("a name without any place to break it " * 5).replace(" ", "_")).with_suffix(".png").write_bytes(b"")
    table = open_table(captioned(archive, root / "out", 6))
    quality.check(table, CheckConfig(), against=captioned(archive, root / "other", 3))
    judged(str(root / "out"), make_tiny_clip(root / "clip"))
    return Path(quality.report(table)).absolute().as_uri()


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_and_nothing_sticks_out(address: str, open_page, phone: bool, dark: bool) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(address, phone, dark)

    assert page.locator("svg").count() >= 5
    for name in (
        "Compared with another run",
        "Against images, without references",
        "Named, but not seen by a chat model",
    ):
        assert page.get_by_role("heading", name=name).count() == 1
    violations = Axe().run(page).response["violations"]
    assert [(violation["id"], node["target"]) for violation in violations for node in violation["nodes"]] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not phone or page.locator("section[aria-labelledby=scores] thead").is_hidden()  # rows are stacked
    assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")


def test_on_paper_everything_is_there(address: str, open_page) -> None:
    page = open_page(address, dark=True)
    page.emulate_media(media="print")

    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(255, 255, 255)"  # never the dark scheme
    assert not page.get_by_role("navigation").is_visible()
    clipped = "[...document.querySelectorAll('.scroll, .strip')].filter((one) => one.scrollWidth > one.clientWidth + 1)"
    page.set_viewport_size({"width": 700, "height": 990})  # A4 less its margins
    assert page.evaluate(f"{clipped}.length") == 0
    assert page.pdf(format="A4").startswith(b"%PDF")
