"""The review page's server: what is shown, what a decision does, who is let in, and what a kill leaves."""

import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import pytest
from helpers import caption_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import pipeline
from captioner.config import AltTextConfig
from captioner.errors import OutputError, UsageError
from captioner.imaging.descriptions import descriptions_of
from captioner.publishing.alt_text.command import make_alt_texts
from captioner.publishing.review import grid, queue
from captioner.publishing.review.acceptance import acceptance, seconds_per_image
from captioner.publishing.review.grid import GridRequest
from captioner.publishing.review.next_steps import describe_counts
from captioner.publishing.review.previews import Previews
from captioner.publishing.review.server import ReviewServer
from captioner.publishing.review.session import DecisionRequest, ReviewSession
from captioner.run.selector import rows_matching
from captioner.scoring.verdicts import wilson
from captioner.store.directory import Directory
from captioner.store.journal import Journal, Review, read_reviews
from captioner.store.replan import RowIndices
from captioner.store.table import CaptionsTable, open_table
from captioner.testing import ABORT_MARKER, decoder_faults, make_folder
from ray_jobs.cli import main

JSON = {"Content-Type": "application/json"}
HOSTILE = 'x <script>alert(1)</script> & "quotes" \u202e'
XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:i="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/">
<dc:description><rdf:Alt><rdf:li xml:lang="de">Ein Hund</rdf:li><rdf:li xml:lang="x-default">A dog, says XMP</rdf:li>
</rdf:Alt></dc:description>
<i:AltTextAccessibility><rdf:Alt><rdf:li>Alt, says XMP</rdf:li></rdf:Alt></i:AltTextAccessibility>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


@contextmanager
def open_session(out: Path, reviewer: str = "ana", queue: Any = "all") -> Iterator[ReviewSession]:
    with ReviewSession(open_table(str(out)), reviewer, queue) as opened:
        yield opened


def decide(
    session: ReviewSession, decision: str, text: str | None = None, alone: bool = False
) -> tuple[bool, dict[str, Any]]:
    """Decide about the image on the page, as the page does."""
    card = session.next()["card"]
    others = [] if alone else [image["index"] for image in card["group"]]
    return session.decide(DecisionRequest(decision, (card["index"], *others), card["alt_text"], text, seconds=4.0))


def shown_in_order(session: ReviewSession) -> list[str]:
    ids = []
    while card := session.next()["card"]:
        ids.append(card["image_id"])
        decide(session, "approved", alone=True)
    return ids


def decisions(out: Path) -> list[tuple[str, tuple[str, ...], str | None]]:
    return [(review.decision, review.image_ids, review.text) for review in read_reviews(Directory(str(out)))[0]]


def test_flagged_images_come_first_then_the_least_certain(make_reviewable) -> None:
    out = make_reviewable(
        logprobs=[-0.1, -3.0, float("nan"), -0.2, -2.0],
        flags=[[], [], [], ["truncated"], ["truncated", "no_logprob"]],
    )
    with open_session(out, queue="flagged") as session:
        assert session.next()["progress"]["flagged_left"] == 2
        assert (
            session.next()["card"]["flags"]
            == ["cut off at the token limit", "the model gave no finite log-probability"][::-1]
        )
        assert shown_in_order(session)[:4] == ["000004.png", "000003.png", "000002.png", "000001.png"]


def test_flags_that_a_rule_has_fixed_are_not_shown(make_reviewable) -> None:
    out = make_reviewable(["a picture of a dog", "x" * 130], flags=[["image_of"], ["over_125"]])
    with open_session(out, queue="flagged") as session:
        first = session.next()["card"]
        assert (first["image_id"], first["flags"]) == (
            "000001.png",
            ["longer than 125 characters, the recommended limit for alt text"],
        )
        assert session.next()["progress"]["flagged_left"] == 1


def test_the_random_queue_is_the_same_for_everybody_and_no_other_order(make_reviewable, tmp_path: Path) -> None:
    out = make_reviewable(["the same"] * 30)
    shutil.copytree(out, tmp_path / "copy")
    with open_session(out, queue="random") as session, open_session(tmp_path / "copy", "ben", queue="random") as other:
        assert session.next()["card"]["group"] == []  # a sample is drawn one by one
        order = shown_in_order(session)
        assert order == shown_in_order(other)
    assert sorted(order) == [f"{number:06d}.png" for number in range(30)] != order


def test_every_image_is_shown_once_and_a_restart_goes_on(make_reviewable) -> None:
    out = make_reviewable()
    with open_session(out, queue="flagged") as session:
        for decision in ("approved", "rejected", "decorative", "expert"):
            assert decide(session, decision)[0]
        decide(session, "edited", "A dog of my own.")
        third = session.next()["card"]["image_id"]
    with open_session(out, queue="flagged") as session:
        assert session.next()["card"]["image_id"] == third
        assert session.next()["progress"]["left"] == 25
        rest = shown_in_order(session)
        assert session.next()["card"] is None
    done = [ids[0] for _, ids, _ in decisions(out)]
    assert sorted(done) == [f"{number:06d}.png" for number in range(30)]
    assert len(rest) == 25
    assert [(decision, text) for decision, _, text in decisions(out)][1:5] == [
        ("rejected", None),
        ("decorative", ""),
        ("expert", None),
        ("edited", "A dog of my own."),
    ]


