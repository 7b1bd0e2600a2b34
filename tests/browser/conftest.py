"""A headless Chromium, the one that is installed; `make test-browser` sees to it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = {"width": 1366, "height": 820}, {"width": 360, "height": 740}

Open = Callable[..., object]


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    assert executable, "no Chromium; `make test-browser` installs it"
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses root
    with sync_playwright() as playwright:
        arguments = [*as_root, "--disable-dev-shm-usage"]
        opened = playwright.chromium.launch(executable_path=executable, args=arguments, timeout=600_000)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser) -> Iterator[Open]:
    """`open_page(url, phone=False, dark=False)`: a page; what it logs or raises as an error fails the test."""
    contexts, troubles = [], []

    def open_it(url: str, phone: bool = False, dark: bool = False):
        context = browser.new_context(
            viewport=PHONE if phone else DESKTOP, color_scheme="dark" if dark else "light", has_touch=phone
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto(url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    # A refused decision, an image or a server that has gone: the page tells the person.
    assert [trouble for trouble in troubles if not trouble.startswith("Failed to load resource")] == []


@pytest.fixture
def review() -> Callable[..., object]:
    """`with review(out, *flags, command="review") as (process, url)`: a real `captioner review`, or another command."""

    @contextmanager
    def reviewing(out: Path, *flags: str, command: str = "review") -> Iterator[tuple[subprocess.Popen[str], str]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.cli", command, str(out), "--reviewer", "ana", *flags],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            address = re.search(r"http://\S+", line)
            assert address, line
            yield process, address.group()
        finally:
            process.kill()
            process.communicate()

    return reviewing
