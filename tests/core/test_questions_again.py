"""--retry-failed asks again what has no answer, and keeps all answers that an image has."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import caption_config, contents, rows_of
from PIL import Image

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.console.commands import status
from captioner.data import object_array
from captioner.errors import CaptionerError
from captioner.models import load, resolve
from captioner.store.table import open_table, plan_part_name
from captioner.store.verify import count_rows, verify
from captioner.testing import make_folder, make_tiny_model
from captioner.testing.faults import Killed, killed_at_write
from captioner.testing.model_server import Answer, ModelServer, Request, failing, saying

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = """
caption: {prompt: Describe it.}
tags: {prompt: "Which objects?"}
facts:
  prompt: Count.
  schema: {type: object, properties: {people: {type: integer}, dogs: {type: integer}}}
"""
GOOD = {"Which objects?": "a, b", "Count.": json.dumps({"people": 2})}


def colour(index: int) -> tuple[int, int, int]:
    return (40 * index, 250 - 40 * index, 90)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images; 5.png is a copy of 4.png, and 6.png is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (16, 16), colour(min(index, 4))).save(folder / f"{index}.png")
    (folder / "6.png").write_bytes(b"")
    (tmp_path / "questions.yaml").write_text(QUESTIONS)
    return folder


def prompt_of(asked: Request) -> str:
    return str(asked.body["messages"][-1]["content"][1]["text"]).partition("\n")[0]


def answering(bad: dict[str, set[int]], caption: str = "") -> Any:
    """Return a rule that answers all questions but those of `bad`, about images of these numbers."""
    clue = {Image.new("RGB", (1, 1), colour(index)).tobytes()[0]: index for index in range(5)}

    def rule(asked: Request) -> Answer | None:
        prompt, red = prompt_of(asked), _red(asked.image)
        index = clue[min(clue, key=lambda value: abs(value - red))]
        if index in bad.get(prompt, ()):
            return saying("no JSON") if prompt == "Count." else failing(400, "not now")
        answer = GOOD.get(prompt, caption)
        return saying(answer) if answer else None

    return rule


def _red(image: bytes) -> int:
    import io

    return int(np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))[8, 8, 0])


BAD = {"Which objects?": {1, 4}, "Count.": {1, 2}}


def run(folder: Path, server: ModelServer | None = None, out: str = "out", **changes: Any) -> int:
    model = {"questions": str(folder.parent / "questions.yaml")}
    model |= {"name": "tiny-vlm", "endpoint": [server.url], "concurrency": 2} if server else {}
    model |= {key: changes.pop(key) for key in list(changes) if key in ModelConfig.model_fields}
    config = caption_config(folder, folder.parent / out, model=model, cluster={"local": True}, **changes)
    return pipeline.run(config)


def answers(folder: Path, out: str = "out") -> dict[str, tuple[Any, ...]]:
    names = ("caption", "tags", "people")
    return {row["image_id"]: tuple(row[name] for name in names) for row in rows_of(folder.parent / out)}


def test_only_questions_without_an_answer_are_asked_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "out"
    with ModelServer(answering(BAD)) as server:
        assert run(folder, server) == 0
        before, old = answers(folder), contents(out)
        assert count_rows(open_table(str(out))).failed_answers == {"tags": 3, "facts": 2}  # 4.png has a copy
        assert "without tags" in capsys.readouterr().err
        status(str(out))
        assert ["without", "facts", "2"] in [line.split() for line in capsys.readouterr().out.splitlines()]

        server.asked.clear()
        server.rule = answering({}, "another caption")
        assert run(folder, server, retry_failed=True) == 0

    assert Counter(map(prompt_of, server.asked)) == {"Which objects?": 2, "Count.": 2}
    after = answers(folder)
    assert {name: row[0] for name, row in after.items()} == {name: row[0] for name, row in before.items()}
    assert set(after.values()) == {(caption, "a, b", 2) for caption, *_ in before.values() if caption} | {
        (None, None, None)
    }
    rows = {row["image_id"]: row for row in rows_of(out)}
    assert rows["1.png"]["tags_error"] is rows["1.png"]["facts_error"] is None
    assert rows["5.png"]["duplicate_of"] == "4.png"
    history = open_table(str(out)).directory.read_table("history/g001/part-00000.parquet").to_pylist()
    assert [row["image_id"] for row in history] == ["1.png", "2.png", "4.png", "5.png", "6.png"]
    assert [row["tags_error"] for row in history] == [
        row["tags_error"] for row in old if row["image_id"] not in "0.png 3.png"
    ]
    assert verify(open_table(str(out))).proven
    for whole_files in (False, True):
        assert count_rows(open_table(str(out)), whole_files=whole_files).failed_answers == {}
    assert "retrying 1 failed image and 4 images without an answer (3 without tags, 2 without facts)" in (
        capsys.readouterr().err
    )


def test_what_fails_again_keeps_its_reason_and_all_other_answers(folder: Path) -> None:
    with ModelServer(answering(BAD)) as server:
        run(folder, server)
        before = answers(folder)
        server.rule = answering({"Which objects?": {1}, "Count.": {1, 2}}, "another caption")
        run(folder, server, retry_failed=True)
        counts = count_rows(open_table(str(folder.parent / "out")))
        server.asked.clear()
        run(folder, server, retry_failed=True)

    assert answers(folder) == before | {name: (before[name][0], "a, b", 2) for name in ("4.png", "5.png")}
    assert counts.failed_answers == {"tags": 1, "facts": 2}
    rows = {row["image_id"]: row for row in rows_of(folder.parent / "out")}
    assert rows["1.png"]["tags_error"] == "400: not now"
    assert rows["1.png"]["generation"] == 2
    assert len(server.asked) == 5  # an answer that does not fit its schema is asked for once more


@pytest.mark.parametrize("change", ["gone", "other", "broken"])
def test_an_image_that_has_changed_is_asked_everything_and_one_that_has_gone_keeps_its_row(
    folder: Path, change: str
) -> None:
    with ModelServer(answering(BAD)) as server:
        run(folder, server)
        before = answers(folder)
        if change == "gone":
            (folder / "1.png").unlink()
        else:
            (folder / "1.png").write_bytes((folder / "3.png").read_bytes() if change == "other" else b"no image")
        server.rule = answering({}, "another caption")
        run(folder, server, retry_failed=True)

    expected = {"gone": before["1.png"], "other": ("another caption", "a, b", 2), "broken": (None, None, None)}
    assert answers(folder)["1.png"] == expected[change]
    assert answers(folder)["2.png"] == (before["2.png"][0], "a, b", 2)
    assert verify(open_table(str(folder.parent / "out"))).proven


def test_a_retry_of_answers_that_is_killed_at_any_write_ends_like_an_undisturbed_one(folder: Path) -> None:
    with ModelServer(answering(BAD)) as server:
        run(folder, server, "finished")
        server.rule = answering({"Count.": {2}}, "another caption")
        shutil.copytree(folder.parent / "finished", folder.parent / "undisturbed")
        run(folder, server, "undisturbed", retry_failed=True)
        expected, write, lived = contents(folder.parent / "undisturbed"), 0, False
        while not lived:
            write += 2
            out = shutil.copytree(folder.parent / "finished", folder.parent / f"killed-{write}")
            try:
                with killed_at_write(write):
                    run(folder, server, out.name, retry_failed=True)
                lived = True
            except Killed:
                table = open_table(str(out))
                assert count_rows(table).failed_answers in ({"tags": 3, "facts": 2}, {"facts": 1})
                run(folder, server, out.name, **({} if table.open_plans() else {"retry_failed": True}))

            assert verify(open_table(str(out))).proven
            assert [{**row, "generation": 0, "chunk_id": "", "chunk_row": 0} for row in contents(out)] == [
                {**row, "generation": 0, "chunk_id": "", "chunk_row": 0} for row in expected
            ]
    assert write > 5


def test_a_driver_that_is_killed_in_a_retry_of_answers_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """Chunks of 7 images, four under way; the server holds what it is asked from the 40th request on."""
    make_folder(tmp_path / "images", 60)
    (tmp_path / "questions.yaml").write_text(QUESTIONS)
    out, held, settings = tmp_path / "out", threading.Event(), {"max_side": 4096}

    def badly(asked: Request) -> Answer | None:
        bad = prompt_of(asked) == "Which objects?" or zlib.crc32(asked.image) % 2
        return None if prompt_of(asked) == "Describe it." else failing(400, "not now") if bad else counted_people(asked)

    def well(asked: Request) -> Answer:
        answer = saying("a, b") if prompt_of(asked) == "Which objects?" else counted_people(asked)
        return replace(answer, held=held if asked.number >= 40 else None)

    with ModelServer(badly) as server:
        run(tmp_path / "images", server, **settings)
        before, missing = answers(tmp_path / "images"), count_rows(open_table(str(out))).failed_answers
        server.asked.clear()
        server.rule = well
        command = [sys.executable, "-m", "ray_jobs.cli", "caption", str(tmp_path / "images"), str(out), "--local"]
        command += ["--endpoint", server.url, "--questions", str(tmp_path / "questions.yaml"), "--max-side", "4096"]
        with subprocess.Popen([*command, "--concurrency", "2", "--retry-failed"], stderr=subprocess.DEVNULL) as driver:
            server.wait_for(41)
            while not list(open_table(str(out)).committed_chunks(1)):
                assert driver.poll() is None
                time.sleep(0.01)
            driver.send_signal(signal.SIGKILL)
        before_kill = len(server.asked)
        held.set()
        table = open_table(str(out))
        assert 0 < len(list(table.committed_chunks(1))) < table.plans()[1].num_chunks
        run(tmp_path / "images", server, retry_failed=True, **settings)

    assert verify(open_table(str(out))).proven
    assert missing["tags"] == 60 > missing["facts"] > 10
    assert answers(tmp_path / "images") == {name: (row[0], "a, b", 2) for name, row in before.items()}
    times_asked = Counter((asked.image, prompt_of(asked)) for asked in server.asked)
    assert len(times_asked) == sum(missing.values())  # and no caption
    asked_twice = sum(times_asked.values()) - len(times_asked)
    assert 0 < asked_twice <= min(before_kill, 4 * 7 * 2)
    assert max(times_asked.values()) == 2


def counted_people(asked: Request) -> Answer:
    return saying(GOOD["Count."])


def test_a_damaged_plan_of_a_retry_of_answers_is_made_again(folder: Path) -> None:
    with ModelServer(answering(BAD)) as server:
        run(folder, server)
        before, out = answers(folder), folder.parent / "out"
        server.rule = lambda asked: failing(401)
        with pytest.raises(CaptionerError, match="the key is refused"):
            run(folder, server, retry_failed=True)
        table = open_table(str(out))
        assert table.open_plans()
        (out / plan_part_name(1, 0)).write_bytes(b"damaged")
        server.rule = answering({}, "another caption")
        run(folder, server)

    assert answers(folder)["1.png"] == (before["1.png"][0], "a, b", 2)
    assert verify(open_table(str(out))).proven


# Models that are loaded here


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen2_vl", tmp_path_factory.mktemp("chat"))


def test_a_chat_model_answers_some_questions_as_it_answers_all(chat: Path, folder: Path) -> None:
    random = np.random.default_rng(0)
    images = object_array([random.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(4)])
    config = ModelConfig(name=str(chat), max_new_tokens=5, questions=str(folder.parent / "questions.yaml"))
    captioner = load(resolve(config), batch_size=3)
    prompts = captioner.prompts
    image_prompts = [(None, prompts[1], None), prompts, (prompts[0], None, None), (None, None, prompts[2])]

    all_answers, captions = captioner.caption(images), captioner.caption(images, image_prompts)

    assert len(set(all_answers.texts)) > 1
    assert [captions.texts[index] for index in (1, 2)] == [all_answers.texts[index] for index in (1, 2)]
    assert [captions.answers[index]["tags"] for index in (0, 1)] == [all_answers.answers[i]["tags"] for i in (0, 1)]
    assert captions.answers[3]["facts_error"] == all_answers.answers[3]["facts_error"]


def test_a_chat_model_that_fails_again_leaves_the_table_as_it_was(chat: Path, folder: Path) -> None:
    """A tiny model with random weights answers no JSON, however often it is asked."""
    model = {"name": str(chat), "max_new_tokens": 5}
    run(folder, **model)
    before, out = contents(folder.parent / "out"), folder.parent / "out"
    counts = count_rows(open_table(str(out)))
    assert counts.failed_answers == {"facts": 6}

    run(folder, **model, retry_failed=True)

    after = contents(out)
    ignored = {"generation": 0, "chunk_id": "", "chunk_row": 0, "facts_error": ""}
    assert [row | ignored for row in after] == [row | ignored for row in before]
    assert {row["generation"] for row in after} == {1}
    assert count_rows(open_table(str(out))) == counts