def test_images_with_one_text_are_one_decision_at_most_twelve_at_a_time(make_reviewable) -> None:
    out = make_reviewable(["a dog"] * 20)
    with open_session(out) as session:
        card = session.next()["card"]
        assert (len(card["group"]), card["num_same"]) == (11, 19)
        _, state = decide(session, "approved")
        assert state["message"] == "Approved for 12 images"
        assert (len(state["card"]["group"]), state["card"]["num_same"]) == (7, 7)
        _, state = decide(session, "rejected", alone=True)
        assert (state["card"]["image_id"], len(state["card"]["group"])) == ("000013.png", 6)
    assert [(decision, len(ids)) for decision, ids, _ in decisions(out)] == [("approved", 12), ("rejected", 1)]


def test_an_undo_shows_the_image_again_also_after_a_restart(make_reviewable) -> None:
    out = make_reviewable(["a dog", "a dog", "a cat"])
    with open_session(out) as session:
        assert session.undo()["message"] == "There is nothing to undo"
        decide(session, "approved")
        decide(session, "rejected")
    with open_session(out) as session, open_session(out, "ben") as other:
        assert other.undo()["message"] == "There is nothing to undo"
        state = session.undo()
        assert (state["message"], state["card"]["image_id"]) == ("Undone: Rejected", "000002.png")
        state = session.undo()
        assert (state["message"], state["card"]["image_id"]) == ("Undone: Approved for 2 images", "000000.png")
        assert [image["image_id"] for image in state["card"]["group"]] == ["000001.png"]
        assert state["progress"]["left"] == 30
        assert not state["progress"]["can_undo"]
    assert decisions(out) == []


def test_drafts_come_back_after_a_restart_and_end_with_the_edit(make_reviewable) -> None:
    out = make_reviewable(["a dog", "a cat", "a cow"])
    with open_session(out) as session:
        session.keep_draft(2, "  A brown\n cow \ud83d")
        session.keep_draft(1, "A cat!")
        session.keep_draft(1, " \n")  # nothing to keep
    with open_session(out, "ben") as other:
        assert other.next()["card"]["draft"] is None
    with open_session(out) as session:
        card = session.next()["card"]
        assert (card["image_id"], card["draft"]) == ("000002.png", "  A brown\n cow ?")
        decide(session, "edited", "A brown cow.")
        assert session.next()["card"]["image_id"] == "000000.png"
    with open_session(out) as session:
        assert session.undo()["card"]["draft"] == "A brown cow."  # an undo does not lose what was written
        decide(session, "edited", "A cow.")
    assert not list((out / "reviews/drafts").rglob("*.json"))


def test_a_draft_stays_while_other_decisions_are_made(make_reviewable) -> None:
    with open_session(make_reviewable(["a dog"])) as session:
        session.keep_draft(0, "A black dog, perhaps")
        assert decide(session, "rejected")[0]
        assert session.next()["card"]["image_id"] == "000001.png"
        assert session.undo()["card"]["draft"] == "A black dog, perhaps"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"image_id": 3, "text": "a"}', b'{"image_id": "000000.png"}'])
def test_a_damaged_draft_is_passed_over(make_reviewable, content: bytes) -> None:
    out = make_reviewable()
    with open_session(out) as session:
        session.keep_draft(0, "A")
    (draft,) = (out / "reviews/drafts").rglob("*.json")
    draft.write_bytes(content)
    with open_session(out) as session:
        assert session.next()["card"]["draft"] is None


def test_skipped_images_come_back_when_asked_for(make_reviewable) -> None:
    out = make_reviewable()
    with open_session(out) as session:
        decide(session, "skipped")
        decide(session, "skipped")
        assert session.undo()["card"]["image_id"] == "000001.png"
        shown_in_order(session)
        assert session.next()["progress"]["skipped"] == 1
    with open_session(out) as session:
        assert session.next()["card"] is None
        assert session.show_skipped()["card"]["image_id"] == "000000.png"
        decide(session, "approved")
        assert session.next()["progress"]["left"] == 0


def test_what_needs_an_expert_is_shown_to_others_last(make_reviewable) -> None:
    out = make_reviewable()
    with open_session(out) as session:
        decide(session, "expert")
        assert "000000.png" not in shown_in_order(session)
        assert session.next()["card"] is None
    with open_session(out, "ben") as other:
        card = other.next()["card"]
        assert (card["image_id"], card["note"]) == ("000000.png", "ana asks for an expert")
        assert decide(other, "edited", "A rare dog.")[0]
        assert other.next()["card"] is None
    assert decisions(out)[-1] == ("edited", ("000000.png",), "A rare dog.")


def test_two_reviewers_get_different_images_and_a_late_decision_is_refused(make_reviewable) -> None:
    out = make_reviewable(["a dog", "a dog", "a cat"])
    with open_session(out) as ana, open_session(out, "ben") as ben:
        on_anas = ana.next()["card"]
        assert ben.next()["card"]["image_id"] == "000002.png"
        late = DecisionRequest(
            "rejected", (on_anas["index"], *(image["index"] for image in on_anas["group"])), "A dog."
        )
        half = DecisionRequest("rejected", (1, 0), "A dog.")
        ben.decide(DecisionRequest("approved", (0,), "A dog."))

        kept, state = ana.decide(late)
        assert not kept
        assert state["message"] == "ben has already decided about this image (approved); nothing was changed"
        kept, state = ana.decide(half)
        assert kept
        assert state["message"] == "Rejected; 1 already decided by somebody else"
        assert ben.next()["progress"]["left"] == 28
    assert decisions(out) == [("approved", ("000000.png",), "A dog."), ("rejected", ("000001.png",), None)]


