"""Captions by model servers: what is sent, what counts as a caption, and what a server's faults do to a run."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import caption_config, contents, rows_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioner import pipeline
from captioner.config import ModelConfig
from captioner.console.trying import try_images
from captioner.data import Captions, object_array
from captioner.errors import EndpointError, FingerprintError, UsageError
from captioner.models import load, resolve
from captioner.models.endpoint.api_key import VARIABLES
from captioner.models.endpoint.asking import BrokenError, BusyError, retry_after
from captioner.models.endpoint.reply import NoReplyError, error_in, judge
from captioner.models.endpoint.sharing import LONGEST_REST_S, ServerPool
from captioner.run.job import NO_LOGPROBS
from captioner.store.table import open_table
from captioner.testing import make_folder, num_committed_chunks
from captioner.testing.model_server import (
    HALF_A_REPLY,
    NO_REPLY,
    Answer,
    ModelServer,
    Request,
    failing,
    saying,
    too_many_requests,
)

ANOTHER_MODEL, LOCAL = Answer(changes={"model": "another"}), {"local": True}
NO_PORT = "http://127.0.0.1:1/v1"  # where nothing listens
COLOURS = np.random.default_rng(0).integers(0, 256, (64, 3), np.uint8)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def pictures(count: int) -> Any:
    """Different images of 8 x 8 pixels in two colours."""
    images = np.zeros((count, 8, 8, 3), np.uint8)
    images[:, :4] = COLOURS[:count, None, None]
    return object_array(list(images))


def settings(*servers: ModelServer | str, **changes: Any) -> ModelConfig:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    return ModelConfig.model_validate({"name": "tiny-vlm", "endpoint": urls, "concurrency": 4, **changes})


def captions_of(*servers: ModelServer | str, count: int = 8, **changes: Any) -> Captions:
    return load(resolve(settings(*servers, **changes), notify=ignore)).caption(pictures(count))


def ignore(line: str) -> None:
    """Take a message."""


def first_image(answer: Answer) -> Callable[[Request], Answer | None]:
    return lambda asked: answer if asked.number == 1 else None


def same_image(answer: Answer) -> Callable[[Request], Answer | None]:
    """The answer for the first image that comes, whenever it comes again."""
    images: list[bytes] = []

    def rule(asked: Request) -> Answer | None:
        images.append(asked.image)
        return answer if asked.image == images[0] else None

    return rule


# Sampled captions


SAMPLED: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "num_captions": 3, "seed": 7}


@pytest.mark.parametrize(
    ("server", "requests"),
    [({}, 1), ({"most_choices": 1}, 3), ({"most_choices": 2}, 2), ({"refuses": ["n"]}, 3), ({"refuses": ["seed"]}, 1)],
)
def test_sampled_captions_are_asked_for_as_the_server_gives_them(server: dict[str, Any], requests: int) -> None:
    with ModelServer(**server) as asked:
        captions = captions_of(asked, count=4, **SAMPLED)

    assert captions.texts == [samples[0] for samples in captions.samples]
    assert [len(samples) for samples in captions.samples] == [3] * 4
    assert len({text for samples in captions.samples for text in samples}) == 12
    assert len(asked.asked) == 4 * requests
    assert {(body["temperature"], body["top_p"]) for body in (request.body for request in asked.asked)} == {(0.5, 0.9)}
    assert all(usage.prompt_tokens == 100 * requests for usage in captions.usage)


def test_the_seed_of_a_request_is_that_of_its_image_whatever_the_order() -> None:
    def texts(count: int, **changes: Any) -> list[str]:
        with ModelServer() as server:
            return captions_of(server, count=count, **{"temperature": 0.5, "seed": 7, **changes}).texts

    before = texts(6)

    assert texts(3, concurrency=1) == before[:3]
    assert set(texts(6, seed=8)).isdisjoint(before)
    assert len({text.split()[-1] for text in before}) == 6


def test_a_choice_that_is_no_caption_is_null_and_the_first_that_is_one_is_the_caption() -> None:
    def choice(index: int, content: str) -> dict[str, Any]:
        return {"index": index, "message": {"content": content}, "finish_reason": "stop"}

    answer = Answer(changes={"choices": [choice(0, ""), choice(1, "a cat"), choice(2, "<think>hm</think>")]})
    with ModelServer(lambda asked: answer) as server:
        captions = captions_of(server, count=1, **SAMPLED)

    assert (captions.texts, list(captions.samples), captions.errors) == (["a cat"], [(None, "a cat", None)], [""])


def test_an_image_that_a_server_refuses_is_asked_about_once_a_caption_and_fails_alone() -> None:
    with ModelServer(same_image(failing(400))) as server:
        captions = captions_of(server, count=3, concurrency=1, **SAMPLED)

    assert sorted(map(bool, captions.errors)) == [False, False, True]  # which image comes first is not said


# What is sent, and who is asked


def test_an_image_is_sent_as_a_jpeg_of_its_pixels_without_metadata() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 255
    with ModelServer() as server:
        load(resolve(settings(server), notify=ignore)).caption(object_array([image]))

    (asked,) = server.asked
    with Image.open(io.BytesIO(asked.image)) as sent:
        assert (sent.format, sent.size) == ("JPEG", (60, 40))
        assert not sent.getexif()
        assert np.abs(np.asarray(sent).astype(int) - image).max() < 10
    assert asked.body["messages"][0]["content"][1]["text"] == "Describe the image in one sentence."


def test_images_are_turned_and_shrunk_to_the_longest_side(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    exif[0x010F] = "a camera"
    picture = Image.linear_gradient("L").resize((400, 200)).convert("RGB")
    picture.save(tmp_path / "turned.jpg", exif=exif)
    with ModelServer() as server:
        assert try_images([str(tmp_path / "turned.jpg")], [settings(server, max_side=100)]) == 0

    (asked,) = server.asked
    with Image.open(io.BytesIO(asked.image)) as sent:
        assert sent.size == (50, 100)
        assert not sent.getexif()


def test_captions_come_in_the_order_of_the_images_with_tokens_and_log_probabilities() -> None:
    with ModelServer() as server:
        captions = captions_of(server, count=20)

    assert len(set(captions.texts)) == 20
    by_image = {asked.caption for asked in server.asked}
    assert set(captions.texts) == by_image
    again = {text: index for index, text in enumerate(captions.texts)}
    with ModelServer() as server:
        assert [again[text] for text in captions_of(server, count=20, concurrency=1).texts] == list(range(20))
    assert set(captions.num_tokens) == {3}
    assert set(captions.logprob_mean) == {-0.5}
    assert sum(usage.prompt_tokens for usage in captions.usage) == 2000


def test_two_servers_share_the_images_and_a_held_one_gets_no_more_than_its_concurrency() -> None:
    held = threading.Event()
    with ModelServer(lambda asked: Answer(held=held)) as slow, ModelServer() as fast:
        captioner = load(resolve(settings(slow, fast, concurrency=2), notify=ignore))
        captioning = threading.Thread(target=captioner.caption, args=(pictures(20),))
        captioning.start()
        fast.wait_for(18)
        held.set()
        captioning.join()

    assert len(slow.asked) == slow.most_at_once == 2
    assert len(fast.asked) == 18


def test_a_server_that_is_gone_leaves_its_images_to_the_others() -> None:
    lines: list[str] = []
    with ModelServer() as server:
        captions = load(resolve(settings(NO_PORT, server), notify=lines.append)).caption(pictures(8))

    assert not any(captions.errors)
    assert len(server.asked) == 8
    assert any(NO_PORT in line and "going on with the others" in line for line in lines)


# What counts as a caption


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (saying(""), "an empty answer"),
        (saying(None), "an empty answer"),
        (saying(" \n"), "an empty answer"),
        (saying("<think>a dog?</think>  "), "only reasoning, no caption"),
        (saying("<think>a dog or", "length"), "only reasoning, no caption, cut at --max-new-tokens"),
        (saying(None, reasoning_content="a dog?"), "only reasoning, no caption"),
        (saying("", reasoning="a dog?"), "only reasoning, no caption"),
        (saying(None, refusal="I cannot help with that."), "refused: I cannot help with that."),
        (saying("a d", "content_filter"), "content filter: the server withheld the answer"),
        (saying(None, "tool_calls"), "no caption: the answer calls a tool"),
        (saying("a dog \ud800"), "the answer is not valid Unicode"),
        (failing(400, "image too small"), "400: image too small"),
        (failing(413), "413: out of order"),
        (Answer(422, body=b"<html>no</html>"), "422: <html>no</html>"),
        (Answer(200, body={"error": {"message": "cannot identify image", "code": 400}}), "400: cannot identify image"),
        (Answer(200, body={"object": "error", "message": "bad image", "code": 400}), "400: bad image"),
    ],
)
def test_what_is_no_caption_is_the_row_of_that_image_alone(answer: Answer, reason: str) -> None:
    with ModelServer(same_image(answer)) as server:
        captions = captions_of(server)

    assert sorted(captions.errors) == [""] * 7 + [reason]
    assert len(server.asked) == 8


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (saying("<think>a cat? no.</think>\n\na dog"), "a dog"),
        (saying("a cat? no.</think>a dog"), "a dog"),
        (saying("a dog", reasoning_content="a cat? no."), "a dog"),
        (saying("a dog "), "a dog"),
    ],
)
def test_reasoning_before_a_caption_is_no_part_of_it(answer: Answer, text: str) -> None:
    with ModelServer(first_image(answer)) as server:
        captions = captions_of(server)

    assert text in captions.texts
    assert not any(captions.errors)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (saying(None, refusal="no \ud83d"), "refused: no ?"),
        (failing(400, "no \ud83d"), "400: no ?"),
        (failing(500, "no \ud83d"), "the server answers, but not about this image: 500: no ?"),
    ],
)
def test_half_a_surrogate_pair_in_a_message_is_a_question_mark_in_the_row_of_its_image(
    tmp_path: Path, answer: Answer, reason: str
) -> None:
    make_folder(tmp_path / "images", 4)
    with ModelServer(same_image(answer)) as server:
        assert run(tmp_path, server) == 0

    messages = [row["error_message"] for row in rows_of(tmp_path / "out") if row["status"] == "failed"]
    assert messages == [reason]


def test_content_may_come_in_parts() -> None:
    with ModelServer(first_image(saying([{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}]))) as server:
        assert "a dog" in captions_of(server).texts


def test_a_caption_that_is_cut_is_flagged_and_a_server_without_log_probabilities_noted(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 4)
    with ModelServer(first_image(saying("a dog on", "length")), logprobs=False) as server:
        assert run(tmp_path, server) == 0

    flags = [row["flags"] for row in rows_of(tmp_path / "out")]
    assert sorted(flags) == [[]] * 3 + [["truncated"]]
    notes = open_table(str(tmp_path / "out")).directory.read_json("run.json")["notes"]
    assert [note for note in notes if "log-probabilities" in note] == [NO_LOGPROBS]
    assert {row["logprob_mean"] for row in rows_of(tmp_path / "out")} == {None}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "error", "usage", "logprobs", "code"]), inner
        )
    ),
    max_leaves=20,
)


@given(ANYTHING)
def test_any_json_is_a_reply_with_text_or_a_reason_or_no_reply(body: Any) -> None:
    error_in(body)
    try:
        reply = judge(body)
    except NoReplyError:
        return
    assert bool(reply.text) or bool(reply.error)


# Faults of servers


@pytest.mark.parametrize(
    "answer",
    [
        failing(500),
        failing(502),
        HALF_A_REPLY,
        NO_REPLY,
        too_many_requests(0),
        failing(503),
        Answer(body=b"<html>hello</html>"),
        Answer(body={"error": {"message": "upstream is gone"}}),
        Answer(body={"choices": []}),
    ],
)
def test_an_image_is_asked_about_again_after_a_fault(answer: Answer) -> None:
    with ModelServer(first_image(answer)) as server:
        captions = captions_of(server, count=4)

    assert not any(captions.errors)
    assert len(set(captions.texts)) == 4
    assert len(server.asked) == 5


@pytest.mark.parametrize("answer", [failing(500), NO_REPLY])
def test_an_image_that_only_brings_faults_is_a_failed_row(answer: Answer) -> None:
    with ModelServer(same_image(answer)) as server:
        captions = captions_of(server, count=4)

    (reason,) = filter(None, captions.errors)
    assert reason.startswith("the server answers, but not about this image: ")


@pytest.mark.parametrize("answer", [too_many_requests(0), too_many_requests(0.6), failing(429), failing(503)])
def test_an_image_that_is_always_one_too_many_is_a_failed_row(answer: Answer) -> None:
    """As where each request has a quota of tokens. Without an answer about any image the run would stop after 2 s."""
    with ModelServer(same_image(answer)) as server:
        captions = captions_of(server, count=4, endpoint_timeout=2)

    (reason,) = filter(None, captions.errors)
    assert reason.startswith(f"the server answers, but not about this image: {answer.status}: ")


def test_images_that_are_all_one_too_many_are_failed_rows_while_another_is_answered() -> None:
    with ModelServer(lambda asked: failing(429, "over your quota of tokens")) as server:
        captions = captions_of(server, count=12, endpoint_timeout=2)

    assert {reason.rpartition(": ")[2] for reason in captions.errors} == {"over your quota of tokens"}


def test_an_image_that_is_one_too_many_for_some_time_is_captioned() -> None:
    """While others are answered, as where a limit of requests a minute is reached."""
    with ModelServer(lambda asked: too_many_requests(0) if asked.number % 2 else None) as server:
        captions = captions_of(server, count=12)

    assert not any(captions.errors)


def test_an_answer_that_does_not_come_is_a_failed_row(tmp_path: Path) -> None:
    held = threading.Event()
    with ModelServer(same_image(Answer(held=held))) as server:
        ref = resolve(settings(server), notify=ignore)  # asks the server something itself, and may wait longer
        impatient = replace(ref, endpoint=replace(ref.endpoint, request_timeout=0.3))
        captions = load(impatient, notify=ignore).caption(pictures(2))
        held.set()

    (reason,) = filter(None, captions.errors)
    assert reason.endswith("no answer within 0.3 s")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (failing(401, "bad key"), "the key is refused (401: bad key); set CAPTIONER_API_KEY"),
        (failing(403, "no access"), "the key is refused (403: no access)"),
        (failing(404, "no such model"), "404: no such model; check --endpoint and --model"),
        (Answer(307, headers={"Location": "http://elsewhere.test/v1"}), "redirects to http://elsewhere.test/v1"),
        (Answer(changes={"model": "another-vlm"}), "the answers now come from model 'another-vlm', before from"),
        (Answer(changes={"system_fingerprint": "fp_2"}), "now come from system_fingerprint 'fp_2', before from 'fp_1'"),
    ],
)
def test_what_concerns_every_image_stops_the_run_with_one_line(answer: Answer, message: str) -> None:
    rule = lambda asked: answer if asked.number >= 20 else None  # noqa: E731
    with ModelServer(rule, system_fingerprint="fp_1") as server, pytest.raises(EndpointError) as stopped:
        captions_of(server, count=40)

    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_run_whose_model_changes_keeps_what_is_committed_and_goes_on_with_the_first(tmp_path: Path) -> None:
    """Three of four requests wait, none of the first chunk, until a chunk is committed: then the model is another."""
    files = sorted(make_folder(tmp_path / "images", 40).glob("*.png"))
    first_chunk = {file.read_bytes() for file in files[:16]}
    is_committed, waiting = threading.Event(), threading.Semaphore(3)

    def wait_for_a_chunk() -> None:
        while not num_committed_chunks(tmp_path / "out"):
            time.sleep(0.01)
        is_committed.set()

    def changed_where_it_waits(asked: Request) -> Answer | None:
        return changed if asked.image not in first_chunk and waiting.acquire(blocking=False) else None

    changes = {"model": "another-vlm", "choices": saying("a cat").changes["choices"]}
    changed = Answer(changes=changes, held=is_committed)
    threading.Thread(target=wait_for_a_chunk, daemon=True).start()
    with ModelServer(changed_where_it_waits) as server:
        with pytest.raises(EndpointError, match="the answers now come from model 'another-vlm'"):
            run(tmp_path, server, concurrency=4)
        committed = {row["caption"] for row in rows_of(tmp_path / "out")}
        server.rule = lambda asked: None
        assert run(tmp_path, server, concurrency=4) == 0

    captions = [row["caption"] for row in rows_of(tmp_path / "out")]
    assert len(set(captions)) == 40
    assert set() < committed < set(captions)


def test_a_run_stops_when_no_server_answers_and_the_same_command_goes_on(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 40)
    message = r"no --endpoint has answered for 1 s .*503: out of order; progress is saved"
    with ModelServer() as server:
        server.rule = lambda asked: setattr(server, "is_down", asked.number >= 20)
        with pytest.raises(EndpointError, match=message):
            run(tmp_path, server, endpoint_timeout=1)
        server.rule, server.is_down = lambda asked: None, False
        assert run(tmp_path, server, endpoint_timeout=1) == 0

    assert {row["status"] for row in rows_of(tmp_path / "out")} == {"ok"}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("", None), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("soon", None), ("inf", None), ("nan", None)],
)
def test_retry_after_is_seconds(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds


def test_retry_after_may_be_a_date() -> None:
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (retry_after("Wed, 21 Oct 2065 07:28:00 GMT") or 0) > 1e9


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def pool_of(*urls: str, clock: Clock, concurrency: int = 2, timeout: float = 600.0) -> ServerPool:
    return ServerPool(urls, concurrency, timeout, ignore, clock)


def test_a_busy_server_gets_nothing_until_the_time_that_it_names() -> None:
    clock = Clock()
    pool = pool_of("a", "b", clock=clock)
    first = pool.free()
    assert first is not None
    pool.failed(first, BusyError("429", 20.0))
    pool.answered(first)  # about an image that was asked before

    for clock.now in (1001.0, 1019.9):
        other = pool.free()
        assert other is not None
        assert other.url != first.url
    clock.now = 1020.0
    for server in pool.servers:
        server.under_way = int(server is not first)
    assert pool.free() is first


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_busy_server_that_names_no_time_to_come_rests_longer_each_time(seconds: float) -> None:
    clock = Clock()
    pool = pool_of("a", clock=clock, timeout=1e9)
    (server,) = pool.servers

    for rest in (0.5, 1.0, 2.0):
        pool.failed(server, BusyError("429", seconds))
        assert pool.free() is None
        assert server.free_from == clock.now + rest
        clock.now += rest


def test_a_server_that_does_not_answer_rests_longer_each_time_and_is_then_asked_once() -> None:
    clock = Clock()
    pool = pool_of("a", clock=clock, timeout=1e9)
    rests = []
    for _ in range(10):
        server = pool.free()
        assert server is not None
        for _ in range(5):  # requests that were under way together
            pool.failed(server, BrokenError("gone"))
        assert pool.free() is None
        rests.append(server.rests_until - clock.now)
        clock.now = server.rests_until
    assert rests == sorted(rests)
    assert rests[-1] == LONGEST_REST_S
    server.under_way = 1
    assert pool.free() is None
    pool.answered(server)
    assert pool.free() is server


# What a table is bound to


def run(folder: Path, *servers: ModelServer | str, **changes: Any) -> int:
    model = settings(*servers, **changes).model_dump()
    return pipeline.run(caption_config(folder / "images", folder / "out", model=model, cluster={"local": True}))


def test_a_table_belongs_to_model_fingerprint_prompt_and_fitting_but_not_to_urls(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 4)
    with ModelServer(system_fingerprint="fp_1") as server, ModelServer(system_fingerprint="fp_1") as other:
        assert run(tmp_path, server) == 0
        before = contents(tmp_path / "out")
        assert run(tmp_path, other, concurrency=1) == 0
        assert contents(tmp_path / "out") == before
        assert not other.asked
        for changes, difference in [
            ({"prompt": "What?"}, "--prompt Describe the instead of What?"),
            ({"max_side": 100}, "--max-side 1536 instead of 100"),
            ({"max_new_tokens": 9}, "--max-new-tokens 40 instead of 9"),
        ]:
            with pytest.raises(FingerprintError, match=difference):
                run(tmp_path, server, **changes)
        other.system_fingerprint = "fp_2"
        with pytest.raises(FingerprintError, match="system_fingerprint fp_1 instead of fp_2"):
            run(tmp_path, other)
    with (
        ModelServer(model="small-vlm") as third,
        pytest.raises(FingerprintError, match="served model tiny-vlm instead of small-vlm"),
    ):
        run(tmp_path, third, name="small-vlm")


def test_servers_of_two_models_are_refused() -> None:
    message = r"serves tiny-vlm \(system_fingerprint fp_1\), .* two models"
    with (
        ModelServer(system_fingerprint="fp_1") as first,
        ModelServer(system_fingerprint="fp_2") as second,
        pytest.raises(EndpointError, match=message),
    ):
        resolve(settings(first, second))


def test_the_only_model_of_a_server_need_not_be_named_and_a_wrong_one_is_answered_with_the_right() -> None:
    with ModelServer() as server:
        assert resolve(settings(server, name="")).name == "tiny-vlm"
        with pytest.raises(EndpointError, match="does not serve --model big-vlm; it serves tiny-vlm"):
            resolve(settings(server, name="big-vlm"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 3}, "--num-beams has no effect on an --endpoint"),
        ({"dtype": "bfloat16"}, "--dtype has no effect"),
        ({"quantize": "int8"}, "--quantize has no effect"),
        ({"endpoint": ["gpu1:8000"]}, "--endpoint gpu1:8000: give the URL"),
        ({"endpoint": ["http://user:secret@gpu1/v1"]}, "--endpoint http://gpu1: give a key in CAPTIONER_API_KEY"),
        ({"endpoint": ["http://gpu1/v1?api_key=secret"]}, "not in the URL"),
        ({"endpoint": ["http://gpu1/v1/chat/completions"]}, "leave out /chat/completions"),
        ({"endpoint": ["http://gpu1/v1/chat/completions/"]}, "leave out /chat/completions"),
        ({"endpoint": ["http://gpu1:abc/v1"]}, "--endpoint http://gpu1:abc/v1: Port could not be cast"),
        ({"endpoint": ["http://gpu1:99999/v1"]}, "such as http://HOST:8000/v1"),
        ({"endpoint": ["http://[::1/v1"]}, "--endpoint http://[::1/v1: Invalid IPv6 URL; give the URL"),
        ({"endpoint": ["http://256.1.1.1/v1"]}, "such as http://HOST:8000/v1"),
        ({"endpoint": ["http://gpu1:8000\\v1"]}, "such as http://HOST:8000/v1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve(settings(NO_PORT, **changes))

    assert message in str(refused.value)
    assert "secret" not in str(refused.value)


def test_servers_that_do_not_answer_at_the_start_are_named() -> None:
    with pytest.raises(EndpointError, match=rf"no --endpoint answers: {NO_PORT}: no connection"):
        resolve(settings(NO_PORT))


# The key


def test_the_key_is_sent_to_servers_and_is_in_no_file_and_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "images", 4)
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    monkeypatch.setenv("CAPTIONER_API_KEY", "sk-secret-1")
    with ModelServer(key="sk-secret-1") as server:
        echoed = failing(400, "cannot do that with Bearer sk-secret-1")
        server.rule = first_image(echoed)
        assert run(tmp_path, server) == 0
        server.key = "sk-other"
        with pytest.raises(EndpointError, match="the key is refused") as refused:
            run(tmp_path, server)

    assert {asked.headers["Authorization"] for asked in server.asked} == {"Bearer sk-secret-1"}
    texts = [str(refused.value), repr(load(resolve_again(server))), *capfd.readouterr()]
    texts += [str(row["error_message"]) for row in rows_of(tmp_path / "out")]
    files = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any("cannot do that with Bearer ***" in text for text in texts)
    assert not any("sk-secret-1" in text for text in texts)
    assert not any(b"sk-secret-1" in data for data in files)


def resolve_again(server: ModelServer) -> Any:
    with ModelServer(key="sk-secret-1") as other:
        return resolve(settings(other))


def test_a_key_with_a_line_break_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk\nsecret")
    with pytest.raises(UsageError, match="OPENAI_API_KEY: holds characters that no key has") as refused:
        resolve(settings(NO_PORT))

    assert "secret" not in str(refused.value)


# Speed


def test_all_that_concurrency_allows_is_under_way(tmp_path: Path) -> None:
    """Also where a chunk ends and the next begins: the server is held until all are there."""
    make_folder(tmp_path / "images", 40)
    full = threading.Event()
    with ModelServer() as server:
        server.rule = lambda asked: Answer(held=full) if asked.number <= 24 else None
        captioning = threading.Thread(target=run, args=(tmp_path, server), kwargs={"concurrency": 24})
        captioning.start()
        server.wait_for(24)
        full.set()
        captioning.join()

    assert server.most_at_once == 24
    assert len(rows_of(tmp_path / "out")) == 40


def test_a_run_that_stops_breaks_off_its_requests(tmp_path: Path) -> None:
    """Chunks of 16 images: three answers of the second never come, and one of the third is of another model."""
    never = threading.Event()

    def rule(asked: Request) -> Answer | None:
        waits = asked.number in (17, 18, 19) or asked.number > 36
        return Answer(held=never) if waits else ANOTHER_MODEL if asked.number == 36 else None

    archive = make_folder(tmp_path / "archive", 60)
    model = {"name": "tiny-vlm", "concurrency": 4}
    with ModelServer(rule) as server:
        config = caption_config(archive, tmp_path / "out", model={**model, "endpoint": [server.url]}, cluster=LOCAL)
        with pytest.raises(EndpointError, match="the answers now come from model 'another'"):
            pipeline.run(config)
        assert len(server.asked) <= 37
        never.set()
        server.rule = lambda asked: None
        assert pipeline.run(config) == 0


def test_a_run_waits_for_a_server_that_is_gone_and_goes_on_when_it_is_back() -> None:
    lines: list[str] = []
    gone = threading.Event()

    def notify(line: str) -> None:
        lines.append(line)
        gone.set()

    with ModelServer() as server:
        port = int(server.url.split(":")[2].split("/")[0])
        captioner = load(resolve(settings(server), notify=ignore), notify=notify)
        first = captioner.caption(pictures(8))
    results: list[Captions] = []
    captioning = threading.Thread(target=lambda: results.append(captioner.caption(pictures(8))))
    captioning.start()
    assert gone.wait(60)
    with ModelServer(port=port):
        captioning.join()

    assert results[0].texts == first.texts
    assert "does not answer" in lines[0]
    assert lines[-1].endswith("answers again")
