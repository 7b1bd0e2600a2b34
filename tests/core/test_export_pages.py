"""Filling missing alt texts into pages: nothing but the missing ones, and not one other byte."""

import html
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import caption_config
from hypothesis import example, given
from hypothesis import strategies as st

from captioner import pipeline
from captioner.config import AltTextConfig, ExportConfig
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.publishing.exports.command import export_texts
from captioner.publishing.exports.fill import PageError, decode, fill, find_gaps
from captioner.publishing.exports.html_pages import unified_diff
from captioner.publishing.exports.select import Tally
from captioner.store.journal import Journal, Review
from captioner.store.table import CaptionsTable, open_table
from captioner.testing import make_folder

TEXT = 'A "boat" <&> it\'s [here] *now* à'
FRAGMENTS = [
    '<img src="a.png">',
    "<IMG\n  SRC='a.png'\n  class=x />",
    "<img src=a.png>",
    '<img src="a.png" alt="">',
    '<img alt src="a.png">',
    '<img src="a.png" alt="mine">',
    '<img src="a.png" role="presentation">',
    '<img src="a.png" aria-label="mine">',
    '<img src="other.png">',
    '<img data-alt="x" src="a.png" title="a > b">',
    "<!-- <img src='a.png'> -->",
    "<script>var x = '<img src=\"a.png\">'</script>",
    "<textarea><img src='a.png'></textarea>",
    "<p>Häfen & Boote &amp; &nbsp;\r\n",
    "<!doctype html>\n",
    "<br/>",
    "a < b",
    "\t\n\x0c",
]


