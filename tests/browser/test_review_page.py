"""The review page in a real browser: everything by keyboard, nothing that axe-core objects to, text stays text."""

import signal
from pathlib import Path

import pytest
from helpers import READY, press_and_wait, violations

from captioner.store.directory import Directory
from captioner.store.journal import Journal, Review, read_reviews

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="document.title = 1"><script>document.title = 2</script>'


def decisions(out: Path) -> list[tuple[str, tuple[str, ...], str | None]]:
    return [(review.decision, review.image_ids, review.text) for review in read_reviews(Directory(str(out)))[0]]


@pytest.fixture
def out(make_reviewable, tmp_path: Path) -> Path:
    """A group of four, a long text, a hostile one, flags, an image that has gone."""
    captions = ["a dog"] * 4 + ["a very long text about a dog " * 7, f"dogs {HOSTILE}", "a sign that says “stop”"]
    reviewable = make_reviewable(captions, logprobs=[-9.0, -8.0, -7.0, -6.0], flags=[["truncated"]])
    (tmp_path / "archive" / "000006.png").unlink()
    return reviewable


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_wherever_the_page_is(out: Path, review, open_page, phone: bool, dark: bool) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url, phone, dark)
        page.wait_for_selector(READY)
        assert page.locator("#neighbours button").count() == 3
        assert violations(page) == []
        page.keyboard.press("o")
        assert violations(page) == []
        page.keyboard.press("?")
        page.wait_for_selector("dialog[open]")
        assert violations(page) == []
        page.keyboard.press("Escape")
        page.keyboard.press("e")
        page.get_by_role("textbox", name="Alt text").fill("x" * 260)
        page.keyboard.press("Enter")
        page.get_by_text("the limit is 250 (captioner alt-text --hard-max)").wait_for()
        assert violations(page) == []
        page.keyboard.press("Escape")
        press_and_wait(page, "a")
        press_and_wait(page, "a")
        page.wait_for_selector("#card[data-image-id='000004.png']")
        press_and_wait(page, "s")
        press_and_wait(page, "s")
        page.wait_for_selector("#card[data-image-id='000006.png'][data-image=missing]")
        assert violations(page) == []
        while page.get_attribute("#card", "data-state") != "done":
            press_and_wait(page, "d")
        page.get_by_role("heading", name="All done").wait_for()
        page.get_by_text("captioner export").first.wait_for()
        assert page.locator("#counts").inner_text().startswith("Approved\n4\nEdited\n0\nDecorative\n24\n")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.fixture