def test_a_text_that_changed_meanwhile_is_shown_again(make_reviewable) -> None:
    with open_session(make_reviewable(["a dog"])) as session:
        kept, state = session.decide(DecisionRequest("approved", (0,), "Another text."))
        assert not kept
        assert "has changed" in state["message"]
        assert state["card"]["alt_text"] == "A dog."


def test_edits_are_one_line_and_keep_to_the_hard_limit(make_reviewable) -> None:
    out = make_reviewable(["a dog", "a cat"], alt_text=AltTextConfig(max_chars=20, hard_max=30))
    with serving(out) as (ask, _):

        def edit(text: str) -> tuple[int, Any]:
            index = ask("GET", "state")[1]["card"]["index"]
            shown = ["A dog.", "A cat."][index]
            return ask("POST", "decide", {"decision": "edited", "indices": [index], "shown": shown, "text": text})

        status, answer = edit("x" * 31)
        assert (status, answer["error"]) == (
            400,
            "The text has 31 characters; the limit is 30 (captioner alt-text --hard-max)",
        )
        status, answer = edit(" \n\t ")
        assert status == 400
        assert "choose Decorative" in answer["error"]
        assert edit(" A black\r\n dog\u202e. ")[0] == 200
        assert edit("A cat. ")[0] == 200
    assert [(decision, text) for decision, _, text in decisions(out)] == [
        ("edited", "A black dog."),
        ("approved", "A cat."),
    ]


def test_an_empty_text_cannot_be_accepted(make_reviewable) -> None:
    with open_session(make_reviewable([""])) as session, pytest.raises(UsageError, match="no text to approve"):
        decide(session, "approved")


