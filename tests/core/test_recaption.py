"""Weak captions again with another model: what is chosen, what is refused, what the report says."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from helpers import caption_config, rows_of
from hypothesis import given
from hypothesis import strategies as st

from captioner import pipeline
from captioner.data import Captions, Pixels
from captioner.errors import FingerprintError, OutputError, UsageError
from captioner.models.fake import FakeCaptioner
from captioner.run.selector import Selector, parse_selector
from captioner.scoring.flags import CAPTION_FLAGS, flag_name
from captioner.store.directory import Directory
from captioner.store.journal import Journal, Review
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder
from captioner.testing.faults import Killed, killed_at_write
from ray_jobs.cli import main

NOW = datetime.now(UTC)

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Caption 20 scenes into OUT, with a fake model of that prompt."""
    archive = make_folder(tmp_path / "archive", 20)

    def run(prompt: str = "a", **output) -> int:
        return pipeline.run(caption_config(archive, tmp_path / "out", model={"prompt": prompt}, **output))

    return run


def by_model(out: Path, prompt: str) -> list[str]:
    return [row["image_id"] for row in rows_of(out) if (row["caption"] or "").startswith(f"{prompt} ")]


def review(out: Path, decision: str, *image_ids: str, text: str | None = None, at: datetime | None = None) -> None:
    with Journal(Directory(str(out)), "Ada") as journal:
        journal.append(Review(decision, image_ids, text, "Ada", reviewed_at=at or datetime.now(UTC)))