def reviewed(out: Path, review, open_page) -> Path:
    """20 reviews by keyboard alone, then SIGKILL."""
    keys = ["a", "Enter", "a", "r", "d", "x", "s", *"aa", "Enter", *"ardxsaaa", "Enter"]
    with review(out, "--queue", "all") as (process, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        page.keyboard.press("o")
        for key in keys:
            press_and_wait(page, key)
        page.keyboard.press("e")
        page.keyboard.press("Control+a")
        page.keyboard.type("rude keys: a e r d s x u o ?")
        press_and_wait(page, "Enter")
        process.send_signal(signal.SIGKILL)
    return out


def test_twenty_reviews_by_keyboard_alone_survive_sigkill(reviewed: Path, review, open_page) -> None:
    saved_decisions = decisions(reviewed)
    assert len(saved_decisions) == 20
    assert [decision for decision, _, _ in saved_decisions[:7]] == [
        *("approved", "approved", "approved", "rejected", "decorative", "expert", "skipped")
    ]
    assert saved_decisions[0][1] == ("000000.png",)
    assert saved_decisions[1][1] == ("000001.png", "000002.png", "000003.png")
    assert saved_decisions[-1][::2] == ("edited", "rude keys: a e r d s x u o ?")
    with review(reviewed, "--queue", "all") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        assert page.inner_text("#progress").startswith("20 of 30 reviewed")
        page.keyboard.press("u")
        page.get_by_role("status").get_by_text("Undone: Saved.").wait_for()
    assert decisions(reviewed) == saved_decisions[:-1]


def test_an_undo_brings_the_group_back(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        assert page.get_by_role("button", name="Undo").is_disabled()
        press_and_wait(page, "a")
        assert page.get_by_role("status").inner_text() == "Approved for 4 images."
        press_and_wait(page, "u")
        assert page.get_attribute("#card", "data-image-id") == "000000.png"
        assert page.locator("#neighbours button[aria-pressed=true]").count() == 3
        assert decisions(out) == []
        page.get_by_role("button", name="With it: 000002.png").click()
        press_and_wait(page, "r")
    assert decisions(out) == [("rejected", ("000000.png", "000001.png", "000003.png"), None)]


def test_what_was_typed_outlives_escape_a_reload_and_a_killed_server(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (process, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        page.keyboard.press("e")
        page.keyboard.type(" It barks")
        page.keyboard.press("Escape")
        page.get_by_role("region", name="Your draft, not saved yet").get_by_text("A dog. It barks").wait_for()
        assert violations(page) == []
        page.keyboard.press("e")
        page.keyboard.type(" at night")
        page.wait_for_selector("#card[data-draft=kept]")
        page.reload()
        page.wait_for_selector(READY)
        page.keyboard.press("e")
        page.keyboard.type(".")
        page.wait_for_selector("#card[data-draft=kept]")
        process.kill()
        process.wait()
        page.keyboard.type(" And then")
        page.get_by_role("alert").get_by_text("What you typed is only on this page").wait_for()
        assert page.get_by_role("textbox", name="Alt text").input_value() == "A dog. It barks at night. And then"
        page.context.close()
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        page.keyboard.press("e")
        assert page.get_by_role("textbox", name="Alt text").input_value() == "A dog. It barks at night."
        press_and_wait(page, "Enter")
        press_and_wait(page, "u")
        page.get_by_role("button", name="Discard").click()
        page.wait_for_selector("#card[data-draft=none]")
        assert not list((out / "reviews/drafts").rglob("*.json"))
    assert decisions(out) == []


def test_a_text_that_comes_too_late_stays_as_a_draft(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        with Journal(Directory(str(out)), "ben") as journal:
            journal.append(Review("rejected", ("000000.png",), None, "ben"))
        page.keyboard.press("e")
        page.keyboard.insert_text(" It barks.")
        press_and_wait(page, "Enter")
        page.get_by_role("status").get_by_text("ben has already decided about this image").wait_for()
        page.keyboard.press("g")
        page.get_by_label("Show").select_option("drafts")
        page.get_by_role("button", name="1 Rejected Flagged Draft").click()
        page.get_by_text("A dog. It barks.").wait_for()
    assert len(decisions(out)) == 1


def test_texts_and_names_of_others_are_never_html(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        press_and_wait(page, "a")
        press_and_wait(page, "s")
        page.wait_for_selector(f"{READY}[data-image-id='000005.png']")
        assert page.inner_text("#alt-text") == f"Dogs {HOSTILE}."
        page.keyboard.press("e")
        page.get_by_role("textbox", name="Alt text").fill(HOSTILE)
        press_and_wait(page, "Enter")
        press_and_wait(page, "u")
        assert page.title() == "Review of alt texts"
        assert page.locator("#card img[src=x]").count() == 0


def matching(page, text: str) -> None:
    page.locator("#matching").get_by_text(text, exact=True).wait_for()


@pytest.mark.parametrize(("phone", "dark"), [(False, False), (True, True)], ids=["desktop", "dark phone"])
def test_the_grid_by_keyboard_and_axe_finds_nothing(out: Path, review, open_page, phone: bool, dark: bool) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url, phone, dark)
        page.wait_for_selector(READY)
        page.keyboard.press("o")
        press_and_wait(page, "r")
        page.keyboard.press("g")
        matching(page, "30 images")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_label("Show").select_option("rejected")
        matching(page, "1 image")
        page.get_by_label("Show").select_option("all")
        matching(page, "30 images")
        page.get_by_label("Show").blur()
        page.keyboard.press("/")
        page.keyboard.type("stop 6.png")
        page.keyboard.press("Enter")
        matching(page, "1 image")
        page.keyboard.press("Enter")
        page.wait_for_selector("#card[data-image-id='000006.png'][data-state=ready]")
        assert page.get_by_text("7 of 30", exact=True).is_visible()
        page.keyboard.press("e")
        page.keyboard.press("Control+a")
        page.keyboard.type("A stop sign.")
        page.keyboard.press("Enter")  # saved: back in the grid, where the search still is
        page.get_by_role("button", name="7 Edited Flagged A stop sign. 000006.png").wait_for()
        assert violations(page) == []
        assert page.evaluate("document.activeElement.closest('#tiles') !== null")
        page.get_by_label("Search").fill("")
        matching(page, "30 images")
        page.locator("#tiles button").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Enter")  # the rejected one: a new decision takes its place
        page.get_by_text("Rejected by you. A new decision replaces this one.").wait_for()
        assert violations(page) == []
        page.keyboard.press("a")
        page.get_by_role("button", name="1 Approved").wait_for()
        page.keyboard.press("9")
        page.keyboard.press("9")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("Give a number from 1 to 30.").wait_for()
        page.get_by_label("Number").fill("3")
        page.keyboard.press("Enter")
        page.wait_for_selector("#card[data-image-id='000002.png'][data-state=ready]")
        page.keyboard.press("g")
        page.locator("#tiles button").first.wait_for()
        page.keyboard.press("Escape")
        page.wait_for_selector("#card[data-image-id='000001.png'][data-state=ready]")
    assert decisions(out)[1:] == [
        ("edited", ("000006.png",), "A stop sign."),
        ("approved", ("000000.png",), "A dog."),
    ]


@pytest.mark.parametrize(("phone", "dark"), [(False, False), (True, True)], ids=["desktop", "dark phone"])
def test_images_without_a_caption_are_in_the_grid(make_reviewable, review, open_page, phone: bool, dark: bool) -> None:
    out = make_reviewable([None] * 3, errors=["generate_error", "truncated", "decoder_crashed"])
    (out.parent / "archive" / "000001.png").write_bytes(b"no image")
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url, phone, dark)
        page.wait_for_selector(READY)
        page.keyboard.press("g")
        matching(page, "27 images; 3 more without a caption, under “Failed”")
        page.get_by_label("Search").fill("crashed")
        matching(page, "No image matches; 1 more without a caption, under “Failed”")
        page.get_by_label("Search").fill("")
        page.get_by_label("Show").select_option("failed")
        matching(page, "3 images")
        page.locator("#tiles .no-image").nth(1).wait_for()
        assert page.locator("#tiles .tag").all_inner_texts() == ["generate error", "truncated", "decoder crashed"]
        shown = page.locator("#tiles li").nth(0).locator("img")
        assert shown.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 0
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_label("Search").fill("crashed")
        matching(page, "1 image")


def test_letters_are_keys_only_where_they_should_be(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        page.keyboard.press("e")
        page.keyboard.press("a")
        page.keyboard.press("Escape")
        assert page.inner_text("#alt-text") == "A dog."
        for key in ("Control+a", "Alt+r", "Meta+d", "z"):
            page.keyboard.press(key)
        page.keyboard.press("?")
        page.keyboard.press("r")
        page.get_by_role("checkbox", name="Single-key shortcuts").uncheck()
        page.get_by_role("button", name="Close").click()
        for key in "aerdsxuog?":
            page.keyboard.press(key)
        assert not page.locator("dialog[open]").count()
        assert page.get_attribute("#card", "data-state") == "ready"
        assert decisions(out) == []
        page.get_by_role("button", name="Decorative").click()
        page.wait_for_selector("#card[data-image-id='000004.png']")
    assert [decision for decision, _, _ in decisions(out)] == ["decorative"]


def test_every_control_is_reached_by_tab_and_none_holds_the_focus(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url)
        page.wait_for_selector(READY)
        reached = []
        for _ in range(14):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.getAttribute('aria-label') ?? document.activeElement.id")
            )
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
            assert reached[-1] in ("", None) or outline == "3px"
        names = page.evaluate(
            "[...document.querySelectorAll('button')].filter(one => one.checkVisibility() && !one.disabled).length"
        )
        assert len(set(reached) - {"", None}) >= names - 5  # the five decisions have neither label nor id


def test_targets_are_large_enough_for_a_finger(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (_, url):
        page = open_page(url, phone=True)
        page.wait_for_selector(READY)
        sizes = page.evaluate(
            "[...document.querySelectorAll('button, input')].filter(one => one.checkVisibility())"
            ".map(one => one.getBoundingClientRect()).map(box => [box.width, box.height])"
        )
        assert len(sizes) >= 12
        assert min(min(size) for size in sizes) >= 24
        page.get_by_role("button", name="Approve").tap()
        page.wait_for_selector("#card[data-image-id='000004.png']")


def test_a_server_that_has_gone_is_told_and_nothing_moves_on(out: Path, review, open_page) -> None:
    with review(out, "--queue", "all") as (process, url):
        page = open_page(url)
        page.wait_for_selector("#card[data-image=shown]")
        page.wait_for_load_state("networkidle")
        process.kill()
        process.wait()
        page.keyboard.press("a")
        page.get_by_role("alert").get_by_text("captioner review does not respond").wait_for()
        assert page.get_attribute("#card", "data-image-id") == "000000.png"
        page.context.close()
