"""A chat model is asked whether captions name anything that is not in their images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import caption_config

from captioner import pipeline
from captioner.models.endpoint.api_key import VARIABLES
from captioner.scoring.judgements import OBJECTS_FILE, objects_name
from captioner.store.table import CaptionsTable, open_table
from captioner.testing import make_folder
from captioner.testing.model_server import Answer, ModelServer, Request, failing, saying
from ray_jobs.cli import main

COUNT = 20  # images, in parts of 16


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def table(tmp_path: Path) -> CaptionsTable:
    pipeline.run(caption_config(make_folder(tmp_path / "archive", COUNT), tmp_path / "out"))
    return open_table(str(tmp_path / "out"))


def prompt_of(asked: Request) -> str:
    return str(asked.body["messages"][-1]["content"][1]["text"])


def listing(asked: Request) -> Answer:
    """Every caption of the fake model names a code; it is seen where it begins with a digit."""
    code = json.loads(prompt_of(asked).split("says: ")[1].splitlines()[0]).split()[-1]
    objects = [{"name": "image", "seen": True}, {"name": code[0], "seen": code[0].isdigit()}]
    return saying(f"```json\n{json.dumps({'objects': objects})}\n```")


def judge(table: CaptionsTable, server: ModelServer, *flags: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["judge", table.directory.location, "--local", "--endpoint", server.url, "--model", server.model, *flags])
    assert ended.value.code == 0


def rows_of(table: CaptionsTable) -> list[dict[str, Any]]:
    names = [objects_name(part) for part in (0, 1) if table.directory.exists(objects_name(part))]
    return [row for name in names for row in table.directory.read_table(name).to_pylist()]


def test_what_a_caption_names_is_listed_with_whether_it_is_seen(table: CaptionsTable, capsys) -> None:
    with ModelServer(listing) as server:
        judge(table, server, "--price-in", "3", "--price-out", "0")

    rows = rows_of(table)
    assert len(rows) == COUNT
    for row in rows[:16]:
        first = str(captions_of(table)[row["image_id"]]).split()[-1][0]
        assert row["objects"] == [{"name": "image", "seen": True}, {"name": first, "seen": first.isdigit()}]
        assert row["num_unseen"] == (not first.isdigit())
    figures = table.directory.read_json(OBJECTS_FILE)
    assert (figures["num_judged"], figures["num_with_unseen"]) == (COUNT, sum(row["num_unseen"] for row in rows))
    assert 0 < figures["num_with_unseen"] < COUNT
    printed = capsys.readouterr()
    # 4 captions are asked about first; the server counts 100 prompt tokens for each request.
    assert "estimate: 20 requests, about 2,000 prompt tokens and 60 answer tokens, cost 0.01" in printed.err
    assert f"{figures['num_with_unseen']} of 20 captions" in printed.out
    page = Path(table.directory.location, "report", "index.html").read_text(encoding="utf-8")
    assert "Named, but not seen by a chat model" in page


def captions_of(table: CaptionsTable) -> dict[str, str]:
    rows = table.directory.read_table("captions/part-00000.parquet", ["image_id", "caption"]).to_pylist()
    return {row["image_id"]: row["caption"] for row in rows}


def test_the_schema_is_sent_and_left_out_where_a_server_takes_none(table: CaptionsTable) -> None:
    def rule(asked: Request) -> Answer:
        if "response_format" in asked.body:
            return failing(400, "response_format is not supported")
        return listing(asked)

    with ModelServer(rule) as server:
        judge(table, server)
        first = server.asked[0].body

    assert first["response_format"]["json_schema"]["schema"]["required"] == ["objects"]
    assert "logprobs" not in first
    assert [row["error"] for row in rows_of(table)] == [""] * COUNT


def test_no_verdict_is_a_reason_and_is_asked_for_again(table: CaptionsTable, capsys) -> None:
    def rule(asked: Request) -> Answer:
        return listing(asked) if asked.number % 2 else saying("I see a dog.")

    with ModelServer(rule) as server:
        judge(table, server)
    errors = [row["error"] for row in rows_of(table)]
    progress = rf"^judged 20/20 \(100%\) in [0-9:]+  failed {sum(map(bool, errors))}$"
    assert re.search(progress, capsys.readouterr().err, re.MULTILINE)
    assert set(errors) == {"", "the answer is not the JSON that was asked for: 'I see a dog.'"}
    assert table.directory.read_json(OBJECTS_FILE)["not_judged"] == {
        "the answer is not the JSON that was asked for": sum(map(bool, errors))
    }

    with ModelServer(listing) as server:
        judge(table, server)
        num_left = sum(map(bool, errors))
        assert len(server.asked) == min(4, num_left) + num_left
        server.asked.clear()
        judge(table, server)
        assert server.asked == []
    assert sorted(row["image_id"] for row in rows_of(table)) == sorted({row["image_id"] for row in rows_of(table)})
    assert [row["error"] for row in rows_of(table)] == [""] * COUNT


def test_half_a_surrogate_pair_in_a_refusal_is_a_question_mark(table: CaptionsTable) -> None:
    with ModelServer(lambda asked: saying(None, refusal="no \ud83d")) as server:
        judge(table, server)

    assert [row["error"] for row in rows_of(table)] == ["refused: no ?"] * COUNT


def test_a_sample_is_the_same_whatever_was_asked_before(table: CaptionsTable) -> None:
    with ModelServer(listing) as server:
        judge(table, server, "--sample", "5")
        drawn = {row["image_id"] for row in rows_of(table)}
        judge(table, server, "--sample", "9")

    assert len(drawn) == 5
    assert len(rows_of(table)) == 9
    assert drawn < {row["image_id"] for row in rows_of(table)}