def test_images_that_the_new_model_cannot_caption_keep_their_captions(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, archive = tmp_path / "out", tmp_path / "archive"
    run("a")
    before = {row["image_id"]: row["caption"] for row in rows_of(out)}
    first_bytes = (archive / "000001.png").read_bytes()
    (archive / "000001.png").unlink()
    (archive / "000002.png").write_bytes(b"no image any more")
    with monkeypatch.context() as patched:
        patched.setattr(FakeCaptioner, "caption", failing_for(before["000003.png"]))
        assert run("b", only="logprob<100%") == 0

    after = {row["image_id"]: row for row in rows_of(out)}
    assert "2 images that fake could not caption keep their caption" in capsys.readouterr().err
    assert {name for name, row in after.items() if row["caption"] == before[name]} == {"000001.png", "000003.png"}
    assert {row["fingerprint"] == after["000000.png"]["fingerprint"] for row in after.values()} == {True, False}
    assert {name for name, row in after.items() if row["status"] == "failed"} == {"000002.png"}
    assert verify(open_table(str(out))).proven

    (archive / "000001.png").write_bytes(first_bytes)
    assert run("b", only="logprob<100%") == 0  # the same command tries them again
    assert len(by_model(out, "b")) == 19
    assert "keep" not in capsys.readouterr().err
    assert verify(open_table(str(out))).proven


def failing_for(text: str) -> Callable[..., Captions]:
    """Return a `FakeCaptioner.caption` that fails for the image of which a fake model said this."""
    caption, name = FakeCaptioner.caption, text.partition(" ")[2]

    def fail(captioner: FakeCaptioner, pixels: Pixels) -> Captions:
        captions = caption(captioner, pixels)
        if any(answer.endswith(name) for answer in captions.texts):
            raise RuntimeError("no memory for this image")
        return captions

    return fail


def test_a_text_that_was_approved_of_another_file_does_not_keep_a_caption(tmp_path: Path, run: Run) -> None:
    run("a")
    digests = {row["image_id"]: row["sha256"] for row in rows_of(tmp_path / "out")}
    with Journal(Directory(str(tmp_path / "out")), "Ada") as journal:
        for image_id, digest in (("000000.png", digests["000000.png"]), ("000001.png", "0" * 64)):
            journal.append(Review("approved", (image_id,), "Mine.", "Ada", sha256=(digest,)))

    assert run("b", only="logprob<100%") == 0

    assert set(digests) - set(by_model(tmp_path / "out", "b")) == {"000000.png"}


def test_the_least_certain_are_captioned_again_and_the_others_stay(tmp_path: Path, run: Run) -> None:
    run("a")
    before = rows_of(tmp_path / "out")

    assert run("b", only="logprob<20%") == 0

    least = sorted(before, key=lambda row: row["logprob_mean"])[:4]
    assert sorted(by_model(tmp_path / "out", "b")) == sorted(row["image_id"] for row in least)
    after = rows_of(tmp_path / "out")
    assert [row for row in after if row["generation"] == 0] == [
        row for row in before if row["image_id"] not in by_model(tmp_path / "out", "b")
    ]
    assert len({row["fingerprint"] for row in after}) == 2
    assert verify(open_table(str(tmp_path / "out"))).proven


def test_the_table_and_the_record_say_which_models_are_in_it(tmp_path: Path, run: Run, capsys) -> None:
    run("a")
    run("b", only="logprob<20%")

    info = json.loads((tmp_path / "out/table.json").read_text())
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert [facts["prompt"] for facts in info["models"].values()] == ["a", "b"]
    assert info["model"]["prompt"] == "b"
    assert record["counts"]["by_fingerprint"] == dict(zip(info["models"], (16, 4), strict=True))
    with pytest.raises(SystemExit):
        main(["status", str(tmp_path / "out")])
    assert "4 rows by model fake" in capsys.readouterr().out


def test_the_same_command_twice_does_nothing_the_second_time(tmp_path: Path, run: Run, capsys) -> None:
    run("a")
    run("b", only="logprob<20%")
    before = rows_of(tmp_path / "out")
    capsys.readouterr()

    run("b", only="logprob below 20%")

    assert "nothing to recaption" in capsys.readouterr().err
    assert rows_of(tmp_path / "out") == before


def test_the_old_model_is_told_what_to_do_and_the_new_one_goes_on(tmp_path: Path, run: Run, capsys) -> None:
    run("a")
    with pytest.raises(FingerprintError, match=r"--prompt a instead of b; .*--only.*--overwrite"):
        run("b")
    run("b", only="logprob<20%")

    with pytest.raises(FingerprintError, match=r"was recaptioned with fake .* to go on"):
        run("a")
    capsys.readouterr()
    run("b")
    assert "nothing to do" in capsys.readouterr().err
    run("a", only="logprob<50%")  # and back
    assert open_table(str(tmp_path / "out")).info["model"]["prompt"] == "a"


def test_a_recaptioning_that_was_cut_off_is_finished_before_another(tmp_path: Path, run: Run) -> None:
    run("a")
    with pytest.raises(Killed), killed_at_write(9):
        run("b", only="logprob<40%")
    assert open_table(str(tmp_path / "out")).open_plans()

    with pytest.raises(FingerprintError, match="recaptioned with fake"):
        run("a")
    with pytest.raises(FingerprintError, match="is not finished with fake; run its own command"):
        run("c", only="failed")
    run("b")  # the plain command finishes it, too

    assert verify(open_table(str(tmp_path / "out"))).proven
    assert len(by_model(tmp_path / "out", "b")) == 8


def test_an_unfinished_table_is_finished_first(tmp_path: Path, run: Run) -> None:
    with pytest.raises(Killed), killed_at_write(9):  # table, two plan parts, plan, model, two records, a chunk
        run("a")

    with pytest.raises(FingerprintError, match="is not finished"):
        run("b", only="failed")


def test_what_people_decided(tmp_path: Path, run: Run, capsys) -> None:
    run("a")
    out = tmp_path / "out"
    review(out, "rejected", "000001.png")
    review(out, "rejected", "000002.png", at=NOW - timedelta(days=1))  # of an earlier caption
    review(out, "expert", "000003.png")
    review(out, "edited", "000004.png", "000005.png", text="A person wrote this.")

    run("b", only="rejected, expert")
    assert by_model(out, "b") == ["000001.png", "000003.png"]

    run("c", only="logprob<100%")
    assert [row["image_id"] for row in rows_of(out) if not row["caption"].startswith("c")] == [
        "000004.png",
        "000005.png",
    ]
    assert "2 more match --only, but have been reviewed" in capsys.readouterr().err


def test_flags_and_failures(tmp_path: Path, run: Run) -> None:
    (tmp_path / "archive/000007.png").write_bytes(b"")
    run("an image of")  # every caption is flagged
    run("b", only="flag:image_of")
    assert len(by_model(tmp_path / "out", "b")) == 19

    make_folder(tmp_path / "archive", 20)
    run("c", only="failed or flag:truncated")
    assert by_model(tmp_path / "out", "c") == ["000007.png"]


def test_history_that_is_gone_is_found(tmp_path: Path, run: Run) -> None:
    run("a")
    run("b", only="logprob<20%")
    next((tmp_path / "out/history/g001").iterdir()).unlink()

    assert not verify(open_table(str(tmp_path / "out"))).proven


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("flagz", "did you mean 'flags'"),
        ("rejectd or flags", "did you mean 'rejected'"),
        ("flag:emty", "did you mean 'flag:empty'"),
        ("low_confidence", "flag of the whole run"),
        ("logprob<0%", "above 0%"),
        ("logprob<5% or logprob<-1", "give one"),
        ("", "terms are flags, logprob<10%, judge<10%"),
    ],
)
def test_a_selector_that_makes_no_sense(tmp_path: Path, run: Run, only: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--only {only}: .*{message}"):
        run("a", only=only)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", ["overwrite", "retry_failed", "extend", "plan_only"])
def test_only_goes_alone(run: Run, other: str) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        run("a", only="flags", **{other: True})


def test_only_needs_a_table(run: Run) -> None:
    with pytest.raises(OutputError, match=r"--only: .* holds no captions table yet"):
        run("a", only="flags")
    with pytest.raises(Killed), killed_at_write(2):
        run("a")
    with pytest.raises(OutputError, match=r"--only: .* holds no captions yet"):
        run("a", only="flags")


@given(
    st.builds(
        Selector,
        flags=st.frozensets(st.sampled_from(sorted(CAPTION_FLAGS))),
        decisions=st.frozensets(st.sampled_from(["rejected", "expert"])),
        failed=st.just(True),
        percent=st.none() | st.integers(1, 100).map(float),
    )
)
def test_a_selector_written_out_means_the_same(selector: Selector) -> None:
    assert parse_selector(selector.text) == selector
    assert parse_selector(selector.text.replace(" or ", ",").replace("<", " below ").upper()) == selector


@pytest.mark.parametrize("flag", CAPTION_FLAGS)
def test_a_flag_is_selected_by_the_name_that_people_see(flag: str) -> None:
    name = flag_name(flag)

    for written in (flag, name, name.replace(" ", "_"), name.upper()):
        assert parse_selector(f"failed or flag:{written}") == Selector(flags=frozenset({flag}), failed=True)


def test_the_report_shows_what_changed(tmp_path: Path, run: Run) -> None:
    run("a")
    run("b", only="logprob<20%")

    changes = json.loads((tmp_path / "out/checks/check.json").read_text())["changes"]
    assert (changes["num_rows"], changes["changed"], changes["scored"]) == (4, 4, 4)
    assert [model["rows"] for model in changes["before"]] == [4]
    assert changes["differences"]["WER"]["this"] > 0
    page = (tmp_path / "out/report/index.html").read_text()
    assert "Changes by recaptioning" in page
    row = changes["shown"][0]
    assert row["other"].startswith("a ")
    assert f"<del>a</del> <ins>b</ins> {row['caption'].split()[1]}" in page
