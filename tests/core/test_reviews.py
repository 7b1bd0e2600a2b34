"""What people decided survives whatever happens to the process, and is joined to the texts it was about."""

import json
import signal
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.errors import OutputError
from captioner.publishing.alt_text.schemas import TEXTS_SCHEMA
from captioner.publishing.alt_text.texts import read_texts
from captioner.publishing.review.decisions import Decisions
from captioner.publishing.review.queue import Queue
from captioner.store.directory import Directory
from captioner.store.journal import Decision, Journal, Review, latest_reviews, read_latest_reviews, read_reviews
from captioner.store.read import read_parts
from captioner.store.table import open_table

LONG_AGO, LATER = datetime(2001, 1, 1, tzinfo=UTC), datetime(2101, 1, 1, tzinfo=UTC)

APPEND_FOR_EVER = """
import sys
from captioner.store.journal import Journal
from captioner.store.journal import Review
from captioner.store.directory import Directory

with Journal(Directory(sys.argv[1]), "ana") as journal:
    for number in range(1_000_000):
        journal.append(Review("approved", (f"{number}.png",), "A dog." * 50, "ana"))
        print(number, flush=True)
"""
FILL_THE_DISK = """
import resource, signal, sys
from captioner.store.journal import Journal, read_reviews
from captioner.store.journal import Review
from captioner.errors import OutputError
from captioner.store.directory import Directory

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
out = Directory(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
with Journal(out, "ana") as journal:
    journal.append(Review("approved", ("a.png",), "A dog.", "ana"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        journal.append(Review("approved", ("b.png",), "A cat." * 100, "ana"))
    except OutputError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.append(Review("rejected", ("b.png",), None, "ana"))
reviews, damaged = read_reviews(out)
print([review.decision for review in reviews], damaged)
"""


def review(image_id: str = "a.png", decision: Decision = "approved", reviewer: str = "ana", **fields) -> Review:
    return Review(decision, (image_id,), fields.pop("text", None), reviewer, **fields)


def journal_of(out: Path) -> Path:
    (file,) = (out / "reviews").glob("*.jsonl")
    return file


def statuses(out: Path) -> dict[str, str]:
    rows = [row for part in read_texts(open_table(str(out))) for row in part.to_pylist()]
    return {row["image_id"]: row["review_status"] for row in rows if row["review_status"] != "unreviewed"}


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    written = [
        Review(
            "edited",
            ("a.png", "sub/ü\ud800.png"),
            'Ein "Hund"\u2028.',
            "Åsa",
            "Hund.",
            "random",
            2.5,
            sha256=("ab", "cd"),
        ),
        review("b.png", "rejected", "Åsa"),
    ]
    with Journal(out, "Åsa") as journal:
        for entry in written:
            journal.append(entry)

    assert read_reviews(out) == (written, 0)


