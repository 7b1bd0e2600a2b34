"""The page of a spot-check in a real browser: 60 verdicts by keyboard, nothing that axe-core objects to."""

import signal
from pathlib import Path

import pytest
from helpers import READY, caption_config, press_and_wait, violations

from captioner import pipeline
from captioner.scoring.verdicts import SampleSpec, draw
from captioner.store.directory import Directory
from captioner.store.journal import SPOT_CHECKS, read_reviews
from captioner.store.table import open_table
from captioner.testing import make_folder

pytestmark = pytest.mark.browser

KEYS = {
    "1": "right",
    "r": "right",
    "Enter": "right",
    "2": "small_fault",
    "f": "small_fault",
    "3": "wrong",
    "w": "wrong",
}
KEYS |= {"4": "offensive", "o": "offensive", "s": "skipped"}


def verdicts(out: Path) -> list[str]:
    return [review.decision for review in read_reviews(Directory(str(out)), SPOT_CHECKS)[0]]


def press_all(page, keys: list[str]) -> None:
    for key in keys:
        press_and_wait(page, key)


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_wherever_the_page_is(
    make_reviewable, tmp_path: Path, review, open_page, phone: bool, dark: bool
) -> None:
    out = make_reviewable(["a very long caption about a dog " * 12, "a dog"])
    sample = draw(open_table(str(out)), SampleSpec(8, by="folder")).captions
    (tmp_path / "archive" / sample[3].image_id).unlink()
    with review(out, "--sample", "8", "--by", "folder", command="spot-check") as (_, url):
        page = open_page(url, phone, dark)
        missing = 0
        while page.get_attribute("#card", "data-state") != "done":
            page.wait_for_selector(READY)
            if (
                page.get_attribute("#card", "data-image") == "missing"
                or page.get_attribute("#card", "data-shown") == "1"
            ):
                missing += page.get_attribute("#card", "data-image") == "missing"
                assert violations(page) == []
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            press_and_wait(page, "s" if page.get_attribute("#card", "data-shown") == "3" else "1")
        assert missing == 1
        page.get_by_text("7 captions judged of 30").wait_for()
        page.get_by_role("button", name="Copy: The report").wait_for()
        assert violations(page) == []
        page.get_by_role("button", name="Show the skipped ones").click()
        page.wait_for_selector(READY)
        page.keyboard.press("?")
        page.wait_for_selector("dialog[open]")
        assert violations(page) == []


def test_sixty_verdicts_by_keyboard_and_a_sigkill_in_the_middle_lose_none(tmp_path: Path, review, open_page) -> None:
    archive, out = make_folder(tmp_path / "archive", 70), tmp_path / "out"
    pipeline.run(caption_config(archive, out, cluster={"local": True}, check={"sample": 0}))
    keys = [list(KEYS)[number * 7 % len(KEYS)] for number in range(60)]
    with review(out, "--sample", "70", command="spot-check") as (process, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        press_all(page, keys[:30])
        page.keyboard.press("1")  # on its way when the process dies: saved or not, but whole
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.context.close()
    saved = verdicts(out)
    assert saved[:30] == [KEYS[key] for key in keys[:30]]
    assert saved[30:] in ([], ["right"])
    with review(out, command="spot-check") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        assert page.inner_text("#progress").startswith(f"{len(saved) - saved.count('skipped')} of 70 judged")
        press_all(page, keys[len(saved) :])
        assert verdicts(out) == [*saved, *(KEYS[key] for key in keys[len(saved) :])]
        page.keyboard.press("u")
        page.get_by_role("status").get_by_text("Undone: ").wait_for()
    assert verdicts(out) == [*saved, *(KEYS[key] for key in keys[len(saved) :])][:-1]


def test_keys_do_nothing_when_shortcuts_are_off_and_a_dead_server_is_told(make_reviewable, review, open_page) -> None:
    out = make_reviewable(['<img src=x onerror="document.title = 1">'] * 30)
    with review(out, "--sample", "5", command="spot-check") as (process, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        assert page.inner_text("#alt-text") == '<img src=x onerror="document.title = 1">'
        page.get_by_role("button", name="Help").click()
        page.get_by_role("checkbox", name="Single-key shortcuts").uncheck()
        page.get_by_role("button", name="Close").click()
        for key in "1234rfwosu?":
            page.keyboard.press(key)
        assert verdicts(out) == []
        page.get_by_role("button", name="Small fault").click()
        page.wait_for_selector("#card[data-shown='2']")
        process.kill()
        process.wait()
        page.get_by_role("button", name="Wrong").click()
        page.get_by_role("alert").get_by_text("captioner spot-check does not respond").wait_for()
        assert page.title() == "Spot-check of captions"
        page.context.close()
    assert verdicts(out) == ["small_fault"]
