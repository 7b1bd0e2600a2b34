"""What people approved and wrote becomes training pairs; images taught are left out of later checks."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.config import SourceConfig, TrainConfig
from captioner.errors import OutputError
from captioner.publishing.alt_text.feedback import write_feedback
from captioner.sources import open_source
from captioner.store.directory import Directory
from captioner.store.journal import Decision, Journal, Review
from captioner.store.table import open_table
from captioner.testing import make_folder, make_parquet
from captioner.training import job
from captioner.training.local import LocalTrainEngine
from ray_jobs.cli import main


def caption(archive: Path, out: Path, **output) -> None:
    pipeline.run(caption_config(archive, out, model={"name": "starter"}, **output))


def review(out: Path, decision: Decision, *image_ids: str, text: str | None = None) -> None:
    with Journal(Directory(str(out)), "Ada") as journal:
        journal.append(Review(decision, image_ids, text, "Ada"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 scenes captioned by the starter, 15 of them reviewed."""
    root = tmp_path_factory.mktemp("captioned")
    caption(make_folder(root / "archive", 20), root / "out")
    review(root / "out", "approved", *(f"{number:06d}.png" for number in range(8)), text="A scene.")
    review(root / "out", "edited", "000008.png", "000009.png", text="A ring that Ada saw.")
    for number, decision in enumerate(("rejected", "decorative", "expert", "skipped"), 10):
        review(root / "out", decision, f"{number:06d}.png", text="" if decision == "decorative" else None)
    review(root / "out", "edited", "gone.png", text="An image that the table never had.")
    return root


def test_approved_and_edited_texts_are_pairs_and_the_rest_is_counted(tmp_path: Path, captioned: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["feedback", str(captioned / "out"), str(tmp_path / "pairs")])

    assert ended.value.code == 0
    assert (
        "10 pairs (8 approved, 2 edited); left out: 1 rejected, 1 decorative, 1 expert, 1 not in the table"
        in capsys.readouterr().out
    )
    rows = pq.read_table(tmp_path / "pairs/pairs.parquet").to_pylist()
    assert [row["image_id"] for row in rows] == [f"{number:06d}.png" for number in range(10)]
    assert [row["captions"] for row in rows[7:9]] == [["A scene."], ["A ring that Ada saw."]]
    assert rows[0]["image"]["bytes"] == (captioned / "archive/000000.png").read_bytes()
    assert rows[0]["machine_text"]
    assert {row["review_status"] for row in rows} == {"approved", "edited"}
    assert json.loads((tmp_path / "pairs/feedback.json").read_text())["pairs"] == {"approved": 8, "edited": 2}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs"]


def test_train_takes_the_pairs_and_checks_leave_their_images_out(tmp_path: Path, captioned: Path) -> None:
    write_feedback(open_table(str(captioned / "out")), str(tmp_path / "pairs"))
    tree = {
        "data": {"path": str(tmp_path / "pairs"), "eval_fraction": 0.2},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4},
        "output": {"path": str(tmp_path / "trained")},
    }
    job.run(TrainConfig.model_validate(tree), LocalTrainEngine())

    model = {"name": str(tmp_path / "trained/model")}
    pipeline.run(caption_config(captioned / "archive", tmp_path / "out", model=model))

    check = json.loads((tmp_path / "out/checks/check.json").read_text())
    assert (check["trained_left_out"], check["num_rows"]) == (10, 10)

    again = {"name": str(tmp_path / "trained/model")}
    more = make_folder(tmp_path / "more", 6, seed=9)
    tree = {"data": {"path": str(more)}, "model": again, "training": {"max_steps": 1}} | {
        "output": {"path": str(tmp_path / "taught again")}
    }
    job.run(TrainConfig.model_validate(tree), LocalTrainEngine())
    seen = pq.read_table(tmp_path / "taught again/model/training_images.parquet")
    assert len(set(seen["sha256"].to_pylist())) == 16  # what it was taught before is not forgotten


def test_images_that_have_changed_or_gone_are_left_out(tmp_path: Path) -> None:
    archive = make_folder(tmp_path / "archive", 4)
    caption(archive, tmp_path / "out")
    review(tmp_path / "out", "approved", *(f"00000{number}.png" for number in range(4)), text="A scene.")
    (archive / "000001.png").unlink()
    (archive / "000002.png").write_bytes((archive / "000000.png").read_bytes())

    feedback = write_feedback(open_table(str(tmp_path / "out")), str(tmp_path / "pairs"))

    assert feedback.pairs.total() == 2
    assert dict(feedback.left_out) == {"not_found": 1, "changed since it was captioned": 1}


def test_images_inside_a_table_are_taken_along(tmp_path: Path) -> None:
    caption(make_parquet(tmp_path / "archive.parquet", 3), tmp_path / "out")
    review(tmp_path / "out", "edited", "archive.parquet#1", text="A scene.")

    write_feedback(open_table(str(tmp_path / "out")), str(tmp_path / "pairs"))

    source = open_source(SourceConfig(path=str(tmp_path / "pairs")))
    (listing,) = (listing for unit in source.units() for listing in source.list_unit(unit))
    assert listing.rows.select(["image_id", "reference_captions"]).to_pylist() == [
        {"image_id": "archive.parquet#1", "reference_captions": ["A scene."]}
    ]


def test_what_cannot_be_is_said_and_nothing_is_left_behind(tmp_path: Path, captioned: Path) -> None:
    table = open_table(str(captioned / "out"))
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="there exists already; give another PAIRS"):
        write_feedback(table, str(tmp_path / "there"))
    with pytest.raises(OutputError, match="local disk"):
        write_feedback(table, "s3://bucket/pairs")

    caption(make_folder(tmp_path / "archive", 2), tmp_path / "out")
    with pytest.raises(OutputError, match=r"has no reviews; run `captioner review /"):
        write_feedback(open_table(str(tmp_path / "out")), str(tmp_path / "pairs"))
    review(tmp_path / "out", "rejected", "000000.png")
    with pytest.raises(OutputError, match=r"0 pairs .*left out: 1 rejected"):
        write_feedback(open_table(str(tmp_path / "out")), str(tmp_path / "pairs"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["archive", "out", "there"]


def test_a_text_is_not_taught_with_another_image_than_was_reviewed(tmp_path: Path) -> None:
    archive, out = make_folder(tmp_path / "archive", 3), tmp_path / "out"
    caption(archive, out)
    digests = tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(archive.iterdir())[:2])
    with Journal(Directory(str(out)), "Ada") as journal:
        journal.append(Review("approved", ("000000.png", "000001.png"), "A scene.", "Ada", sha256=digests))
    (archive / "000001.png").write_bytes((archive / "000002.png").read_bytes())
    caption(archive, out, extend=True)

    feedback = write_feedback(open_table(str(out)), str(tmp_path / "pairs"))

    assert feedback.pairs.total() == 1
    assert dict(feedback.left_out) == {"changed since it was reviewed": 1}