def test_each_reviewer_has_a_journal_however_alike_their_names(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    names = ["ana", "Ana", "ana!", "Åna", "../ana", "a" * 300, "a" * 301]
    for number, name in enumerate(names):
        with Journal(out, name) as journal:
            journal.append(review(f"{number}.png", reviewer=name))

    assert len(list((tmp_path / "reviews").iterdir())) == len(names)
    assert [entry.reviewer for entry in read_reviews(out)[0]] == names


def test_a_line_that_was_cut_off_is_put_aside_and_costs_no_other(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    with Journal(out, "ana") as journal:
        journal.append(review("a.png"))
        journal.append(review("b.png"))
    file = journal_of(tmp_path)
    for cut in (1, 20, 100):
        file.write_bytes(file.read_bytes()[:-cut])
        with Journal(out, "ana") as journal:
            journal.append(review(f"after-{cut}.png"))

    reviews, damaged = read_reviews(out)

    # Only the newline of b.png's line was cut off first: that decision still counts.
    assert [entry.image_ids[0] for entry in reviews] == ["a.png", "b.png", "after-100.png"]
    assert damaged == 2
    with Decisions(out, "ana") as decisions:
        assert [entry.image_ids[0] for entry in decisions.own] == ["a.png", "b.png", "after-100.png"]
        assert decisions.num_damaged == 2


@given(
    texts=st.lists(st.text(), min_size=1, max_size=4),
    cut=st.integers(min_value=0, max_value=2_000),
)
def test_wherever_a_journal_is_cut_off_its_whole_lines_count(texts: list[str], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Directory(folder)
        written = [review(text, "edited", text=text, shown=text[::-1]) for text in texts]
        with Journal(out, "ana") as journal:
            for entry in written:
                journal.append(entry)
        file = journal_of(Path(folder))
        data = file.read_bytes()[:-cut] if cut else file.read_bytes()
        file.write_bytes(data)
        whole = data.count(b"\n") + (data.endswith(b"}") and data.count(b"\n") < len(texts) and complete(data))
        last = review("last.png")
        with Journal(out, "ana") as journal:
            journal.append(last)

        reviews, damaged = read_reviews(out)

        assert reviews == [*written[:whole], last]
        assert damaged <= 1


def complete(data: bytes) -> bool:
    """Whether the last line lacks only its line break."""
    try:
        return bool(json.loads(data.rpartition(b"\n")[2]))
    except ValueError:
        return False


def test_two_processes_of_one_reviewer_share_a_journal(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    with Journal(out, "ana") as journal, Journal(out, "ana") as other:
        for number in range(6):
            (journal if number % 2 else other).append(review(f"{number}.png"))

    reviews, damaged = read_reviews(out)

    assert [entry.image_ids[0] for entry in reviews] == [f"{number}.png" for number in range(6)]
    assert damaged == 0


def test_lines_of_something_else_are_counted_and_passed_over(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    with Journal(out, "ana") as journal:
        journal.append(review("a.png"))
    good = json.loads(journal_of(tmp_path).read_text())
    others = ["[]", "3", "{}", json.dumps(good | {"decision": "liked"}), json.dumps(good | {"more": 1}), "\x00", "\xff"]
    with journal_of(tmp_path).open("a") as file:
        file.write("\n".join(others) + "\n\n")

    reviews, damaged = read_reviews(out)

    assert [entry.image_ids for entry in reviews] == [("a.png",)]
    assert damaged == len(others)


def test_an_undo_takes_back_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    first, second = review("a.png", "approved"), review("a.png", "rejected")
    with Journal(out, "ana") as journal:
        journal.append(first)
        journal.append(second)
        journal.append(review("a.png", "undo", undoes=second.review_id))

    reviews, _ = read_reviews(out)

    assert reviews == [first]
    assert len(journal_of(tmp_path).read_text().splitlines()) == 3  # nothing is rewritten


def test_the_latest_decision_of_all_reviewers_holds_and_a_skip_decides_nothing(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    now = datetime.now(UTC)
    by_name = {
        "ana": [review("a.png", "approved", "ana", reviewed_at=now)],
        "ben": [
            review("a.png", "rejected", "ben", reviewed_at=now - timedelta(seconds=1)),
            review("a.png", "skipped", "ben", reviewed_at=now + timedelta(seconds=1)),
            review("b.png", "expert", "ben", reviewed_at=now),
        ],
    }
    for name, reviews in by_name.items():
        with Journal(out, name) as journal:
            for entry in reviews:
                journal.append(entry)

    held = latest_reviews(read_reviews(out)[0])

    assert {image_id: (entry.decision, entry.reviewer) for image_id, entry in held.items()} == {
        "a.png": ("approved", "ana"),
        "b.png": ("expert", "ben"),
    }


def test_texts_are_those_of_people_where_they_decided(make_reviewable) -> None:
    out = make_reviewable(["a dog", "a cat", "a hen", "a cow"])
    decided = [
        review("000000.png", "approved", text="A dog.", shown="A dog."),
        review("000001.png", "edited", text="A black cat.", shown="A cat."),
        review("000002.png", "decorative", text=""),
        review("000003.png", "rejected"),
    ]
    with Journal(Directory(str(out)), "ana") as journal:
        for entry in decided:
            journal.append(entry)

    (texts,) = read_texts(open_table(str(out)))

    assert texts.schema == TEXTS_SCHEMA
    rows = texts.select(["alt_text", "caption", "review_status", "reviewer"]).slice(0, 5).to_pylist()
    assert [tuple(row.values()) for row in rows[:4]] == [
        ("A dog.", "a dog", "approved", "ana"),
        ("A black cat.", "a cat", "edited", "ana"),
        ("", "a hen", "decorative", "ana"),
        ("A cow.", "a cow", "rejected", "ana"),
    ]
    assert (rows[4]["review_status"], rows[4]["reviewer"]) == ("unreviewed", None)


def test_a_decision_about_an_earlier_caption_holds_only_where_it_gave_the_text(make_reviewable) -> None:
    out = make_reviewable()
    decisions: list[Decision] = ["approved", "edited", "decorative", "rejected", "expert", "skipped"]
    with Journal(Directory(str(out)), "ana") as journal:
        for number, decision in enumerate(decisions):
            journal.append(review(f"{number:06d}.png", decision, text="Mine.", reviewed_at=LONG_AGO))
            journal.append(review(f"{number + 10:06d}.png", decision, text="Mine.", reviewed_at=LATER))

    assert statuses(out) == {
        "000000.png": "approved",
        "000001.png": "edited",
        "000002.png": "decorative",
        **{f"{number + 10:06d}.png": decision for number, decision in enumerate(decisions[:5])},
    }


def test_a_decision_holds_for_the_bytes_that_the_reviewer_saw(make_reviewable) -> None:
    out = make_reviewable()
    table = open_table(str(out))
    digests = [row["sha256"] for part in read_parts(table) for row in part.to_pylist()]
    with Journal(Directory(str(out)), "ana") as journal:
        journal.append(review("000000.png", text="Mine.", sha256=(digests[0],), reviewed_at=LONG_AGO))
        journal.append(review("000001.png", text="Mine.", sha256=("0" * 64,), reviewed_at=LONG_AGO))
        journal.append(review("000002.png", text="Mine.", sha256=("0" * 64,), reviewed_at=LATER))
        journal.append(review("000003.png", text="Mine.", reviewed_at=LONG_AGO))  # of an earlier version

    assert statuses(out) == {"000000.png": "approved", "000003.png": "approved"}
    queue = Queue(table, "all", read_latest_reviews(table.directory))
    assert sorted(queue.decided) == [0, 3]
    queue.set_decision(1, review("000001.png", sha256=("0" * 64,)))
    queue.set_decision(2, review("000002.png", sha256=(digests[2],)))
    assert sorted(queue.decided) == [0, 2, 3]


def test_texts_of_a_table_without_alt_texts_or_with_older_ones_are_refused(make_reviewable, finished: Path) -> None:
    with pytest.raises(OutputError, match="has no alt texts; run `captioner alt-text /"):
        list(read_texts(open_table(str(finished / "out"))))
    out = make_reviewable()
    (part,) = (out / "alt_text").glob("*.parquet")
    directory = open_table(str(out)).directory
    directory.write_table(f"alt_text/{part.name}", directory.read_table(f"alt_text/{part.name}").slice(1))

    with pytest.raises(OutputError, match="newer captions than alt texts"):
        list(read_texts(open_table(str(out))))


def test_no_acknowledged_decision_is_lost_when_its_process_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", APPEND_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    acknowledged = seen + [int(line) for line in process.stdout if line.endswith("\n")]
    process.wait()
    process.stdout.close()

    with Journal(Directory(str(tmp_path)), "ana") as journal:
        journal.append(review("afterwards.png"))
    reviews, damaged = read_reviews(Directory(str(tmp_path)))

    ids = [entry.image_ids[0] for entry in reviews]
    assert ids[: len(acknowledged)] == [f"{number}.png" for number in acknowledged]
    assert len(ids) <= len(acknowledged) + 2  # one that was written and not acknowledged, and the one afterwards
    assert ids[-1] == "afterwards.png"
    assert damaged <= 1


def test_a_full_disk_saves_nothing_and_the_next_decision_is_whole(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FILL_THE_DISK, str(tmp_path)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    message, counted = done.stdout.splitlines()
    assert "the decision was not saved" in message
    assert counted == "['approved', 'rejected'] 0"


def test_decisions_of_others_are_seen_as_they_are_written(tmp_path: Path) -> None:
    out = Directory(str(tmp_path))
    with Decisions(out, "ana") as ana, Journal(out, "ben") as ben:
        assert ana.read_new() == []
        rejection = review("a.png", "rejected", "ben")
        ben.append(rejection)
        assert ana.read_new() == [rejection]
        assert ana.read_new() == []

        path = next((tmp_path / "reviews").glob("ben*"))
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:50])  # a line that is being written
        assert ana.read_new() == []

        undo = review("a.png", "undo", "ben", undoes=rejection.review_id)
        path.write_bytes(whole)
        ben.append(undo)
        assert ana.read_new() == [undo]
        assert ana.latest() == {}


def test_reviews_in_a_bucket_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="written to a local disk"):
        Journal(Directory("s3://bucket/out?region=eu-west-1"), "ana")
