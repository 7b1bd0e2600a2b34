"""Make the images of the README and of docs/alt-text.md.

python docs/make_images.py OUT ARCHIVE   contact-sheet.png, from a captioned table
python docs/make_images.py review        review-*.png: reviews rendered posters; needs playwright and a Chromium
python docs/make_images.py spot-check    spot-check.png, in the same way
python docs/make_images.py alt-text      those and recaptioned.png: the whole way of docs/alt-text.md, in some minutes
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from captioner.starter.scenes import make_scenes

DOCS = Path(__file__).absolute().parent
COLUMNS, ROWS, SIDE, TEXT = 4, 2, 240, 74
COLOURS = 96  # of a screenshot: text on plain grounds, and small


def contact_sheet(rows: list[dict], archive: Path) -> Image.Image:
    """Images with the captions that the table holds for them."""
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 16) + 16, ROWS * (SIDE + TEXT) + 16), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, row in enumerate(rows[: COLUMNS * ROWS]):
        left, top = 16 + number % COLUMNS * (SIDE + 16), 16 + number // COLUMNS * (SIDE + TEXT)
        with Image.open(archive / row["image_id"]) as image:
            sheet.paste(image.resize((SIDE, SIDE)), (left, top))
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline="#888888")
        text = "\n".join(textwrap.wrap(row["caption"], 36))
        draw.multiline_text((left, top + SIDE + 4), text, fill="black", font=font)
    return sheet


def render_posters(archive: Path, count: int) -> dict[str, str]:
    """Render images with a shape that the starter does not know; return the right caption of each.

    The captions of this archive name the background first.
    """
    archive.mkdir()
    known = {}
    for number, poster in enumerate(make_scenes(count, seed=8, family="poster")):
        name = f"poster-{number:03d}.png"
        poster.render(320).save(archive / name)
        known[name] = poster.captions[0]
    lines = [json.dumps({"file_name": name, "captions": [text]}) for name, text in known.items()]
    (archive / "metadata.jsonl").write_text("\n".join(lines))
    return {name: f"{text.capitalize()}." for name, text in known.items()}


def captioner(*words: object) -> None:
    """A command of docs/alt-text.md."""
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", *map(str, words)], check=True)


@contextmanager
def page_of(command_name: str, out: Path) -> Iterator[str]:
    """The address of `captioner review` or `captioner spot-check` while it runs."""
    command = [sys.executable, "-m", "ray_jobs.cli", command_name, str(out), "--reviewer", "Ada"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.terminate()


def wait_for_card(page: Any) -> None:
    page.wait_for_selector("#card[data-state=ready][data-image=shown]")
    page.locator("#image").evaluate("image => image.decode()")


def save(png: bytes, name: str) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(DOCS / name, optimize=True)


def review(browser: Any, address: str, decisions: str, known: dict[str, str]) -> None:
    """Decide by keyboard; the letters are those of the page, "e" writes what is known of the image."""
    page = browser.new_page(viewport={"width": 1100, "height": 720})
    page.goto(address)
    for number, key in enumerate(decisions):
        wait_for_card(page)
        if number == 1:
            save(page.screenshot(), "review.png")
        shown = int(str(page.locator("#card").get_attribute("data-shown")))
        page.keyboard.press("o" if page.locator("#only").is_visible() else "Shift")
        page.keyboard.press(key)
        if key == "e":
            page.keyboard.press("Control+A")
            page.keyboard.insert_text(known[str(page.locator("#card").get_attribute("data-image-id"))])
            if number == 2:
                save(page.screenshot(), "review-edit.png")
            page.keyboard.press("Enter")
        page.wait_for_selector(f"#card[data-shown='{shown + 1}']", state="attached")
    wait_for_card(page)
    page.keyboard.press("g")
    page.locator("#tiles img").first.wait_for()
    page.wait_for_load_state("networkidle")
    save(page.screenshot(), "review-grid.png")
    page.keyboard.press("Escape")
    page.set_viewport_size({"width": 390, "height": 844})
    wait_for_card(page)
    save(page.screenshot(), "review-phone.png")


def spot_check_image() -> None:
    """In an empty working directory."""
    archive, out = Path("posters"), Path("captions")
    render_posters(archive, 40)
    captioner("caption", archive, out, "--model", "starter", "--local")
    with chromium() as browser, page_of("spot-check", out) as address:
        page = browser.new_page(viewport={"width": 1100, "height": 720})
        page.goto(address)
        for key in "1213":
            wait_for_card(page)
            shown = page.locator("#card").get_attribute("data-image-id")
            page.keyboard.press(key)
            page.wait_for_selector(f"#card:not([data-image-id='{shown}'])")
        wait_for_card(page)
        save(page.screenshot(), "spot-check.png")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=as_root)
        yield browser
        browser.close()


def alt_text_images(everything: bool) -> None:
    """In an empty working directory. `everything`: recaptioned.png as well."""
    archive, out = Path("posters"), Path("captions")
    known = render_posters(archive, 160)
    captioner("caption", archive, out, "--model", "starter", "--local")
    captioner("alt-text", out, "--language", "en")
    with chromium() as browser:
        with page_of("review", out) as address:
            review(browser, address, "a" + "e" * 72 + "rrrx", known)
        if not everything:
            return
        captioner("feedback", out, "pairs")
        taught = ("--max-steps", 150, "--learning-rate", 1e-3, "--warmup-steps", 10, "--eval-steps", 50)
        captioner("train", "pairs", "trained", "--model", "starter", *taught)
        again = ("--only", "flags or logprob<60% or rejected")
        captioner("caption", archive, out, "--model", "trained/model", "--local", *again)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto((out / "report/index.html").absolute().as_uri())
        page.add_style_tag(content="#changes ~ table.even tbody tr:nth-child(n+6) { display: none }")
        save(page.locator("section[aria-labelledby=changes]").screenshot(), "recaptioned.png")


def main(words: list[str]) -> None:
    if words in (["alt-text"], ["review"], ["spot-check"]):
        museum = Path(tempfile.gettempdir()) / "museum"  # its name is seen in the images
        museum.mkdir()
        try:
            with contextlib.chdir(museum):
                spot_check_image() if words == ["spot-check"] else alt_text_images(words == ["alt-text"])
        finally:
            shutil.rmtree(museum)
        return
    out, archive = map(Path, words)
    rows = pq.read_table(out / "captions", columns=["image_id", "caption"]).to_pylist()
    contact_sheet(rows[3:], archive).save(DOCS / "contact-sheet.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
