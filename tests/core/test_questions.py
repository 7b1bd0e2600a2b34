"""What is asked about each image: prompts with columns, a system prompt, several questions; for servers and models."""

from __future__ import annotations

import io
import json
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import caption_config, contents, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.console.trying import try_images
from captioner.data import Question, object_array
from captioner.errors import (
    CaptionerError,
    FingerprintError,
    ModelError,
    OutputError,
    SourceError,
    TooManyFailedError,
    UsageError,
)
from captioner.models import load, resolve
from captioner.models.answers import MisfitError, fields_of, values_of
from captioner.models.questions import columns_in, fill
from captioner.store.table import open_table
from captioner.store.verify import verify
from captioner.testing import make_tiny_model
from captioner.testing.model_server import Answer, ModelServer, Request, failing, saying

pytestmark = pytest.mark.usefixtures("one_thread")

TITLES = ["A red circle", None, "", "Two squares", "A star", "A line"]
QUESTIONS = """
caption:
  prompt: Describe it.
tags:
  prompt: Which objects? The title is {title}.
  max_new_tokens: 7
"""


def picture(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (40 * index, 255 - 40 * index, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six images with titles; the last two are byte-equal."""
    images = [picture(index) for index in (0, 1, 2, 3, 4, 4)]
    columns = {"id": [f"i{index}" for index in range(6)], "image": images, "title": TITLES, "year": range(2000, 2006)}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


def questions_file(folder: Path, text: str = QUESTIONS) -> str:
    (folder / "questions.yaml").write_text(text, encoding="utf-8")
    return str(folder / "questions.yaml")


def run(table: Path, out: str = "out", keep: str = "title,year", **changes: Any) -> int:
    model = {key: value for key, value in changes.items() if key in ModelConfig.model_fields}
    output = {key: value for key, value in changes.items() if key not in ModelConfig.model_fields}
    source = {"id_column": "id", "keep_columns": keep}
    config = caption_config(table, table.parent / out, source=source, model=model, cluster={"local": True}, **output)
    return pipeline.run(config)


def rows(table: Path, out: str = "out") -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in rows_of(table.parent / out)}


def at(server: ModelServer, **changes: Any) -> dict[str, Any]:
    return {"name": "tiny-vlm", "endpoint": [server.url], "concurrency": 2, **changes}


def prompt_of(asked: Request) -> str:
    return str(asked.body["messages"][-1]["content"][1]["text"])


# Prompts with columns


def test_an_image_is_asked_with_the_columns_of_its_row_and_the_row_says_what_was_asked(table: Path) -> None:
    with ModelServer() as server:
        assert run(table, **at(server, prompt="{image_id}, {year}: {title}!", system="Be brief.")) == 0

    expected = {f"i{index}, {2000 + index}: {title or ''}!" for index, title in enumerate(TITLES)}
    assert {row["prompt"] for row in rows(table).values()} == expected
    assert {prompt_of(asked) for asked in server.asked} == expected
    assert {asked.body["messages"][0]["content"] for asked in [*server.asked, *server.probes]} == {"Be brief."}


def test_an_empty_column_is_counted_and_named(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(table, prompt="about {title}")

    assert "note: prompt: column 'title' was empty for 2 images" in capsys.readouterr().err


def test_equal_images_share_a_caption_only_where_they_are_asked_the_same(table: Path) -> None:
    run(table, "titles", prompt="about {title}")
    run(table, "same", prompt="about it")

    assert {row["duplicate_of"] for row in rows(table, "titles").values()} == {None}
    assert rows(table, "same")["i5"]["duplicate_of"] == "i4"


@pytest.mark.parametrize(
    ("prompt", "keep", "kind", "message"),
    [
        (
            "about {titel}",
            "title",
            UsageError,
            r"\{titel\} is not a column of the images; add it to --keep-columns \(kept: title\)",
        ),
        ("about {title}", "", UsageError, r"add it to --keep-columns \(kept: none\), or write \{\{title\}\}"),
        ("about {empty}", "empty", SourceError, "no image has a value in column 'empty'"),
        ("about {image}", "image", UsageError, "column 'image' holds bytes"),
    ],
)
def test_a_column_that_no_image_has_is_an_error_before_work_starts(
    table: Path, prompt: str, keep: str, kind: type[CaptionerError], message: str
) -> None:
    columns = pq.read_table(table)
    pq.write_table(columns.append_column("empty", pa.nulls(len(columns), pa.string())), table)

    with pytest.raises(kind, match=message):
        run(table, prompt=prompt, keep=keep)

    assert not (table.parent / "out" / "chunks").exists()


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.text(), max_size=3), st.text())
def test_a_prompt_holds_its_values_and_all_else_as_it_is_written(values: dict[str, str], text: str) -> None:
    text = text.replace("{", "").replace("}", "")
    prompt = text.join(f"{{{name}}}" for name in values) + '{"key": {}}' + text

    assert columns_in(prompt) == list(values)
    assert fill(prompt, values) == text.join(values.values()) + '{"key": {}}' + text
    assert fill("{{name}}", {"name": "other"}) == "{name}"


def test_try_fills_in_the_image_id_and_has_no_other_column(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = table.parent / "photo.png"
    file.write_bytes(picture(1))

    assert try_images([str(file)], [ModelConfig(name="fake", prompt="{image_id} shows")]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: {file} shows ")
    with pytest.raises(UsageError, match=r"\{title\} is not a column of the images; files given to try"):
        try_images([str(file)], [ModelConfig(name="fake", prompt="{title}")])


# Several questions


def test_answers_are_columns_and_one_server_is_asked_all_about_an_image(table: Path) -> None:
    with ModelServer() as first, ModelServer() as second:
        model = at(first, endpoint=[first.url, second.url], questions=questions_file(table.parent))
        assert run(table, **model) == 0

    for server in (first, second):
        assert [prompt_of(asked) for asked in server.asked].count("Describe it.") * 2 == len(server.asked)
    tags = [asked for asked in first.asked + second.asked if prompt_of(asked) != "Describe it."]
    assert {asked.body["max_tokens"] for asked in tags} == {7}
    row = rows(table)["i3"]
    assert row["prompt"] == "Describe it."
    assert row["tags_prompt"] == "Which objects? The title is Two squares."
    assert (row["tags"], row["tags_error"]) == (row["caption"], None)
    assert verify(open_table(str(table.parent / "out"))).proven


def test_an_answer_that_fails_leaves_the_caption_and_is_counted(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rule(asked: Request) -> Answer | None:
        return failing(400, "no tags today") if "Two squares" in prompt_of(asked) else None

    with ModelServer(rule) as server:
        assert run(table, **at(server, questions=questions_file(table.parent))) == 0

    row = rows(table)["i3"]
    assert (row["status"], row["tags"], row["tags_error"]) == ("ok", None, "400: no tags today")
    assert (
        "question 'tags': no whole answer for 1 image; reasons are in the column tags_error" in capsys.readouterr().err
    )


def test_an_answer_that_is_cut_is_kept_with_the_reason(table: Path) -> None:
    with ModelServer(lambda asked: saying("a, b", "length") if "Which" in prompt_of(asked) else None) as server:
        run(table, **at(server, questions=questions_file(table.parent)))

    assert {(row["tags"], row["tags_error"]) for row in rows(table).values()} == {
        ("a, b", "cut at 7 tokens; raise max_new_tokens of the question")
    }


def test_an_image_without_a_caption_is_asked_nothing_else_and_retried_with_all(table: Path) -> None:
    with ModelServer(lambda asked: failing(400) if prompt_of(asked) == "Describe it." else None) as server:
        model = at(server, questions=questions_file(table.parent))
        with pytest.raises(TooManyFailedError):
            run(table, **model)
        assert len(server.asked) == len(TITLES)
        assert {(row["status"], row["tags"]) for row in rows(table).values()} == {("failed", None)}
        server.rule = lambda asked: None
        assert run(table, retry_failed=True, **model) == 0

    assert all(row["tags"] for row in rows(table).values())


def test_a_run_that_was_stopped_goes_on_with_its_questions_and_no_others(table: Path) -> None:
    file = questions_file(table.parent)
    run(table, "whole", name="fake", questions=file)
    with ModelServer(lambda asked: failing(401) if asked.number > 3 else None) as server:
        with pytest.raises(CaptionerError, match="the key is refused"):
            run(table, **at(server, questions=file))
        server.rule = lambda asked: None
        assert run(table, **at(server, questions=file)) == 0
        with pytest.raises(FingerprintError, match="--questions"):
            run(table, **at(server, questions=questions_file(table.parent, QUESTIONS.replace("Which", "What"))))
        with pytest.raises(FingerprintError, match="--system none instead of short"):
            run(table, **at(server, questions=questions_file(table.parent), system="short"))

    assert len(contents(table.parent / "out")) == len(TITLES)


def test_only_takes_another_model_with_questions_of_the_same_names(table: Path) -> None:
    file = questions_file(table.parent)
    run(table, name="fake", questions=file)
    with ModelServer() as server:
        with pytest.raises(OutputError, match="has tags, tags_prompt, tags_error; give --questions of the same names"):
            run(table, only="logprob<50%", **at(server))
        assert run(table, only="logprob<50%", **at(server, questions=file)) == 0

    changed = [row for row in rows(table).values() if row["model"] == "tiny-vlm"]
    assert changed
    assert all(row["tags"] == row["caption"] for row in changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tags: {prompt: a}", "no question is named caption"),
        ("caption: what is it", "caption is 'what is it', but must hold keys: prompt, max_new_tokens"),
        ("caption: {prompt: a, limit: 3}", "caption.limit: Extra inputs are not permitted"),
        ("caption: {prompt: ''}", "caption.prompt: String should have at least 1 character"),
        ("caption: {prompt: a}\nyear: {prompt: b}", "the table already has a column 'year'"),
        ("caption: {prompt: a}\nstatus: {prompt: b}", "the table already has a column 'status'"),
        ("caption: {prompt: a}\nlong text: {prompt: b}", "'long text' is not a column name"),
        ("- a", "must hold keys at the top level, not a list"),
    ],
)
def test_a_file_of_questions_that_cannot_be_meant_is_an_error_of_one_line(table: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*$") as refused:
        run(table, name="fake", questions=questions_file(table.parent, text))

    assert message in str(refused.value)
    assert "--questions" in str(refused.value)


# Schemas

TYPED = """
caption:
  prompt: Describe it.
facts:
  prompt: Count.
  schema:
    type: object
    properties:
      people: {type: integer}
      colours: {type: array, items: {type: string}}
      place: {anyOf: [{$ref: "#/$defs/place"}, {type: "null"}]}
    required: [people]
    $defs:
      place: {type: object, properties: {indoors: {type: boolean}, share: {type: number}}}
"""
FACTS = {"people": 2, "colours": ["red"], "place": {"indoors": True, "share": 1}}


def facts(*answers: Answer) -> Any:
    """Return a rule that answers the question about facts, the n-th time it is asked about an image, with the n-th."""
    times: Counter[bytes] = Counter()

    def rule(asked: Request) -> Answer | None:
        if prompt_of(asked) == "Describe it.":
            return None
        times[asked.image] += 1
        return answers[min(times[asked.image], len(answers)) - 1]

    return rule


def test_the_properties_of_a_schema_are_columns_of_their_types(table: Path) -> None:
    with ModelServer(facts(saying(f"```json\n{json.dumps(FACTS)}\n```"))) as server:
        assert run(table, **at(server, questions=questions_file(table.parent, TYPED))) == 0

    asked = [asked for asked in server.asked if prompt_of(asked) == "Count."]
    assert len(asked) == 5  # the sixth image is a copy
    assert asked[0].body["response_format"]["json_schema"]["schema"]["required"] == ["people"]
    schema = open_table(str(table.parent / "out")).schema
    assert schema.field("people").type == pa.int64()
    assert schema.field("colours").type == pa.list_(pa.string())
    assert schema.field("place").type == pa.struct({"indoors": pa.bool_(), "share": pa.float64()})
    assert {name: rows(table)["i0"][name] for name in FACTS} == FACTS
    assert rows(table)["i0"]["facts_error"] is None
    assert rows(table)["i5"]["people"] == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (saying("two people"), "is not JSON: Expecting value"),
        (saying('{"people": "two"}'), "does not fit the schema: $.people: 'two' is not of type 'integer'"),
        (saying('{"colours": []}'), "does not fit the schema: $: 'people' is a required property"),
        (saying('{"people": 2, "dogs": 1}'), "has properties that the schema does not name: dogs"),
        (saying('{"people": 2, "dogs\\ud83d": 1}'), "has properties that the schema does not name: dogs?"),
        (saying('{"people": 9223372036854775808}'), "holds an integer of more than 64 bits"),
        (saying('{"people": 1, "place": {"share": 1e999}}'), "holds a number that is too large"),
        (saying('{"people": 1, "place": {"share": NaN}}'), "NaN is not a JSON number"),
        (saying('{"people": 1, "colours": ["\\ud800"]}'), "holds text that is not valid Unicode"),
        (saying('{"people": 2', "length"), "cut at 40 tokens"),
    ],
)
def test_an_answer_that_does_not_fit_is_asked_for_once_more_and_then_failed(
    table: Path, answer: Answer, reason: str
) -> None:
    with ModelServer(facts(answer)) as server:
        assert run(table, **at(server, questions=questions_file(table.parent, TYPED))) == 0

    prompts = Counter(prompt_of(asked).partition("\n")[0] for asked in server.asked)
    assert prompts == {"Describe it.": 5, "Count.": 10}
    assert {(row["status"], row["people"], reason in row["facts_error"]) for row in rows(table).values()} == {
        ("ok", None, True)
    }


def test_an_answer_that_fits_the_second_time_is_an_answer(table: Path) -> None:
    with ModelServer(facts(saying("two"), saying(json.dumps(FACTS)))) as server:
        run(table, **at(server, questions=questions_file(table.parent, TYPED)))

    assert {(row["people"], row["facts_error"], row["facts_prompt"]) for row in rows(table).values()} == {
        (2, None, "Count.")
    }
    again = next(prompt_of(asked) for asked in server.asked if "An earlier answer was wrong" in prompt_of(asked))
    assert "is not JSON" in again
    assert '"required": ["people"]' in again


def test_a_server_that_refuses_response_format_is_told_the_schema_by_the_prompt(table: Path) -> None:
    def rule(asked: Request) -> Answer | None:
        return saying(json.dumps(FACTS)) if prompt_of(asked).startswith("Count.") else None

    with ModelServer(rule, refuses=["response_format"]) as server:
        run(table, **at(server, questions=questions_file(table.parent, TYPED)))

    assert {row["people"] for row in rows(table).values()} == {2}
    assert all('"required": ["people"]' in row["facts_prompt"] for row in rows(table).values())


def test_a_schema_of_the_caption_needs_one_and_fills_columns_too(table: Path) -> None:
    properties = "{caption: {type: string}, tags: {type: array, items: {type: string}}}"
    file = questions_file(table.parent, f"caption: {{prompt: a, schema: {{type: object, properties: {properties}}}}}")
    answers = {1: saying('{"caption": "a cat", "tags": ["cat"]}'), 2: saying('{"caption": " "}')}
    with ModelServer(lambda asked: answers.get(asked.number, saying("no JSON"))) as server:
        run(table, **at(server, concurrency=1, questions=file))

    result = sorted((row["status"], row["caption"] or "", row["tags"] or []) for row in rows(table).values())
    assert result == [("failed", "", [])] * 5 + [("ok", "a cat", ["cat"])]
    assert "is not JSON" in next(row["error_message"] for row in rows(table).values() if row["status"] == "failed")


def test_a_schema_of_a_text_takes_an_answer_with_and_without_quotes(table: Path) -> None:
    text = "caption: {prompt: Describe it.}\nplace: {prompt: Where is it, schema: {type: string, enum: [in, out]}}"
    with ModelServer(facts(saying('"in"'), saying("never"))) as server:
        run(table, "quoted", **at(server, questions=questions_file(table.parent, text)))
        server.rule = facts(saying("somewhere"), saying("out\n"))
        run(table, "plain", **at(server, questions=questions_file(table.parent, text)))

    assert {row["place"] for row in rows(table, "quoted").values()} == {"in"}
    assert {(row["place"], row["place_error"]) for row in rows(table, "plain").values()} == {("out", None)}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{type: text}", "'text' is not valid under any of the given schemas"),
        ("{$ref: 'http://127.0.0.1:1/schema.json'}", "$ref must begin with #"),
        ("{type: object, properties: {tags: {type: string}}}", "needs a property caption of type string"),
        ("[a]", "schema: Input should be a valid dictionary"),
    ],
)
def test_a_schema_that_cannot_be_used_is_an_error_before_work_starts(table: Path, schema: str, message: str) -> None:
    file = questions_file(table.parent, f"caption: {{prompt: a, schema: {schema}}}")
    with pytest.raises(UsageError, match=r"^--questions [^\n]*$") as refused:
        run(table, name="fake", questions=file)

    assert message in str(refused.value)


SCHEMAS = st.recursive(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean")] + [{}, {"enum": ["a", 1]}]),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items}, inner),
        st.builds(lambda choices: {"anyOf": [*choices, {"type": "null"}]}, st.lists(inner, min_size=1, max_size=2)),
        st.builds(
            lambda properties: {"type": "object", "properties": properties},
            st.dictionaries(st.sampled_from(["a", "b", "#"]), st.one_of(inner, st.just({"$ref": "#"})), max_size=2),
        ),
    ),
    max_leaves=5,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["a", "\ud800", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(SCHEMAS, JSON)
def test_any_answer_fits_its_columns_or_has_a_reason(schema: dict[str, Any], answer: Any) -> None:
    question = Question("facts", "a", 40, json.dumps(schema))

    with suppress(MisfitError):
        values = values_of(question, json.dumps(answer))
        assert pa.Table.from_pylist([values], pa.schema(fields_of(question))).num_rows == 1


# Models that are loaded here


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen2_vl", tmp_path_factory.mktemp("chat"))


VISION = ("vision_tower", "vision_model", "visual")  # names of the vision part of a network


def images(count: int) -> Any:
    random = np.random.default_rng(0)
    return object_array([random.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(count)])


def test_a_chat_model_answers_each_question_as_if_it_were_the_only_one(chat: Path, tmp_path: Path) -> None:
    file = questions_file(tmp_path, 'caption: {prompt: "What?"}\nlong: {prompt: "And how?", max_new_tokens: 9}')
    config = ModelConfig(name=str(chat), max_new_tokens=5, questions=file, system="Short.")
    alone = {
        prompt: load(resolve(config.model_copy(update={"questions": None, "prompt": prompt, "max_new_tokens": limit})))
        for prompt, limit in (("What?", 5), ("And how?", 9))
    }

    captions = load(resolve(config), batch_size=2).caption(images(5))

    assert captions.texts == alone["What?"].caption(images(5)).texts
    assert [answer["long"] for answer in captions.answers] == alone["And how?"].caption(images(5)).texts
    assert captions.texts != load(resolve(config.model_copy(update={"system": None}))).caption(images(5)).texts


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl", "gemma3", "paligemma"])
def test_all_questions_about_an_image_share_what_the_vision_part_made_of_it(family: str, tmp_path: Path) -> None:
    """And only the caption is drawn several times. The answers are those that each question gets alone."""
    model = make_tiny_model(family, tmp_path / "model")
    file = questions_file(tmp_path, 'caption: {prompt: "What?"}\nlong: {prompt: "And how?", max_new_tokens: 9}')
    config = ModelConfig(name=str(model), max_new_tokens=5, questions=file, temperature=1.0, num_captions=3)
    captioner = load(resolve(config), batch_size=2)
    encoded: list[int] = []
    pixels = images(5)
    vision = next(module for name, module in captioner.model.named_modules() if name.endswith(VISION))
    vision.register_forward_hook(lambda *_: encoded.append(1))

    captions = captioner.caption(pixels)
    num_shared = len(encoded)
    captioner._features.sharing = lambda images: nullcontext()
    alone = captioner.caption(pixels)

    assert (num_shared, len(encoded) - num_shared) == (3, 6)
    assert captions.samples == alone.samples
    assert captions.answers == alone.answers
    assert {len(samples) for samples in captions.samples} == {3}
    assert len({answer["long"] for answer in captions.answers}) > 1
    assert captioner._features._kept == {}


def test_each_image_of_a_batch_is_asked_its_own_prompt(chat: Path) -> None:
    def captioner(prompt: str) -> Any:
        return load(resolve(ModelConfig(name=str(chat), prompt=prompt, max_new_tokens=6)), batch_size=3)

    prompts = ["Is it red?", "What is it?", "Is it a much longer question that needs padding?", "Why?"]
    together = captioner("{title}").caption(images(4), [(prompt,) for prompt in prompts])

    expected = [captioner(prompt).caption(images(4)).texts[index] for index, prompt in enumerate(prompts)]
    assert together.texts == expected


def test_a_chat_model_is_told_the_schema_and_asked_once_more(chat: Path, tmp_path: Path) -> None:
    """A tiny model with random weights answers no JSON."""
    file = questions_file(tmp_path, TYPED)
    ref = resolve(ModelConfig(name=str(chat), max_new_tokens=5, questions=file))
    captioner = load(ref, batch_size=2)
    asked: list[str] = []
    captioner.text_of = lambda prompt: asked.append(prompt) or captioner.text_before_answer(prompt)

    captions = captioner.caption(images(3))

    assert [answer["people"] for answer in captions.answers] == [None] * 3
    assert all("is not JSON" in answer["facts_error"] for answer in captions.answers)
    assert sum("An earlier answer was wrong: is not JSON" in prompt for prompt in asked) == 3
    assert sum(prompt.startswith("Count.") and '"required": ["people"]' in prompt for prompt in asked) == 6


@pytest.mark.parametrize(
    ("family", "flags", "message"),
    [
        ("git", {"system": "a"}, "--system: .* is a git model, which takes none"),
        (
            "git",
            {"questions": "caption: {prompt: a}\nb: {prompt: c}"},
            "--questions: .* is a git model, which captions",
        ),
        ("git", {"prompt": "a {title}"}, "--prompt 'a {title}': .* is a git model, whose prompt is the same for all"),
    ],
)
def test_models_that_take_no_questions_refuse_them(
    family: str, flags: dict[str, str], message: str, tmp_path: Path
) -> None:
    model = make_tiny_model(family, tmp_path / "model")
    if "questions" in flags:
        flags = {"questions": questions_file(tmp_path, flags["questions"])}

    with pytest.raises(ModelError, match=message):
        resolve(ModelConfig(name=str(model), **flags))


def test_a_template_without_a_system_prompt_refuses_one(chat: Path, tmp_path: Path) -> None:
    model = make_tiny_model("qwen2_vl", tmp_path)
    (model / "chat_template.jinja").write_text(
        "{% for part in messages[-1]['content'] %}{{ part['text'] or '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{% endfor %}"
    )

    with pytest.raises(ModelError, match=f"{model}: its chat template has no system prompt for --system; put it into"):
        load(resolve(ModelConfig(name=str(model), system="Be brief.")))


@pytest.mark.parametrize(
    "system",
    [
        "{{ message['content'] }}",
        "{{ '' + message['content'] }}",
        "{{ message['content'] if message['content'] is string }}",
    ],
)
def test_a_template_that_takes_the_system_prompt_as_a_text_gets_it_as_one(system: str, tmp_path: Path) -> None:
    model = make_tiny_model("qwen2_vl", tmp_path)
    template = model / "chat_template.jinja"
    first = "{% set message = messages[0] %}{% if message['role'] == 'system' %}" + system
    template.write_text(first + "|{% set messages = messages[1:] %}{% endif %}" + template.read_text())
    captioner = load(resolve(ModelConfig(name=str(model), system="Don't guess.")))

    text = captioner.text_of("What is this?")

    assert text.startswith("Don't guess.|user:<|vision_start|>")


def test_the_record_holds_the_questions(table: Path) -> None:
    run(table, name="fake", questions=questions_file(table.parent))

    model = json.loads((table.parent / "out" / "table.json").read_text())["model"]
    assert model["question_facts"]["tags"]["max_new_tokens"] == 7