def test_the_acceptance_rate_is_of_a_random_sample_whatever_was_decided_before(make_reviewable) -> None:
    out = make_reviewable(["a dog"] * 30)
    with open_session(out, queue="random") as session:
        order = [session.next()["card"]["image_id"]]
        assert session.next()["progress"]["acceptance"] is None
    with open_session(out, "ben", queue="all") as session:
        assert session.next()["progress"]["acceptance"] is None
        decide(session, "rejected")  # twelve of them, whose turn in the random order may come
        rejected = {image_id for _, ids, _ in decisions(out) for image_id in ids}
        assert session.next()["progress"]["acceptance"] is None
    with open_session(out, queue="random") as session:
        order = shown_in_order(session)
        figures = session.next()["progress"]["acceptance"]
    assert len(order) == 18
    assert not rejected & set(order)
    assert (figures["accepted"], figures["decided"]) in [(18, decided) for decided in range(18, 31)]
    assert figures["decided"] > 18  # rejected ones that came before the last accepted one in the random order
    assert figures["low"] < 18 / figures["decided"] < figures["high"]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(successes: int, trials: int, low: float, high: float) -> None:
    """The values of R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_hours_left_are_measured() -> None:
    own = [
        Review("approved", ("a", "b"), "", "ana", seconds=6.0),
        Review("approved", ("c",), "", "ana", seconds=3.0),
        Review("approved", ("d",), "", "ana"),
        Review("approved", ("e",), "", "ana", seconds=80_000.0),  # was away
    ]
    assert seconds_per_image(own[:3]) == 3.0
    assert seconds_per_image(own) == (6 + 3 + 300) / 4
    assert seconds_per_image(own[2:3]) is None
    assert acceptance([]) is None


def ids(session: ReviewSession, **request: Any) -> list[str]:
    return [image["image_id"] for image in session.grid(GridRequest(**request))["images"]]


def decide_about(session: ReviewSession, index: int, decision: str, text: str | None = None) -> tuple[bool, Any]:
    """Open an image from the grid and decide about it, as the page does."""
    card = session.open(index)["card"]
    return session.decide(DecisionRequest(decision, (index,), card["alt_text"], text, replaces=card["decided"]))


def test_the_grid_filters_by_decision_flag_and_draft(make_reviewable) -> None:
    out = make_reviewable(flags=[["truncated"], [], ["truncated"]])
    with open_session(out) as session:
        for index, decision in enumerate(("approved", "rejected", "decorative", "expert", "skipped")):
            decide_about(session, index, decision)
        decide_about(session, 5, "edited", "A dog of my own.")
        session.keep_draft(7, "A")
        names = [f"{number:06d}.png" for number in range(30)]
        for number, show in enumerate(("approved", "rejected", "decorative", "expert", "skipped", "edited")):
            assert ids(session, show=show) == [names[number]]
        assert ids(session, show="drafts") == [names[7]]
        assert ids(session, show="flagged") == [names[0], names[2]]
        assert ids(session, show="undecided") == [names[4], *names[6:]]
        assert ids(session) == names
        page = session.grid(GridRequest())
        assert page["counts"] == {
            "all": 30,
            "undecided": 25,
            "flagged": 2,
            "skipped": 1,
            "drafts": 1,
            "failed": 0,
        } | dict.fromkeys(("approved", "edited", "rejected", "decorative", "expert"), 1)
        assert [(image["state"], image["flagged"]) for image in page["images"][:2]] == [
            ("approved", True),
            ("rejected", False),
        ]
        assert page["images"][5]["text"] == "A dog of my own."
        assert page["images"][7]["has_draft"]


def test_images_without_a_caption_have_a_tile_with_the_reason(
    tmp_path: Path,
) -> None:
    images = make_folder(tmp_path / "images", 5)
    (images / "000001.png").write_bytes(b"no image")
    (images / "000002.png").write_bytes((images / "000002.png").read_bytes()[:-80])
    config = caption_config(images, tmp_path / "out", max_failed=1.0)
    pipeline.run(config)
    make_alt_texts(open_table(str(tmp_path / "out")), AltTextConfig())
    shutil.copy(images / "000003.png", images / "000002.png")  # which is mended after the run

    with serving(tmp_path / "out") as (ask, _):
        everything, failed = ask("GET", "grid")[1], ask("GET", "grid?show=failed")[1]
        assert (everything["num_images"], everything["counts"]["failed"], failed["num_images"]) == (3, 2, 2)
        assert [(image["image_id"], image["reason"]) for image in failed["images"]] == [
            ("000001.png", "not an image"),
            ("000002.png", "truncated"),
        ]
        assert all(image["text"] and image["has_image"] for image in failed["images"])
        assert [ask("GET", f"failed/{number}")[0] for number in (0, 1, 2)] == [404, 200, 404]
        assert ask("GET", "failed/x")[0] == 404
        results = [ask("GET", f"grid?show=failed&query={word}")[1]["images"] for word in ("truncated", "1.png", "dog")]
        assert [[image["index"] for image in images] for images in results] == [[1], [0], []]


def test_rows_that_only_names_are_a_review_of_their_own(make_reviewable) -> None:
    out = make_reviewable(["a dog"] * 6, flags=[[], ["truncated"], [], ["truncated"]])
    with open_session(out) as session:
        decide_about(session, 0, "rejected")
        decide_about(session, 1, "approved")
    table = open_table(str(out))

    def choose(table: CaptionsTable, reviews: dict[str, Review]) -> RowIndices:
        return rows_matching(table, "rejected or flag:truncated", reviews)

    with ReviewSession(table, "ana", "all", choose) as session:
        assert ids(session) == ["000000.png", "000001.png", "000003.png"]
        assert ids(session, query="3.png") == ["000003.png"]
        assert ids(session, show="rejected") == ["000000.png"]
        state = session.next()
        assert (state["card"]["image_id"], state["progress"]["total"], state["progress"]["left"]) == (
            "000003.png",
            3,
            1,
        )
        assert session.undo()["message"] == "Undone: Approved"
        assert decide(session, "approved")[1]["message"] == "Approved for 2 images"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--only", "expert"), "--only: no image with an alt text in"),
        (("--only", "flags", "--queue", "random"), "--queue random measures the whole table; leave out --only"),
        (("--only", "flagged"), "did you mean 'flags'?"),
    ],
)
def test_an_only_that_leaves_nothing_to_review_is_refused(
    make_reviewable, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["review", str(make_reviewable()), *flags])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_the_grid_is_searched_in_names_texts_and_what_people_wrote(make_reviewable) -> None:
    with open_session(make_reviewable(["a red dog", "a Dog", "ein Ärgernis", "100% (of) a.b"])) as session:
        decide_about(session, 9, "edited", "A red boat.")
        assert ids(session, query="DOG") == ["000000.png", "000001.png"]
        assert ids(session, query=" red ") == ["000000.png", "000009.png"]
        assert ids(session, query="red boat 9.PNG") == ["000009.png"]
        assert ids(session, query="ärger") == ["000002.png"]
        assert ids(session, query="100% (of)") == ["000003.png"]  # no pattern
        assert ids(session, query="a.b") == ["000003.png"]
        assert ids(session, query="nothing of the kind") == []
        assert ids(session, query="dog", show="edited") == []
        session.undo()
        assert ids(session, query="boat") == []


def test_the_grid_is_paged(make_reviewable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PAGE_SIZE", 7)
    with open_session(make_reviewable()) as session:
        pages = [session.grid(GridRequest(page=page)) for page in range(5)]
        assert [image["index"] for page in pages for image in page["images"]] == list(range(30))
        assert [(page["page"], page["num_pages"], page["first"]) for page in pages] == [
            (page, 5, 7 * page) for page in range(5)
        ]
        beyond = session.grid(GridRequest(page=10**8))
        assert (beyond["page"], beyond["images"]) == (4, pages[4]["images"])


def test_folders_are_listed_as_deep_as_a_person_can_read(reviewable_catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(reviewable_catalogue) as session:
        assert folders_of(session) == {"a": (1, 0), "a/b": (2, 0), "ab": (1, 0)}
        assert ids(session, folder="a") == ["a/1.png", "a/b/2.png", "a/b/3.png"]
        assert ids(session, folder="a/b", query="/3") == ["a/b/3.png"]
    for maximum, expected in ((2, {"a": (3, 0), "ab": (1, 0)}), (1, {})):
        monkeypatch.setattr(grid, "MAX_FOLDERS", maximum)
        with open_session(reviewable_catalogue) as session:
            assert folders_of(session) == expected


def test_folders_with_failed_images_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_folder(tmp_path / "images", 5)
    names = {"good/1": False, "mixed/1": False, "mixed/2": True, "bad/x/1": True, "bad/y/1": True, "1": True}
    for name, is_broken in names.items():
        (images / name).parent.mkdir(exist_ok=True, parents=True)
        data = (images / "000000.png").read_bytes()
        (images / f"{name}.png").write_bytes(data[: len(data) // 2] if is_broken else data)
    pipeline.run(caption_config(images, tmp_path / "out", max_failed=1.0))
    make_alt_texts(open_table(str(tmp_path / "out")), AltTextConfig())

    with open_session(tmp_path / "out") as session:
        assert folders_of(session) == {"bad/x": (1, 1), "bad/y": (1, 1), "good": (1, 0), "mixed": (2, 1)}
        assert ids(session, show="failed", folder="bad/x") == ["bad/x/1.png"]
        request = GridRequest(folder="bad")
        assert (session.grid(request)["num_images"], session.grid(request)["num_failed"]) == (0, 2)
    monkeypatch.setattr(grid, "MAX_FOLDERS", 3)
    with open_session(tmp_path / "out") as session:
        assert folders_of(session) == {"bad": (2, 2), "good": (1, 0), "mixed": (2, 1)}


def folders_of(session: ReviewSession) -> dict[str, tuple[int, int]]:
    """Return of each folder in the list the number of its images, and of those without a caption."""
    folders = session.grid(GridRequest())["folders"]
    return {name: (count["images"], count["failed"]) for name, count in folders.items()}


@pytest.fixture
def reviewable_catalogue(tmp_path: Path) -> Path:
    """Images in folders, from a manifest with columns of a catalogue."""
    make_folder(tmp_path / "images", 5)
    names = ["a/1.png", "a/b/2.png", "a/b/3.png", "ab/4.png", "5.png"]
    rows = [
        {
            "file_name": f"images/{number:06d}.png",
            "code": name,
            "title": f"Title {number}\u202e" if number < 4 else None,
            "tags": ["one", "two"] if number else [],
            "year": 1900 + number,
        }
        for number, name in enumerate(names)
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"id_column": "code", "keep_columns": ["title", "tags", "year"]}
    assert pipeline.run(caption_config(manifest, tmp_path / "out", source=source)) == 0
    make_alt_texts(open_table(str(tmp_path / "out")), AltTextConfig())
    return tmp_path / "out"


def test_columns_of_the_catalogue_are_beside_the_image(reviewable_catalogue: Path) -> None:
    with open_session(reviewable_catalogue) as session:
        shown = [
            {column["name"]: column["text"] for column in session.open(index)["card"]["catalogue"]}
            for index in (0, 1, 4)
        ]
    assert shown == [
        {"title": "Title 0", "year": "1900"},
        {"title": "Title 1", "tags": "one, two", "year": "1901"},
        {"tags": "one, two", "year": "1904"},
    ]


def test_a_decision_can_be_replaced_from_the_grid(make_reviewable) -> None:
    out = make_reviewable(["a dog", "a dog"])
    with open_session(out) as session, open_session(out, "ben") as ben:
        decide(session, "rejected", alone=True)
        card = session.open(0)["card"]
        assert card["note"] == "Rejected by you. A new decision replaces this one."
        assert card["group"] == []
        earlier = DecisionRequest("edited", (0,), "A dog.", "A black dog.", replaces=card["decided"])
        assert session.decide(earlier)[0]
        card = session.open(0)["card"]
        assert (card["text"], card["alt_text"]) == ("A black dog.", "A dog.")
        assert not session.decide(earlier)[0]  # the decision that it replaces is no longer the last one
        assert decide_about(ben, 0, "decorative")[0]
        assert decisions(out)[-1][0] == "decorative"
        assert ben.undo()["message"] == "Undone: Marked as decorative"
        assert session.open(0)["card"]["text"] == "A black dog."


def test_what_is_opened_from_the_grid_is_no_part_of_the_random_sample(make_reviewable) -> None:
    out = make_reviewable()
    with open_session(out, queue="random") as session:
        first = session.next()["card"]["index"]
        for index in range(30):
            if index != first:
                decide_about(session, index, "rejected")
        assert session.next()["progress"]["acceptance"] is None
        decide(session, "approved")
        assert session.next()["progress"]["acceptance"]["decided"] == 1


def test_the_summary_counts_and_its_commands_run_as_they_are(make_reviewable, tmp_path: Path) -> None:
    out = make_reviewable().rename(tmp_path / "it's a table")
    with open_session(out) as session:
        assert [line["purpose"] for line in session.summary()["commands"]] == ["Go on reviewing"]
        decide_about(session, 0, "approved")
        decide_about(session, 1, "edited", "A dog of my own.")
        for index in range(2, 30):
            decide_about(session, index, "decorative" if index % 2 else "rejected")
        summary = session.summary()
    assert describe_counts(summary["counts"]) == "1 approved, 1 edited, 14 decorative, 14 rejected (of 30)"
    commands = [shlex.split(line["command"]) for line in summary["commands"]]
    assert [words[:2] for words in commands] == [["captioner", "export"]] * 3 + [["captioner", "feedback"]]
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text('<img src="000000.png"><img src="000001.png">')
    for _, *words in commands:
        words = [str(tmp_path / "site") if word == "SITE" else word for word in words]
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    assert len((tmp_path / "it's a table-texts.csv").read_text().splitlines()) == 17
    assert 'alt="A dog of my own."' in (tmp_path / "it's a table-pages/index.html").read_text()
    with open_session(out) as session:
        again = [shlex.split(line["command"]) for line in session.summary()["commands"]]
    assert [words[3] for words in again] == [
        str(tmp_path / f"it's a table-{name}") for name in ("texts-2.csv", "pages-2", "xmp-2", "pairs-2")
    ]


@pytest.mark.parametrize(("query", "message"), [("show=liked", "show: give one of all"), ("page=-1", "page: give a")])
def test_a_grid_that_no_page_asks_for_is_refused(make_reviewable, query: str, message: str) -> None:
    with serving(make_reviewable()) as (ask, _):
        status, answer = ask("GET", f"grid?{query}")
        assert status == 400
        assert message in answer["error"]
        assert ask("GET", "state/30")[0] == 404
        assert ask("GET", "grid?folder=%22&query=%5B(&page=1&x=y")[1]["images"] == []
        assert ask("GET", "state/3")[1]["card"]["index"] == 3
        assert ask("GET", "summary")[1]["counts"]["all"] == 30


Ask = Callable[..., tuple[int, Any]]


@contextmanager
def serving(out: Path, reviewer: str = "ana", queue: Any = "all") -> Iterator[tuple[Ask, ReviewServer]]:
    with ExitStack() as stack:
        session = stack.enter_context(open_session(out, reviewer, queue))
        previews = Previews(open_table(str(out)))
        stack.callback(previews.close)
        server = stack.enter_context(ReviewServer(session, previews, port=0))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        yield asker(server.url), server


def asker(url: str) -> Ask:
    parts = urlsplit(url)

    def ask(method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """`path`: after the token, or from the root where it starts with /."""
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body)
        connection.request(method, path if path.startswith("/") else parts.path + path, data, headers or JSON)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if is_json else (answer.headers, content)

    return ask


def test_only_who_knows_the_token_gets_anything(make_reviewable) -> None:
    with serving(make_reviewable()) as (ask, server):
        assert server.server_address[0] == "127.0.0.1"
        assert ask("GET", "state")[0] == 200
        wrong = [
            f"/{server.token[:-1]}/state",
            f"/{server.token}x/state",
            "/state",
            "/",
            "//state",
            f"/x/{server.token}/",
        ]
        for path in wrong:
            assert ask("GET", path)[0] == 403
            assert ask("POST", path, {})[0] == 403


def test_names_that_point_here_are_refused(make_reviewable) -> None:
    with serving(make_reviewable()) as (ask, server):
        port = server.server_address[1]
        for host in ("127.0.0.1", f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9000"):
            assert ask("GET", "state", headers={"Host": host})[0] == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", ""):
            assert ask("GET", "state", headers={"Host": host})[0] == 403


def test_only_a_page_of_ours_can_decide(make_reviewable) -> None:
    out = make_reviewable()
    good = {"decision": "approved", "indices": [0], "shown": ""}
    with serving(out) as (ask, server):
        own = f"http://127.0.0.1:{server.server_address[1]}"
        assert ask("POST", "decide", good, JSON | {"Origin": "http://evil.example"})[0] == 403
        assert ask("POST", "decide", good, JSON | {"Origin": "null"})[0] == 403
        assert ask("POST", "decide", good, {"Content-Type": "text/plain"})[0] == 415
        assert ask("POST", "decide", b"{", JSON)[0] == 400
        assert ask("POST", "decide", b" " * 70_000, JSON)[0] == 413
        assert ask("GET", "decide")[0] == 404
        assert ask("POST", "state", {})[0] == 404
        assert ask("POST", "undo", {}, JSON | {"Origin": own})[0] == 200
    assert decisions(out) == []


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"decision": "liked", "indices": [0], "shown": ""},
        {"decision": "undo", "indices": [0], "shown": ""},
        {"decision": "approved", "indices": [], "shown": ""},
        {"decision": "approved", "indices": [30], "shown": ""},
        {"decision": "approved", "indices": [-1], "shown": ""},
        {"decision": "approved", "indices": [True], "shown": ""},
        {"decision": "approved", "indices": ["0"], "shown": ""},
        {"decision": "approved", "indices": [0], "shown": None},
        {"decision": "edited", "indices": [0], "shown": "", "text": 3},
    ],
)
def test_what_no_page_sends_is_refused(make_reviewable, body: Any) -> None:
    with open_session(make_reviewable()) as session, pytest.raises(UsageError, match=r"decision|indices"):
        DecisionRequest.from_json(body, len(session))


def test_the_page_runs_nothing_but_its_own_script(make_reviewable) -> None:
    with serving(make_reviewable([HOSTILE])) as (ask, _):
        pages = [ask("GET", "") for _ in range(2)]
        nonces = []
        for status, (headers, content) in pages:
            policy, html = headers["Content-Security-Policy"], content.decode()
            nonces += re.findall(r"script-src 'nonce-([\w-]{16,})'", policy)
            assert status == 200
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert set(re.findall(r'<(?:script|style) nonce="([^"]+)"', html)) == {nonces[-1]}
            assert len(re.findall(r"<(?:script|style)\b", html)) == 2
            assert not re.search(r'\son\w+="|\sstyle="|https?://', html)
            assert headers["Referrer-Policy"] == "no-referrer"
            assert headers["Cache-Control"] == "no-store"
        assert len(set(nonces)) == 2
        assert ask("GET", "state")[1]["card"]["alt_text"].startswith("X <script>alert(1)</script>")


def test_images_are_upright_and_small_and_say_what_is_written_in_them(make_reviewable, tmp_path: Path) -> None:
    out = make_reviewable()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "EXIF\x07words"
    file = tmp_path / "archive" / "000000.png"
    Image.new("RGB", (3000, 1000), "red").save(file, "JPEG", xmp=XMP.encode(), exif=exif)
    before = file.read_bytes()
    with serving(out) as (ask, _):
        _, about = ask("GET", "about/0")
        _, (headers, large) = ask("GET", "image/0/large")
        _, (_, small) = ask("GET", "image/0/small")

        assert {description["name"]: description["text"] for description in about["descriptions"]} == {
            "XMP alt text": "Alt, says XMP",
            "XMP description": "A dog, says XMP",
            "EXIF description": "EXIFwords",
        }
        assert headers.get_content_type() == "image/jpeg"
        assert Image.open(io.BytesIO(large)).size == (480, 1440)
        assert Image.open(io.BytesIO(small)).size == (80, 240)
        assert not Image.open(io.BytesIO(large)).getexif()
        for path in (
            "image/0/huge",
            "image/30/large",
            "image/-1/large",
            "image/%C2%B2/large",
            "about/x",
            "about/9/9",
        ):
            assert ask("GET", path)[0] == 404
    assert file.read_bytes() == before
    assert sorted(file.name for file in out.rglob("*.jp*g")) == []


def test_descriptions_are_read_from_iptc_and_png_and_damage_is_none() -> None:
    def iptc(text: bytes) -> bytes:
        record = b"\x1c\x02\x78" + len(text).to_bytes(2, "big") + text
        resource = b"8BIM\x04\x04\x00\x00" + len(record).to_bytes(4, "big") + record + b"\x00" * (len(record) % 2)
        data = b"Photoshop 3.0\x00" + resource
        return b"\xff\xd8\xff\xed" + (len(data) + 2).to_bytes(2, "big") + data + jpeg()[2:]

    def jpeg(**fields: Any) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (8, 8)).save(stream, "JPEG", **fields)
        return stream.getvalue()

    entities = b'<!DOCTYPE a [<!ENTITY b "boom">]>' + XMP.encode().replace(b"A dog", b"&b;")

    assert descriptions_of(iptc("Zoë".encode()), 100) == {"IPTC caption": "Zoë"}
    assert descriptions_of(iptc("Zoë".encode("latin-1")), 100) == {"IPTC caption": "Zoë"}
    assert descriptions_of(jpeg(xmp=entities), 100) == {}
    assert descriptions_of(jpeg(xmp=XMP.encode()[:-40]), 100) == {}
    assert descriptions_of(jpeg(exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"), 100) == {}
    assert descriptions_of(b"no image", 100) == {}


def test_an_image_that_has_gone_can_still_be_decided(make_reviewable, tmp_path: Path) -> None:
    out = make_reviewable()
    (tmp_path / "archive" / "000000.png").unlink()
    with serving(out) as (ask, _):
        assert ask("GET", "about/0")[1]["error"] == "No such file or directory"
        assert ask("GET", "image/0/large")[0] == 404
        shown = ask("GET", "state")[1]["card"]["alt_text"]
        assert ask("POST", "decide", {"decision": "rejected", "indices": [0], "shown": shown})[0] == 200
        assert ask("GET", "about/1")[1]["error"] == ""
    shutil.rmtree(tmp_path / "archive")
    with serving(out) as (ask, _):
        assert "no such file or directory" in ask("GET", "about/1")[1]["error"]
        assert ask("GET", "state")[1]["card"]["image_id"] == "000001.png"


def test_an_image_that_crashes_its_decoder_is_a_message(
    make_reviewable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", decoder_faults()["PYTHONPATH"])
    out = make_reviewable()
    with (tmp_path / "archive" / "000000.png").open("ab") as file:
        file.write(ABORT_MARKER)
    with serving(out) as (ask, _):
        assert ask("GET", "about/0")[1]["error"].startswith("decoder_crashed")
        assert ask("GET", "about/1")[1]["error"] == ""


def test_a_decision_that_cannot_be_written_is_told_and_not_counted(
    make_reviewable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_reviewable()
    with serving(out) as (ask, _):
        shown = ask("GET", "state")[1]["card"]["alt_text"]
        wanted = {"decision": "approved", "indices": [0], "shown": shown}
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            status, answer = ask("POST", "decide", wanted)
        assert status == 500
        assert "the decision was not saved: No space left" in answer["error"]
        assert ask("GET", "state")[1]["card"]["index"] == 0
        assert decisions(out) == []
        assert ask("POST", "decide", wanted)[0] == 200
    assert len(decisions(out)) == 1


def failing(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


@contextmanager
def reviewing(out: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], Ask]]:
    """A real `captioner review` and a client of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.cli", "review", str(out), "--reviewer", "ana", "--queue", "all", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", line)
        assert match, line
        yield process, asker(match.group())
    finally:
        process.kill()
        process.communicate()


