"""The report: one page that stands alone, tells what the run did, and shows names and captions as text, not as HTML."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from PIL import Image

from captioner import pipeline
from captioner.config import CheckConfig
from captioner.data import ERROR_CODES
from captioner.report import charts, facts
from captioner.report.page import render, word_diff
from captioner.report.terminal import print_check
from captioner.report.verdict import verdict_of
from captioner.run import quality
from captioner.scoring.flags import ALL_FLAGS, flag_name
from captioner.store.table import CaptionsTable, open_table
from captioner.testing import make_folder
from ray_jobs.cli import main

EVIL = '<script>alert("x")</script> & <b>bold</b>'
EVIL_NAME = "<img src=x onerror=alert(1)>.png"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, their attributes and texts; checks that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with flags, failures, a turned image and names that try to be HTML."""
    root = tmp_path_factory.mktemp("report")
    archive = make_folder(root / "archive", 60)
    (archive / EVIL_NAME).write_bytes((archive / "000003.png").read_bytes())
    (archive / "empty & <i>.jpg").write_bytes(b"")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (300, 150), "red").save(archive / "turned.jpg", exif=turned)
    pipeline.run(caption_config(archive, root / "out", rows_per_file=100))
    file = root / "out/captions/part-00000.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        if row["reference_captions"]:
            words = row["reference_captions"][0].split()
            row["caption"] = " ".join(words[: 2 + number % 12])
            row["logprob_mean"] = -(number % 7) / 10
        if row["image_id"] in (EVIL_NAME, "000001.png"):
            row["caption"], row["flags"] = EVIL, ["special_tokens"]
        if row["image_id"] == "turned.jpg":
            row["flags"] = ["truncated"]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    quality.check(open_table(str(root / "out")), CheckConfig())
    quality.report(open_table(str(root / "out")))
    return root / "out"


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report/index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures(out: Path) -> dict[str, Any]:
    return json.loads((out / "report/report.json").read_text(encoding="utf-8"))


def test_the_page_stands_alone(out: Path, page: Page) -> None:
    html = (out / "report/index.html").read_text(encoding="utf-8")

    assert len(html) < 5_000_000
    assert not page.all("script")
    assert not page.all("link")
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,")), (tag, name)
    assert not re.search(r"https?://|url\(", html)


def test_what_comes_from_data_is_text(page: Page) -> None:
    assert EVIL in page.text
    assert EVIL_NAME in page.text
    assert "empty & <i>.jpg" in page.text
    assert not page.all("b")
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]


