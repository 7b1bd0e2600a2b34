"""Alt texts: what each rule does and leaves, what is flagged, and the laws that hold for every caption."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from hypothesis import example, given
from hypothesis import strategies as st

from captioner import pipeline
from captioner.config import AltTextConfig, CheckConfig
from captioner.errors import OutputError, UsageError
from captioner.publishing.alt_text.command import chosen_rules, make_alt_texts
from captioner.publishing.alt_text.findings import CaptionedImage, findings
from captioner.publishing.alt_text.rules import RULES, Limits, apply_rules
from captioner.publishing.alt_text.schemas import ALT_TEXT_SCHEMA
from captioner.publishing.alt_text.texts import read_texts
from captioner.report import facts
from captioner.run import quality
from captioner.scoring.judgements import JUDGE_FILE
from captioner.scoring.terms import read_terms, term_finder
from captioner.store.table import CaptionsTable, open_table
from captioner.testing import make_folder
from ray_jobs.cli import main

LIMITS = Limits()
WORDS = re.split(
    " ",
    'a an the of with and in picture photo image dog man sign says that is red Dr. e.g. iPhone [unused3] <pad> "STOP" '
    '“no entry” " . , ; : ! ? … - ( ) 12 犬 。 कुत्ता । é ß ǆ \u0301 \u200d \n \u00a0',
)
captions = st.one_of(
    st.text(max_size=400),
    st.lists(st.sampled_from(WORDS), max_size=90).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=90).map("".join),
)


@given(captions, st.sampled_from([Limits(), Limits(20, 40), Limits(1, 2), Limits(125, 125)]))
@example("a picture of a picture of a dog", LIMITS)
@example("x. x. x", LIMITS)
@example("[unu[pad]sed1] dog", LIMITS)
@example("[unused0]" * 60, LIMITS)
@example("犬" * 300, LIMITS)
@example("a" + "\u0301" * 300, LIMITS)
@example('"' + "visible " * 60 + '"', LIMITS)
def test_the_laws_of_alt_texts(caption: str, limits: Limits) -> None:
    text, _ = apply_rules(caption, limits)

    assert apply_rules(text, limits) == (text, [])
    assert len(text) <= len(caption) + 1  # the full stop
    assert len(text) <= limits.hard
    assert bool(text) == bool(caption.strip())


@given(st.lists(st.sampled_from([*"abcd", "EXIT 12", "no entry,", "stop stop stop", "Å , b"]), min_size=1, max_size=4))
def test_visible_text_is_left_as_it_is(quoted: list[str]) -> None:
    spans = [f'"{text}"' for text in quoted]

    text, _ = apply_rules("a picture of a sign , " + " and ".join(spans))

    assert [span for span in spans if span not in text] == []


@pytest.mark.parametrize(
    ("rule", "caption", "wanted"),
    [
        ("special_tokens", "a [unused12] dog<|endoftext|>\ufffd", "a   dog  "),
        ("spaces", "a dog , a  cat .", "a dog, a cat."),
        ("repeats", "a bald bald bald man", "a bald man"),
        ("repeats", "a cat on a mat on a mat on a mat on a", "a cat on a mat"),
        ("repeats", "a red square, a red square and Bora Bora", None),
        ("repeats", "a clock that shows 11 11 11", None),
        ("picture_of", "This is a picture of a dog", "a dog"),
        ("picture_of", "the image shows: two cats", "two cats"),
        ("picture_of", "a drawing of a dog", None),
        ("picture_of", "a black and white photo of a dog", None),
        ("picture_of", "an image of", None),
        ("capital", "a dog", "A dog"),
        ("capital", "iPhone on a table", None),
        ("capital", '"exit" over a door', None),
        ("full_stop", "a dog,", "a dog."),
        ("full_stop", "a dog!", None),
        ("full_stop", 'a sign that says "Stop."', None),
        ("full_stop", "犬が走る", "犬が走る。"),
        ("shorten", "A dog runs. " + "It is brown. " * 20, "A dog runs." + " It is brown." * 8),
        ("shorten", "Dr. " + "word " * 30 + "end. Then more.", "Dr. " + "word " * 30 + "end."),
        ("hard_limit", "a man, " + "word " * 60 + "end", "a man, " + "word " * 48 + "wor"),
        ("hard_limit", "word " * 40 + "at the, " + "word " * 40, "word " * 39 + "word"),
    ],
)
def test_a_rule(rule: str, caption: str, wanted: str | None) -> None:
    text = RULES[rule](caption, LIMITS)

    if rule == "hard_limit":
        assert len(text) < 250
        assert caption.startswith(text)
        assert not text.endswith(("at", "the", ","))
    else:
        assert text == (caption if wanted is None else wanted)


def test_every_rule_cites_its_source() -> None:
    assert [name for name, rule in RULES.items() if "Source:" not in (rule.__doc__ or "")] == []


@pytest.mark.parametrize(
    ("caption", "flags"),
    [
        ("a dog on a lawn", []),
        ("a blue background with waves", ["maybe_decorative"]),
        ("a sign on a door", ["text_in_picture"]),
        ("an empty plate on a table", []),
        ('a door, "exit"', ["text_in_picture"]),
        ("an indian bride with her mother", ["identity", "gender"]),
        ("an african elephant behind window blinds", []),
        ("an elderly couple", ["identity"]),
        ("a man on a horse", ["gender"]),
        ("Ada Lovelace at a desk", ["name"]),
        ("a bunch of gypsys", ["identity", "listed_term"]),
        ("a lawn of grass", []),
        ("[unused4]", ["no_words"]),
        ("tree " * 60, ["cut_short"]),
    ],
)
def test_what_a_person_has_to_decide_is_flagged(caption: str, flags: list[str]) -> None:
    text, rules = apply_rules(caption, rules=[name for name in RULES if name != "repeats"])

    assert findings(CaptionedImage(caption, text, tuple(rules)), term_finder(["gypsy", "ass"])) == flags


def test_a_spacer_may_be_decorative() -> None:
    assert findings(CaptionedImage("a line", "A line.", (), 600, 2), term_finder([])) == ["maybe_decorative"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> CaptionsTable:
    """Three parts; the second image has a broken file."""
    archive = make_folder(tmp_path_factory.mktemp("alt") / "archive", 100)
    (archive / "000001.png").write_bytes(b"no image")
    out = archive.with_name("out")
    pipeline.run(caption_config(archive, out, rows_per_file=40))
    return open_table(str(out))


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def test_alt_texts_lie_beside_the_captions_row_for_row(
    table: CaptionsTable, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(table.directory.location)
    before = [file.read_bytes() for file in sorted((out / "captions").iterdir())]

    assert exit_code("alt-text", str(out), "--language", "en", "--no-rule", "full_stop") == 0

    assert "99 alt texts" in capsys.readouterr().out
    assert [file.read_bytes() for file in sorted((out / "captions").iterdir())] == before
    for part in sorted((out / "captions").iterdir()):
        rows, alt_texts = pq.read_table(part), pq.read_table(out / "alt_text" / part.name)
        assert alt_texts.schema.equals(ALT_TEXT_SCHEMA)
        for name in ("image_id", "run_id", "created_at"):
            assert alt_texts[name].equals(rows[name])
    settings = json.loads((out / "alt_text" / "settings.json").read_text())
    assert (settings["language"], settings["max_chars"], settings["hard_max"]) == ("en", 125, 250)
    assert settings["rules"] == [name for name in RULES if name != "full_stop"]
    texts = [row for rows in read_texts(table) for row in rows.to_pylist()]
    assert len(texts) == 99
    assert {row["language"] for row in texts} == {"en"}
    assert all(row["alt_text"] == row["caption"][0].upper() + row["caption"][1:] for row in texts)


def test_made_again_after_a_kill_in_the_middle_it_is_complete(table: CaptionsTable) -> None:
    out = table.directory.location
    make_alt_texts(table, AltTextConfig(max_chars=10))
    code = f"""
