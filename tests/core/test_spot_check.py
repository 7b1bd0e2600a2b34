"""Spot-checks by people: the sample, what verdicts say of all captions, the session, the report and the gate."""

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config
from hypothesis import example, given
from hypothesis import strategies as st

from captioner import pipeline
from captioner.errors import UsageError
from captioner.publishing.review import command
from captioner.publishing.review.spot_check import SpotCheckSession, VerdictRequest, choose_sample
from captioner.scoring.verdicts import (
    MIN_OF_STRATUM,
    SampleSpec,
    allocate,
    describe,
    draw,
    figures,
    kappa,
    share_of,
    trials_for,
    wilson,
    write_spec,
)
from captioner.store.journal import SPOT_CHECKS, read_reviews
from captioner.store.table import open_table
from captioner.testing import make_folder
from ray_jobs.cli import main

NUM_SCENES, NUM_EXCHANGED, FOLDERS = 300, 90, {"large": 240, "small": 52, "tiny": 8}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of rendered scenes in three folders: right captions, 30 % of which are exchanged with each other."""
    root = tmp_path_factory.mktemp("scenes")
    archive = make_folder(root / "archive", NUM_SCENES)
    names = [f"{folder}/{number:06d}.png" for folder, count in FOLDERS.items() for number in range(count)]
    lines = [json.loads(line) for line in (archive / "metadata.jsonl").read_text().splitlines()]
    for line, name in zip(lines, names, strict=True):
        (archive / name).parent.mkdir(exist_ok=True)
        (archive / line["file_name"]).rename(archive / name)
        line["file_name"] = name
    (archive / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert pipeline.run(caption_config(archive, root / "out", cluster={"local": True}, rows_per_file=100)) == 0
    files = sorted((root / "out/captions").iterdir())
    captions = [row[0] for file in files for row in pq.read_table(file)["reference_captions"].to_pylist()]
    exchanged = random.Random(5).sample(range(NUM_SCENES), NUM_EXCHANGED)
    texts = dict(enumerate(captions))
    texts |= {index: captions[other] for index, other in zip(exchanged, exchanged[1:] + exchanged[:1], strict=True)}
    set_captions(root / "out", list(texts.values()))
    return root / "out"


def set_captions(out: Path, texts: list[str]) -> None:
    """Replace the first captions of a table."""
    left = list(texts)
    for file in sorted((out / "captions").iterdir()):
        rows = pq.read_table(file)
        column = [left.pop(0) if left else caption for caption in rows["caption"].to_pylist()]
        index = rows.schema.get_field_index("caption")
        pq.write_table(rows.set_column(index, rows.schema.field("caption"), pa.array(column, pa.string())), file)


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A table of 30 images."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def session_of(out: Path, reviewer: str = "ana", size: int = 200, seed: int = 0, by: str = "") -> SpotCheckSession:
    table = open_table(str(out))
    return SpotCheckSession(table, reviewer, choose_sample(table, size, seed, by)[0])


def judge(session: SpotCheckSession, *verdicts: str) -> dict[str, Any]:
    """Judge the captions that the page shows, one after the other; returns the last state of the page."""
    state = session.next()
    for verdict in verdicts:
        card = state["card"]
        saved, state = session.decide(VerdictRequest(verdict, card["index"], card["text"], 3.0))
        assert saved
    return state


def verdicts_of(out: Path) -> list[tuple[str, str]]:
    reviews = read_reviews(open_table(str(out)).directory, SPOT_CHECKS)[0]
    return [(review.image_ids[0], review.decision) for review in reviews]


def references_of(out: Path) -> dict[str, list[str]]:
    rows = [row for file in sorted((out / "captions").iterdir()) for row in pq.read_table(file).to_pylist()]
    return {row["image_id"]: row["reference_captions"] for row in rows}


@pytest.mark.parametrize("by", ["", "folder"])
def test_a_reviewer_of_a_sample_recovers_the_share_of_right_captions(scenes: Path, tmp_path: Path, by: str) -> None:
    """The interval of a sample holds the true share for 95 of 100 seeds."""
    shutil.copytree(scenes, tmp_path / "out")
    out, references = tmp_path / "out", references_of(scenes)
    table = open_table(str(out))
    everything = draw(table, SampleSpec(NUM_SCENES)).captions
    truth = sum(caption.text in references[caption.image_id] for caption in everything) / NUM_SCENES
    assert truth == pytest.approx(0.7, abs=0.03)
    hits = 0
    for seed in range(100):
        spec = SampleSpec(50, seed, by)
        write_spec(table, spec)
        with SpotCheckSession(table, "ana", draw(table, spec)) as session:
            state = session.next()
            while card := state["card"]:
                verdict = "right" if card["text"] in references[card["image_id"]] else "wrong"
                _, state = session.decide(VerdictRequest(verdict, card["index"], card["text"]))
        share = figures(table)
        assert share is not None
        assert share["judged"] == 50
        hits += share["low"] <= truth <= share["high"]
        shutil.rmtree(out / SPOT_CHECKS)
    assert hits >= 95


def test_a_sample_depends_on_ids_and_seed_alone_and_a_larger_one_holds_it(scenes: Path) -> None:
    table = open_table(str(scenes))

    def ids(size: int, seed: int = 0) -> list[str]:
        return [caption.image_id for caption in draw(table, SampleSpec(size, seed)).captions]

    assert ids(40) == ids(40) == ids(120)[:40]
    assert ids(40) != ids(40, seed=1)
    assert len(ids(1_000)) == len(set(ids(1_000))) == NUM_SCENES


def test_each_folder_gets_its_share_and_small_ones_enough(scenes: Path) -> None:
    sample = draw(open_table(str(scenes)), SampleSpec(60, by="folder"))

    assert sample.strata == FOLDERS
    assert Counter(caption.stratum for caption in sample.captions) == {"large": 42, "small": 10, "tiny": 8}


@example(sizes={"": 341, "0": 341, "1": 2, "2": 2, "00": 341}, total=12)
@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(1, 500), min_size=1, max_size=12), total=st.integers(12, 900)
)
def test_a_sample_is_divided_among_strata(sizes: dict[str, int], total: int) -> None:
    counts = allocate(sizes, total)

    assert sum(counts.values()) == min(total, sum(sizes.values()))
    floor = min(MIN_OF_STRATUM, total // len(sizes))
    assert all(min(size, floor) <= counts[name] <= size for name, size in sizes.items())
    one_less = [(count - 1) / sizes[name] for name, count in counts.items() if count > floor]
    thinnest = min((count / sizes[name] for name, count in counts.items()), default=0)
    assert all(fraction <= thinnest for fraction in one_less)


def test_figures_worked_out_by_hand() -> None:
    judged = [("a", number < 9) for number in range(10)] + [("b", False)] * 10
    share = share_of(judged, {"a": 900, "b": 100})
    assert share.share == pytest.approx(0.81)  # 90 % of 900, none of 100
    trials = 1_000**2 / (10 * 90**2 + 10 * 10**2)
    assert (share.low, share.high) == pytest.approx(wilson(0.81 * trials, trials))

    plain = share_of([("", number < 142) for number in range(200)], {"": 10_000})
    assert (plain.low, plain.high) == pytest.approx((0.6436, 0.7685), abs=5e-5)
    assert plain.more == trials_for(0.71) - 200 == 1_775
    assert share_of([], {"": 5}).share is None
    whole = share_of([("", True)] * 4 + [("", False)], {"": 5})
    assert (whole.low, whole.high, whole.more) == (0.8, 0.8, 0)  # nothing is left to guess
    assert share_of([("", True)] * 50, {"": 60}).more == 10


@given(share=st.floats(0, 1), margin=st.sampled_from([0.02, 0.05]))
def test_how_many_more_is_the_smallest_number(share: float, margin: float) -> None:
    def width(trials: int) -> float:
        low, high = wilson(share * trials, trials)
        return high - low

    needed = trials_for(share, margin)
    assert width(needed) <= 2 * margin < width(needed - 1)


def test_kappa_worked_out_by_hand() -> None:
    pairs = [("right", "right")] * 20 + [("right", "wrong")] * 5 + [("wrong", "right")] * 10 + [("wrong", "wrong")] * 15

    assert kappa(pairs) == pytest.approx(0.4)  # they agree on 0.7, by chance on 0.5
    assert kappa([("right", "right")] * 9) is None
    assert kappa([("right", "wrong"), ("wrong", "right")]) == -1


def test_two_reviewers_see_the_same_captions_and_the_worse_verdict_counts(out: Path) -> None:
    with session_of(out, "ana", 10) as ana, session_of(out, "ben", 10) as ben:
        shown = ana.next()["card"]
        judge(ana, "right", "right", "wrong", "right")
        assert ben.next()["card"] == shown  # ana's verdicts do not show
        judge(ben, "right", "small_fault", "wrong")
        shares = ben.figures()

    assert shares["verdicts"] == {"right": 2, "small_fault": 1, "wrong": 1, "offensive": 0}
    assert shares["reviewers"] == {"ana": 4, "ben": 3}
    (agreement,) = shares["agreement"]
    assert (agreement["captions"], agreement["same"]) == (3, 2)
    assert agreement["kappa"] == pytest.approx(0.5)  # 2 of 3; by chance (2 * 1 + 1 * 1) of 9
    assert [row["verdict"] for row in shares["shown"]] == ["wrong", "small_fault"]
    assert figures(open_table(str(out))) == shares
    assert describe(shares) == [
        "50.0 % (95 % interval 15.0 to 85.0 %) of the captions are right (4 captions judged of 30: 2 right, 1 with a "
        "small fault, 1 wrong, 0 offensive)",
        "for an interval of ±2 %, look at 26 more captions",
        "ana and ben agree on 2 of 3 captions that both saw (Cohen's kappa 0.50)",
    ]


def test_skips_come_back_an_undo_shows_the_caption_again_and_a_restart_continues(out: Path) -> None:
    with session_of(out, size=4) as session:
        assert session.undo()["message"] == "There is nothing to undo"
        first = session.next()["card"]
        state = judge(session, "skipped", "wrong", "right")
        assert state["progress"] | {"minutes_left": 0} == {
            **{"total": 4, "judged": 2, "skipped": 1, "can_undo": True, "minutes_left": 0}
        }
        state = session.undo()
        assert state["message"] == "Undone: Judged right"
        judge(session, "offensive", "right")
        assert session.next()["card"] is None
        assert session.show_skipped()["card"] == first
    with session_of(out, size=4) as session:
        assert session.next()["card"] is None
        assert session.next()["progress"]["skipped"] == 1
        session.show_skipped()
        judge(session, "small_fault")
    assert sorted(Counter(verdict for _, verdict in verdicts_of(out)).items()) == [
        ("offensive", 1),
        ("right", 1),
        ("skipped", 1),
        ("small_fault", 1),
        ("wrong", 1),
    ]


def test_a_caption_is_judged_once_also_in_two_windows(out: Path) -> None:
    with session_of(out) as window, session_of(out) as other:
        card = window.next()["card"]
        request = VerdictRequest("right", card["index"], card["text"])
        assert window.decide(request)[0]
        saved, state = other.decide(request)

    assert not saved
    assert state["message"] == "You have already judged this caption; nothing was changed"
    assert state["card"]["index"] == card["index"] + 1
    assert len(verdicts_of(out)) == 1


def test_verdicts_about_captions_that_changed_and_images_outside_of_the_sample_do_not_count(out: Path) -> None:
    with session_of(out, size=10) as session:
        judge(session, *["right"] * 10)
        ids = [caption.image_id for caption in session.sample.captions]
    captions = {f"{number:06d}.png": "another caption" for number in range(30) if f"{number:06d}.png" in ids[:2]}
    texts = pq.read_table(out / "captions/part-00000.parquet").to_pylist()
    set_captions(out, [captions.get(row["image_id"], row["caption"]) for row in texts])

    with session_of(out, size=6) as session:
        shares = session.figures()
        assert session.next()["card"]["image_id"] == ids[0]  # to be judged again

    assert (shares["judged"], shares["changed"], shares["outside"]) == (4, 2, 4)
    assert "not counted: 2 verdicts about a caption that has changed since" in describe(shares)


def test_what_is_not_given_is_as_the_last_time(out: Path) -> None:
    table = open_table(str(out))

    assert choose_sample(table, 12, 7, "folder")[0].spec == SampleSpec(12, 7, "folder")
    sample, sentence = choose_sample(table, None, None, None)
    assert sample.spec == SampleSpec(12, 7, "folder")
    assert sentence == "12 of 30 captions, drawn with seed 7, stratified by folder: 1 stratum"
    assert (
        choose_sample(table, 20, None, "")[1]
        == "20 of 30 captions, drawn with seed 7; the sample differs from the last one"
    )


def test_a_table_that_outgrew_its_strata_is_still_checked(out: Path) -> None:
    table = open_table(str(out))
    write_spec(table, SampleSpec(12, by="image_id"))  # 30 values
    assert len(draw(table, SampleSpec(12, by="image_id")).captions) == 12
    write_spec(table, SampleSpec(12, by="a_column_of_the_table_before"))

    shares = figures(table)

    assert shares is not None
    assert (shares["by"], shares["captions"], shares["sampled"], shares["judged"]) == ("", 30, 12, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--by", "titel"], "--by titel: give folder or a column of the table: image_id, "),
        (["--by", "reference_captions"], "--by reference_captions: give folder or a column"),
        (
            ["--by", "image_id", "--sample", "20"],
            "--by image_id: the captions have 30 values of it, more than --sample 20",
        ),
        (["--reviewer", " "], "--reviewer: give a name"),
    ],
)
def test_a_spot_check_that_makes_no_sense(out: Path, flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["spot-check", str(out), *flags])

    assert stop.value.code == 1
    assert message in capsys.readouterr().err
    assert not (out / SPOT_CHECKS).exists()


@pytest.mark.parametrize(
    "body",
    [
        *([], {}, None, {"verdict": "approved", "index": 0, "shown": ""}, {"verdict": "right", "index": 0}),
        *({"verdict": "right", "index": 10, "shown": ""}, {"verdict": "right", "index": True, "shown": ""}),
        {"verdict": "undo", "index": 0, "shown": ""},
    ],
)
def test_what_the_page_does_not_send_is_refused(body: Any) -> None:
    with pytest.raises(UsageError):
        VerdictRequest.from_json(body, 10)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    shown = capsys.readouterr()
    return int(str(stop.value.code)), shown.out, shown.err


def test_report_terminal_and_gate_say_what_people_judged(out: Path, capsys) -> None:
    code, _, error = run(capsys, "check", str(out), "--sample", "0", "--min-right", "0.5")
    assert code == 2
    assert "--min-right 0.5 cannot be checked: nobody has judged captions (captioner spot-check)" in error

    with session_of(out, size=20, by="folder") as session:
        judge(session, *["right"] * 18, "wrong")
    share = "94.7 % (95 % interval 75.4 to 99.1 %)"
    code, shown, _ = run(capsys, "check", str(out), "--sample", "0", "--min-right", "0.75")
    assert code == 0
    assert f"judged by people:\n  {share} of the captions are right (19 captions judged of 30" in shown
    code, _, error = run(capsys, "check", str(out), "--sample", "0", "--min-right", "0.9")
    assert code == 2
    assert f"{share} of 19 captions are right: the lower end of the interval is below --min-right 0.9" in error

    with session_of(out, "<b>ben</b>", size=20, by="folder") as session:
        judge(session, "offensive")
    assert run(capsys, "report", str(out))[0] == 0  # without another check
    page = (out / "report/index.html").read_text()
    assert "1 offensive" in page
    assert re.search(r"ana \(19\), &lt;b&gt;ben&lt;/b&gt; \(1\)|&lt;b&gt;ben&lt;/b&gt; \(1\), ana \(19\)", page)
    assert "<b>ben" not in page
    assert 'data-label="Right">89.5 % (95 % interval 68.6 to 97.1 %)' in page
    assert json.loads((out / "report/report.json").read_text())["check"]["spot_check"]["verdicts"]["offensive"] == 1
    assert "captions are right: 2 people judged 19, drawn at random" in page


def test_the_end_of_a_spot_check_prints_its_figures(out: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(server: Any) -> None:
        judge(server.session, "right", "wrong")
        raise KeyboardInterrupt

    monkeypatch.setattr(command.ReviewServer, "serve_forever", stop)
    code, shown, error = run(capsys, "spot-check", str(out), "--sample", "5", "--reviewer", "ana")

    assert code == 0
    assert re.fullmatch(r"judging 5 captions as ana: http://127.0.0.1:\d+/\S+/\n", shown)
    assert "50.0 % (95 % interval 9.5 to 90.5 %) of the captions are right (2 captions judged of 30: 1 right" in error
    assert "captioner report" in error
    assert verdicts_of(out)