def test_the_page_is_accessible(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}

    assert page.all("html") == [{"lang": "en"}]
    assert [tags.count(tag) for tag in ("header", "nav", "main", "footer", "h1", "title")] == [1] * 5 + [
        1 + tags.count("svg")
    ]
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}
    assert all(section["aria-labelledby"] in ids for section in page.all("section"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert all("scope" in header for header in page.all("th"))
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert "viewport" in [meta.get("name") for meta in page.all("meta")]


def test_the_page_says_what_the_run_did(page: Page, figures: dict[str, Any]) -> None:
    check = figures["check"]

    counts = {"planned": 63, "ok": 62, "failed": 1, "failed_by_reason": {"empty_file": 1}}
    assert figures["counts"] == counts | {"by_fingerprint": {figures["fingerprint"]: 63}, "failed_answers": {}}
    for words in (
        f"WER (0 is best) {check['wer']:.3f}",
        "62 of 63 images captioned; 1 failed",
        "Scored 60 of 60 captions with references",
        "Special tokens",
        "empty file 1",
        figures["fingerprint"],
        f"pyarrow {pa.__version__}",
        "In references only, by images:",
        "Of 60 scored captions:",
        "Images per second, one worker",
        "Busy: ",
    ):
        assert words in page.text, words
    assert len(check["shown"]["random"]) == 24
    assert [row["wer"] for row in check["shown"]["worst"]] == sorted(
        (r["wer"] for r in check["shown"]["worst"]), reverse=True
    )
    assert sum(check["wer_histogram"]) == 60
    assert sum(group["rows"] for group in check["wer_by_confidence"]) == 60
    took_time = [stage for stage in ("read", "decode", "generate", "commit") if figures["run"]["seconds"][stage]]
    assert [stage["stage"] for stage in figures["stages"]] == took_time
    assert all(stage["images_per_second"] > 0 and 0 <= stage["busy"] <= 1 for stage in figures["stages"])


def test_texts_stand_out_from_their_background_in_both_schemes(out: Path) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 for text."""
    html = (out / "report/index.html").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.+?)\}", html, re.S)
    )
    pairs = [("ink", "paper"), ("ink", "panel"), ("ink", "ins"), ("ink", "del"), ("soft", "paper"), ("soft", "panel")]
    pairs += [(colour, "paper") for colour in ("bar", "mark", "good", "mixed", "bad", "unknown")]

    assert set(dark) == set(light)
    low = {(text, under): contrast(light[text], light[under]) for text, under in pairs}
    low |= {(text, under, "dark"): contrast(dark[text], dark[under]) for text, under in pairs}
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}


def contrast(colour: str, other: str) -> float:
    """The contrast ratio of two sRGB colours."""
    high, low = sorted((luminance(colour), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_page_of_part_of_a_table_says_so_and_colours_are_not_lost_in_print(
    out: Path, figures: dict[str, Any]
) -> None:
    check = figures["check"] | {"survey": figures["check"]["survey"] | {"num_rows": 20}}

    sentences = verdict_of(figures["counts"], check).sentences

    assert sentences[-1].startswith("The table is large: scores, flags and figures are of 20 of 63 rows")


def test_throughput_has_no_more_bins_than_commits_tell_and_shows_a_stall() -> None:
    commits = [(start, 10) for start in (*range(0, 30, 2), *range(90, 120, 2))]
    throughput = facts._throughput(commits, 1)

    assert 0 in throughput["rates"]
    assert sum(throughput["rates"]) * throughput["bin_seconds"] == pytest.approx(300, rel=0.02)
    assert facts._throughput(commits[:3], 1)["rates"] == []


def test_thumbnails_are_upright_and_small(out: Path) -> None:
    html = (out / "report/index.html").read_text(encoding="utf-8")
    section = html[html.index("<h3>Cut off</h3>") :]
    match = re.search(r'src="data:image/jpeg;base64,([^"]+)"', section)

    assert match is not None
    with Image.open(io.BytesIO(base64.b64decode(match[1]))) as image:
        assert image.size == (112, 224)


def test_a_page_of_large_images_stays_small(out: Path, figures: dict[str, Any]) -> None:
    images = {row["image_id"]: "data:image/jpeg;base64," + "A" * 400_000 for row in figures["check"]["shown"]["random"]}

    page = render(figures, images)

    assert 3_000_000 < len(page) < 5_000_000
    assert "no image" in page


def test_a_report_without_its_images_says_so(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 5)
    pipeline.run(caption_config(archive, tmp_path / "out"))
    archive.rename(tmp_path / "moved")

    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "out")])

    page = Page((tmp_path / "out/report/index.html").read_text(encoding="utf-8"))
    assert ended.value.code == 0
    assert not page.all("img")
    assert "images could not be read from the source" in page.text


def test_the_page_is_opened_when_asked(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)

    with pytest.raises(SystemExit):
        main(["report", str(out), "--open"])

    address = (out / "report/index.html").as_uri()
    assert opened == [address]
    # The stand-in returns None, as a machine without a browser returns False.
    assert f"no browser could be opened; open this page in one yourself: {address}" in capsys.readouterr().err


def test_a_report_is_made_of_the_rows_that_are_there_now(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 20)
    pipeline.run(caption_config(archive, tmp_path / "out"))
    table: CaptionsTable = open_table(str(tmp_path / "out"))
    quality.check(table, CheckConfig(seed=4))

    quality.report(table)
    assert table.directory.read_json("report/report.json")["check"]["seed"] == 4  # not checked anew
    (archive / "new.png").write_bytes((archive / "000000.png").read_bytes() + b"\n")
    pipeline.run(caption_config(archive, tmp_path / "out", extend=True))

    assert table.directory.read_json("report/report.json")["check"]["survey"]["num_rows"] == 21


def test_the_page_offers_a_retry_only_where_it_may_help(figures: dict[str, Any]) -> None:
    record = figures["run"]
    counts = figures["counts"]

    assert set(facts._commands(record, counts)) == set(figures["commands"]) == {"run"}, "one empty file"
    retry = facts._commands(record, counts | {"failed_by_reason": {"empty_file": 1, "timeout": 1}})["retry"]
    assert "--retry-failed" in retry.split()


def test_no_line_of_the_page_is_broken_inside_a_flag(figures: dict[str, Any]) -> None:
    line = "captioner caption '<my> photos' out --model a-b/c --num-beams 3"
    html = render(figures | {"commands": {"run": line}, "run": figures["run"] | {"notes": ["raise (--limit)"]}}, {})

    assert 'raise (<span class="word">--limit</span>)' in html
    assert '<span class="word">--model</span> a-b/c <span class="word">--num-beams</span> 3' in html
    assert ".word { white-space: nowrap; }" in html
    assert line in Page(html).text


def test_scores_that_cannot_be_measured_say_what_they_need(figures: dict[str, Any]) -> None:
    none = dict.fromkeys(("wer", "shuffled_wer", "lift", "cider_d"))
    without = figures["check"] | none | {"num_rows": 0, "with_references": 0}
    of_one_caption = figures["check"] | {"shuffled_wer": None, "lift": None}

    tiles = [tiles_of(figures | {"check": check}) for check in (figures["check"], without, of_one_caption)]

    assert not any("no data" in text for text in tiles)
    assert "Scores not measured captioner check OUT --references FILE" in tiles[1]
    assert "Lift not measured needs two scored captions" in tiles[2]
    assert "Images/s" not in tiles_of(figures | {"run": figures["run"] | {"images_per_second": None}})


def tiles_of(figures: dict[str, Any]) -> str:
    html = render(figures, {})
    start = html.index('<dl class="tiles">')
    return Page(html[start : html.index("</dl>", start) + 5]).text


def test_every_flag_is_shown_with_its_count_and_what_it_means(
    figures: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_check(figures | {"check": figures["check"] | {"flags": dict.fromkeys(ALL_FLAGS, 1234)}})

    lines = " ".join(capsys.readouterr().out.split())
    for flag, meaning in ALL_FLAGS.items():
        assert f"{flag_name(flag)} 1,234 {meaning}" in lines


def test_no_flag_of_a_caption_has_the_name_of_a_failure() -> None:
    assert {flag_name(flag) for flag in ALL_FLAGS}.isdisjoint(code.replace("_", " ") for code in ERROR_CODES)


@pytest.mark.parametrize(
    ("reference", "caption", "pieces"),
    [
        ("a red dog", "A blue dog.", [("same", "a"), ("missing", "red"), ("added", "blue"), ("same", "dog")]),
        ("a dog", "a dog here", [("same", "a dog"), ("added", "here")]),
        ("a dog", "", [("missing", "a dog")]),
        ("!", "a dog", [("added", "a dog")]),
    ],
)
def test_word_diff(reference: str, caption: str, pieces: list[tuple[str, str]]) -> None:
    assert word_diff(reference, caption) == pieces


COUNTS = {"planned": 100, "ok": 100, "failed": 0}
CHECK = {
    "failed_gates": [],
    "lift": 0.6,
    "wer": 0.3,
    "shuffled_wer": 0.75,
    "human_wer": None,
    "num_rows": 100,
    "with_references": 100,
    "flags": {},
    "survey": {"num_ok": 100, "num_rows": 100},
}


@pytest.mark.parametrize(
    ("counts", "check", "level"),
    [
        ({}, {}, "good"),
        ({}, {"lift": 0.15}, "mixed"),
        ({}, {"lift": 0.0}, "bad"),
        ({}, {"lift": None, "wer": None}, "unknown"),
        ({}, {"failed_gates": ["WER 0.3 is above --max-wer 0.2"]}, "bad"),
        ({"ok": 0, "failed": 100}, {"lift": None, "wer": None}, "bad"),
        ({"ok": 20, "failed": 80}, {}, "mixed"),
        ({}, {"flags": {"same_caption": 40}}, "mixed"),
        ({}, {"flags": {"over_125": 90}}, "good"),
    ],
)
def test_verdict(counts: dict[str, Any], check: dict[str, Any], level: str) -> None:
    assert verdict_of(COUNTS | counts, CHECK | check).level == level


def test_a_verdict_on_a_part_of_a_table_names_the_command_that_checks_all() -> None:
    *_, sentence = verdict_of(COUNTS | {"planned": 300, "ok": 300}, CHECK).sentences

    assert "of 100 of 300 rows" in sentence
    assert "captioner check OUT --sample all reads all of them" in sentence


def test_charts_hold_every_value_and_escape_labels() -> None:
    drawn = str(charts.bars([1, 0, 2], ["<a>", "", "c"], 'says "so" & more', [(1.5, "<mark>")]))
    page = Page(drawn)

    heights = [float(rect["height"] or 0) for rect in page.all("rect")]
    assert heights[1] == 0
    assert heights[2] == 2 * heights[0] > 0
    assert "<a>" in page.text
    assert "<mark>" in page.text
    assert page.all("svg")[0]["aria-label"] == 'says "so" & more'
    assert Page(str(charts.bars([], [], "nothing"))).all("rect") == []