from captioner.publishing.alt_text.command import run
from captioner.config import AltTextConfig
from captioner.testing import sigkill_at_write
with sigkill_at_write(3):  # the settings go, the first part comes
    run({out!r}, AltTextConfig())
"""
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ)
    assert killed.returncode == -signal.SIGKILL

    with pytest.raises(OutputError, match="captioner alt-text"):
        list(read_texts(table))
    make_alt_texts(table, AltTextConfig())

    assert sum(rows.num_rows for rows in read_texts(table)) == 99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": ["capitals"]}, "--rules capitals: no such rule; did you mean capital?"),
        ({"no_rule": ["xyz"]}, "rules are special_tokens, "),
        ({"max_chars": 300}, "--hard-max 250: must not be less than --max-chars 300"),
        ({"terms": "/nowhere.txt"}, "--terms /nowhere.txt"),
    ],
)
def test_settings_that_make_no_sense(table: CaptionsTable, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_alt_texts(table, AltTextConfig(**settings))


def test_terms_as_other_programs_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "terms.txt"
    for encoding in ("utf-8-sig", "utf-16", "utf-8"):
        file.write_text("gypsy\r\n# ours\r\ncafe\u0301\r\n", encoding)
        for location in ("~/terms.txt", file.as_uri(), str(file)):
            holds_term = term_finder(read_terms(location))
            assert holds_term("A gypsy wagon")
            assert holds_term("un caf\u00e9")
            assert holds_term("un cafe\u0301")
            assert not holds_term("ours")
    file.write_bytes("Bär".encode("latin-1"))
    with pytest.raises(UsageError, match="it is not UTF-8 text; save it as UTF-8"):
        read_terms(str(file))


def test_only_the_rules_that_are_wanted() -> None:
    assert chosen_rules(AltTextConfig(rules=["full_stop", "capital"], no_rule=["capital"])) == ("full_stop",)
    assert apply_rules("a  dog", rules=["capital"]) == ("A  dog", ["capital"])


def test_a_table_that_is_not_finished(tmp_path: Path) -> None:
    pipeline.run(caption_config(make_folder(tmp_path / "archive", 3), tmp_path / "out", plan_only=True))

    with pytest.raises(OutputError, match="not finished"):
        make_alt_texts(open_table(str(tmp_path / "out")), AltTextConfig())


def test_a_retry_that_captions_nothing_leaves_alt_texts_and_judgements_current(tmp_path: Path) -> None:
    archive, out = make_folder(tmp_path / "archive", 3), tmp_path / "out"
    (archive / "empty.png").write_bytes(b"")
    pipeline.run(caption_config(archive, out))
    table = open_table(str(out))
    make_alt_texts(table, AltTextConfig())

    pipeline.run(caption_config(archive, out, retry_failed=True))

    assert len(table.plans()) == 2
    assert [rows.num_rows for rows in read_texts(table)] == [3]
    table.directory.write_json(JUDGE_FILE, {"generations": [0]}, checksum=True)
    quality.check(table, CheckConfig())
    assert facts._judgement(table)["is_current"]
    table.directory.delete(JUDGE_FILE)  # the page shows more figures than these
    (archive / "empty.png").write_bytes((archive / "000000.png").read_bytes())
    pipeline.run(caption_config(archive, out, retry_failed=True))
    with pytest.raises(OutputError, match="newer captions than alt texts"):
        list(read_texts(table))
    table.directory.write_json(JUDGE_FILE, {"generations": [0]}, checksum=True)
    assert not facts._judgement(table)["is_current"]
