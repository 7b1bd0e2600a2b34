"""The commands of a page of the docs work one after the other, as a reader types them, on 40 images."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import test_docs_commands as docs
from helpers import rows_of

from captioner.publishing.alt_text.texts import read_texts
from captioner.publishing.review.spot_check import choose_sample
from captioner.store.directory import Directory
from captioner.store.journal import SPOT_CHECKS, Journal, Review
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_folder, make_tiny_model
from captioner.testing.tiny_clip import make_tiny_clip
from captioner.training.local import LocalTrainEngine
from ray_jobs import train
from ray_jobs.cli import main

pytestmark = pytest.mark.usefixtures("ray_instance")

IMAGES = 40
# A model that is on this machine, what keeps a run on 40 images short, and GPUs that are only counted unused.
SUBSTITUTES = {
    "microsoft/git-base-coco": "starter",
    "microsoft/git-base": "starter",
    "MODEL": "starter",
    "BETTER": "better",
    "SOURCE": "images",
    "openai/clip-vit-base-patch32": "clip",
}
ELSEWHERE = {
    "--endpoint",
    "--push-to-hub",
}  # need a server or the hub: test_object_judge and test_training_hub run them
SHORTER = {
    "caption": ["--local", "--preprocess", "processor"],  # decoders that need not import torch start in half the time
    "train": ["--max-steps", "2", "--num-workers", "1", "--device", "cpu"],
    "estimate": ["--num-workers", "1", "--decode-cpus", "1", "--device", "cpu"],
    "doctor": ["--device", "cpu"],
    "judge": ["--local", "--device", "cpu"],
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with what the pages take for granted."""
    images = make_folder(tmp_path / "images", IMAGES)
    for number, name in enumerate(("images/a.jpg", "images/b.jpg", "images/c.jpg", "image.jpg", "holiday.jpg")):
        shutil.copy(images / f"{number:06}.png", tmp_path / name)
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    coco = {
        "images": [{"id": number, "file_name": row["file_name"]} for number, row in enumerate(rows)],
        "annotations": [{"image_id": number, "caption": row["captions"][0]} for number, row in enumerate(rows)],
    }
    for name in ("refs.json", "captions_val2017.json"):
        (tmp_path / name).write_text(json.dumps(coco))
    lines = [json.dumps({"image_id": row["file_name"], "captions": row["captions"]}) for row in rows]
    (tmp_path / "refs.jsonl").write_text("\n".join(lines))
    for name in ("photos", "DATA"):
        shutil.copytree(images, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(str(ended.value.code))


def run_page(page: str) -> None:
    """Run the commands that the page shows, each once. A review is replaced by its outcome: all approved or right."""
    for line in dict.fromkeys(line for document, line in docs.commands_of("captioner") if document == page):
        _, command, *words = shlex.split(line)
        words = [SUBSTITUTES.get(word, word) for word in words if word != "--open"]
        if command == "submit" or any(word.startswith("s3://") or word in ELSEWHERE for word in words):
            continue
        if command == "review":
            approve_all(Path(words[0]))
        elif command == "spot-check":
            judge_all(Path(words[0]))
        elif "--print-config" in words:
            print_config(command, words)
        else:
            assert run(command, *words, *SHORTER.get(command, [])) == 0, line


def approve_all(out: Path) -> None:
    texts = pa.concat_tables(read_texts(open_table(str(out)))).to_pylist()
    with Journal(Directory(str(out)), "Ada") as journal:
        for text in texts:
            journal.append(Review("approved", (text["image_id"],), text["alt_text"], "Ada"))


def judge_all(out: Path) -> None:
    sample, _ = choose_sample(open_table(str(out)), None, None, None)
    with Journal(Directory(str(out)), "Ada", SPOT_CHECKS) as journal:
        for caption in sample.captions:
            journal.append(Review("right", (caption.image_id,), None, "Ada", shown=caption.text))


def print_config(command: str, words: list[str]) -> None:
    from contextlib import redirect_stdout

    with open("run.yaml", "w") as file, redirect_stdout(file):
        assert run(command, *words) == 0


def captions(out: str) -> int:
    assert verify(open_table(out)).proven
    return sum(row["status"] == "ok" for row in rows_of(out))


@pytest.fixture
def training_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train in this process: test_counted_gpus and test_train_on_ray show that training works on Ray."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many threads on a small model wait for each other more than they work
    monkeypatch.setattr(train, "RayTrainEngine", lambda config: LocalTrainEngine(config.model.device))
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("desk")
def test_the_first_images() -> None:
    run_page("first-10000.md")

    assert captions("captions") == captions("captions-3-beams") == IMAGES + 3


@pytest.mark.usefixtures("desk", "training_here")
def test_alt_text_and_back() -> None:
    run_page("alt-text.md")

    assert len(list(Path("texts").rglob("*.xmp"))) == IMAGES + 3
    assert Path("trained/model/config.json").exists()
    assert captions("captions") == IMAGES + 3


def test_quality(desk: Path) -> None:
    for out in ("OUT", "OTHER_OUT"):
        assert run("caption", "images", out, "--model", "starter", *SHORTER["caption"]) == 0
    make_tiny_clip(desk / "clip")
    make_tiny_model("git", desk / "better")
    run_page("quality.md")

    assert Path("OUT/report/index.html").exists()
    assert captions("out") == IMAGES + 3


@pytest.mark.usefixtures("training_here")
def test_the_guide_of_transformers(desk: Path) -> None:
    shutil.copytree(desk / "images", desk / "pairs")
    run_page("from-the-transformers-guide.md")

    assert captions("captions") == IMAGES + 3


@pytest.mark.usefixtures("desk")
def test_when_something_fails() -> None:
    assert run("caption", "images", "OUT", "--model", "starter", *SHORTER["caption"]) == 0
    run_page("when-something-fails.md")


@pytest.mark.usefixtures("training_here")
def test_the_readme(desk: Path) -> None:
    shutil.copytree(desk / "images", desk / "pairs")
    run_page("README.md")

    assert captions("captions") == IMAGES + 3
    assert Path("trained/model/config.json").exists()