class Events(HTMLParser):
    """What a page says, with the alt texts that were filled in left out."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self.seen: list[Any] = []
        self.alts: list[str | None] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        alt = dict(attrs).get("alt", "none")
        self.alts += [alt] if tag == "img" else []
        self.seen.append((tag, [pair for pair in attrs if pair != ("alt", TEXT)]))

    def handle_data(self, data: str) -> None:
        self.seen.append(data)

    def handle_comment(self, data: str) -> None:
        self.seen.append(("comment", data))


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.sampled_from(["utf-8", "latin-1"]))
@example("".join(FRAGMENTS), "utf-8")
@example("".join(FRAGMENTS), "latin-1")
def test_only_missing_alts_are_filled(page: str, encoding: str) -> None:
    data = page.encode(encoding)
    text, found_encoding = decode(data)
    gaps = find_gaps(text, markdown=False)

    filled, done = fill(text, gaps, lambda src: TEXT if src == "a.png" else None, found_encoding)

    after = filled.encode(found_encoding)
    assert Events(filled).seen == Events(text).seen
    for gap, _ in done:  # taking out what was put in gives the page back, byte for byte
        end = filled.index('"', filled.index('alt="', gap.position) + 5) + 1
        filled = filled[: gap.position] + filled[end:]
    assert filled.encode(found_encoding) == data
    left = find_gaps(decode(after)[0], markdown=False)
    assert [gap.src for gap in left] == [gap.src for gap in gaps if gap.src != "a.png"]


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        ("![](a.png) and ![](<a.png>)", "![TEXT](a.png) and ![TEXT](<a.png>)"),
        ("![mine](a.png) ![ ](a.png) ![](other.png)", None),
        ("`![](a.png)` and ``x ![](a.png) ``", None),
        ("```\n![](a.png)\n```\n![](a.png)", "```\n![](a.png)\n```\n![TEXT](a.png)"),
        ("~~~\n<img src=a.png>\n", None),
        ("text\n\n    ![](a.png)\n", None),
        ("\\![](a.png)", None),
        ("<!-- ![](a.png) --> <pre>![](a.png)</pre>", None),
        ("a ` b\n\n![](a.png)\n\na ` b", "a ` b\n\n![TEXT](a.png)\n\na ` b"),
        ('[![](a.png "title")](page.html)', '[![TEXT](a.png "title")](page.html)'),
        ("<img src='a.png'>", None),
    ],
)
def test_markdown(page: str, wanted: str | None) -> None:
    escaped = 'A "boat" \\<\\&\\> it\'s \\[here\\] \\*now\\* à'

    filled, done = fill(page, find_gaps(page, markdown=True), lambda src: TEXT if src == "a.png" else None, "utf-8")

    if page.startswith("<img"):
        assert filled == f"<img alt=\"{html.escape(TEXT)}\" src='a.png'>"
    else:
        assert filled == (page if wanted is None else wanted.replace("TEXT", escaped))
        assert bool(done) == (wanted is not None)


def test_a_decorative_image_gets_an_empty_alt() -> None:
    page = '<img src="a.png">'

    assert fill(page, find_gaps(page, False), lambda src: "", "utf-8")[0] == '<img alt="" src="a.png">'


@pytest.mark.parametrize("page", ["<p><img src='a.png'", "text <!-- no end <img src=a.png>"])
def test_a_page_that_does_not_parse_is_no_page(page: str) -> None:
    with pytest.raises(PageError, match="line 1"):
        find_gaps(page, markdown=False)


def test_a_page_that_is_no_text_is_no_page() -> None:
    with pytest.raises(PageError):
        decode("<img src=a.png>".encode("utf-16"))


@pytest.fixture
def table(tmp_path: Path) -> CaptionsTable:
    """Twelve images, all approved but the last; a site shows some of them."""
    archive = make_folder(tmp_path / "archive", 12)
    pipeline.run(caption_config(archive, tmp_path / "out"))
    table = open_table(str(tmp_path / "out"))
    make_alt_texts(table, AltTextConfig())
    with Journal(table.directory, "Ada") as journal:
        journal.append(Review("approved", tuple(f"{number:06d}.png" for number in range(11)), None, "Ada"))
        journal.append(Review("edited", ("000001.png",), TEXT, "Ada"))
        journal.append(Review("decorative", ("000002.png",), "", "Ada"))
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    for name, new in (("000001", "harbour"), ("000002", "line"), ("000011", "secret")):
        shutil.copy(archive / f"{name}.png", site / f"{new}.png")
    (site / "index.html").write_bytes(
        b'<img src="harbour.png?v=3">\r\n<img src="/line.png"><img src="secret.png">\n'
        b'<img src="harbour.png" alt="mine">'
    )
    (site / "sub/page.md").write_text(
        "![](../harbour.png)\n![](https://cdn.example/p/000003.png)\n![](x/000004.png) ![](y/000004.png)"
    )
    (site / "broken.html").write_text("<p><img src='harbour.png'")
    return table


def export(table: CaptionsTable, tmp_path: Path, **settings: Any) -> Tally:
    dest = str(tmp_path / "filled")
    return export_texts(table, ExportConfig(to="html", path=dest, html_dir=str(tmp_path / "site"), **settings))


def test_a_site_is_filled_in_copies(table: CaptionsTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, dest = tmp_path / "site", tmp_path / "filled"
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}

    tally = export(table, tmp_path)

    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == before
    assert (dest / "index.html").read_bytes() == (
        f'<img alt="{html.escape(TEXT)}" src="harbour.png?v=3">\r\n<img alt="" src="/line.png">'
        '<img src="secret.png">\n<img src="harbour.png" alt="mine">'
    ).encode()
    lines = (dest / "sub/page.md").read_text().splitlines()
    assert lines[1].startswith("![")
    assert not lines[1].startswith("![]")
    assert lines[2] == "![](x/000004.png) ![](y/000004.png)"  # which of them was captioned is not certain
    assert not (dest / "broken.html").exists()
    assert "broken.html is left as it is" in capsys.readouterr().err
    assert dict(tally.written) == {"approved": 1, "edited": 2, "decorative": 1}
    assert (dest / "captioner-provenance.jsonl").read_text().count('"model": "fake"') == 4


def test_the_diff_is_one_that_git_applies(table: CaptionsTable, tmp_path: Path) -> None:
    export(table, tmp_path)
    site, dest = tmp_path / "site", tmp_path / "filled"

    subprocess.run(["git", "apply", str(dest / "alt-texts.diff")], cwd=site, check=True)

    for name in ("index.html", "sub/page.md"):
        assert (site / name).read_bytes() == (dest / name).read_bytes()


def test_a_dry_run_prints_the_diff_and_writes_nothing(
    table: CaptionsTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(table, tmp_path, dry_run=True)

    shown = capsys.readouterr().out
    assert "+++ b/index.html" in shown
    assert '+<img alt="" src="/line.png">' in shown or 'alt=""' in shown
    assert not (tmp_path / "filled").exists()


def test_a_page_without_a_last_line_end_has_a_diff() -> None:
    assert unified_diff("a.html", "x\ny", "x\nz").endswith(
        "-y\n\\ No newline at end of file\n+z\n\\ No newline at end of file\n"
    )