def test_every_accepted_decision_survives_sigkill(make_reviewable) -> None:
    out = make_reviewable()
    with reviewing(out) as (process, ask):
        state = ask("GET", "state")[1]
        for _ in range(7):
            card = state["card"]
            status, state = ask(
                "POST", "decide", {"decision": "approved", "indices": [card["index"]], "shown": card["alt_text"]}
            )
            assert status == 200
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [ids for _, ids, _ in decisions(out)] == [(f"{number:06d}.png",) for number in range(7)]

    with reviewing(out) as (process, ask):
        state = ask("GET", "state")[1]
        assert (state["card"]["image_id"], state["progress"]["left"]) == ("000007.png", 23)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
        assert process.returncode == 143
        assert stderr.splitlines()[-1] == (
            "captioner: error: stopped by SIGTERM; every decision is saved; run the same command to continue"
        )


def test_a_draft_survives_sigkill(make_reviewable) -> None:
    out = make_reviewable()
    with reviewing(out) as (process, ask):
        assert ask("POST", "draft", {"index": 3, "text": "A dog, a"}) == (200, {})
        process.send_signal(signal.SIGKILL)
        process.wait()
    with reviewing(out) as (_, ask):
        card = ask("GET", "state")[1]["card"]
        assert (card["image_id"], card["draft"]) == ("000003.png", "A dog, a")


@pytest.mark.parametrize(
    ("body", "status"),
    [([], 400), ({}, 400), ({"index": True, "text": ""}, 400), ({"index": 0, "text": None}, 400)]
    + [({"index": index, "text": ""}, 404) for index in (-1, 30, 10**12)],
)
def test_a_draft_that_no_page_sends_is_refused(make_reviewable, body: Any, status: int) -> None:
    with serving(make_reviewable()) as (ask, _):
        assert ask("POST", "draft", body)[0] == status


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["review", *words])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_reviewed_is_one_line(
    make_reviewable, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_reviewable()
    assert "holds no captions table" in refusal(capsys, str(tmp_path / "nothing"))
    assert "has no alt texts; run `captioner alt-text /" in refusal(capsys, str(finished / "out"))
    assert "--reviewer: give a name" in refusal(capsys, str(out), "--reviewer", " ")
    (out / "plan" / "g000" / "published.json").unlink()
    assert "is not finished; run the same `captioner caption` again" in refusal(capsys, str(out))


def test_a_port_in_use_is_one_line(make_reviewable, capsys: pytest.CaptureFixture[str]) -> None:
    out = make_reviewable()
    with serving(out) as (_, server):
        port = str(server.server_address[1])
        line = refusal(capsys, str(out), "--port", port, "--reviewer", "ben")
    assert f"--port {port}: cannot listen on 127.0.0.1: Address already in use; give another port" in line


def test_a_browser_that_is_killed_is_no_error(make_reviewable, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(make_reviewable()) as (_, server):
        for error, printed in ((ConnectionResetError(), False), (BrokenPipeError(), False), (KeyError(3), True)):
            capsys.readouterr()
            try:
                raise error
            except (OSError, KeyError):
                server.handle_error(None, ("127.0.0.1", 9))
            assert ("Traceback" in capsys.readouterr().err) == printed


def test_a_journal_that_was_cut_off_is_told_and_the_rest_counts(
    make_reviewable, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_reviewable()
    with Journal(Directory(str(out)), "ana") as journal:
        journal.append(Review("approved", ("000000.png",), "x", "ana", reviewed_at=datetime.now(UTC)))
    (file,) = (out / "reviews").glob("*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"decision": "appr\n')
    with reviewing(out) as (process, ask):
        assert ask("GET", "state")[1]["card"]["image_id"] == "000001.png"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 0
    assert "ignored 1 damaged line in its review journals" in stderr
    assert "captioner: ended by Ctrl-C; everything is saved; run the same command to continue\n" in stderr


def test_a_decision_names_the_bytes_of_its_images(make_reviewable) -> None:
    out = make_reviewable(["a dog", "a cat", "a dog"])
    with open_session(out) as session:
        decide(session, "approved")
    (written,) = read_reviews(Directory(str(out)))[0]
    files = [(out.parent / "archive" / image_id).read_bytes() for image_id in written.image_ids]
    assert written.sha256 == tuple(hashlib.sha256(data).hexdigest() for data in files)
    assert len(files) == 2


def test_a_table_made_anew_meanwhile_is_told(make_reviewable) -> None:
    out = make_reviewable()
    with open_session(out) as session:
        shutil.rmtree(out / "alt_text")
        with pytest.raises(OutputError, match="was changed during the review; start `captioner review` again"):
            session.next()


small_floats = st.floats(width=16, allow_infinity=False)


@given(
    rows=st.lists(st.tuples(st.booleans(), small_floats, small_floats, st.integers(0, 5)), max_size=60),
    at_once=st.integers(1, 70),
)
def test_images_are_sorted_piece_by_piece_as_all_at_once(rows: list[tuple], at_once: int) -> None:
    columns = list(zip(*rows, strict=True)) or [()] * 4
    flagged, lifts, logprobs, ids = (np.array(column, kind) for column, kind in zip(columns, "?ffQ", strict=True))
    by_lift, by_logprob = np.where(np.isnan(lifts), np.inf, lifts), np.where(np.isnan(logprobs), -np.inf, logprobs)

    with mock.patch.object(queue, "_SORTED_AT_ONCE", at_once):
        order = queue._sorted_indices(queue._weakness(flagged, lifts, logprobs), ids)

    assert order.tolist() == np.lexsort((ids, by_logprob, by_lift, ~flagged)).tolist()
