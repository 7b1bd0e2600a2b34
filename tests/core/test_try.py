"""`captioner try`: captions of several models beside each other, on the terminal and as a page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from captioner.config import ModelConfig
from captioner.console.trying import _measured_memory, try_images
from captioner.errors import ERROR, OK, TOO_MANY_FAILED, ModelError, UsageError
from captioner.models import resolve
from captioner.testing import make_folder, make_tiny_model
from captioner.testing.model_server import ModelServer, failing

FAKE = ModelConfig(name="fake")


@pytest.fixture
def image(tmp_path: Path) -> str:
    make_folder(tmp_path / "images", 1)
    return str(next((tmp_path / "images").glob("*.*g")))


@pytest.fixture
def unloadable(tmp_path: Path) -> ModelConfig:
    """Return a model whose files can be read but whose tensors do not fit its config.json."""
    directory = make_tiny_model("git", tmp_path / "git")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    return ModelConfig(name=str(directory))


def test_models_are_compared_image_by_image(image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "<b>.jpg"
    damaged.write_bytes(b"no image")
    page = tmp_path / "models.html"
    models = [FAKE.model_copy(update={"prompt": prompt}) for prompt in ("a <i>", "two")]

    assert try_images([image, str(damaged)], models, str(page)) == OK

    printed = capsys.readouterr().out
    assert printed.index(image) < printed.index("a <i>") < printed.index("two") < printed.index("<b>.jpg")
    assert printed.count("not_an_image") == 2
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["model", "fake", "fake"]
    html = page.read_text()
    assert html.count("data:image/jpeg;base64") == 1
    assert "a &lt;i&gt; " in html
    assert "<i>" not in html
    assert "<b>" not in html


def test_an_image_may_be_a_file_uri_or_in_the_home_folder(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(image).parent))

    assert try_images([f"file://{image}"], [FAKE]) == OK
    assert try_images([f"~/{Path(image).name}"], [FAKE]) == OK


def test_every_model_answers_all_questions_on_the_terminal_and_on_the_page(
    image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, questions = tmp_path / "models.html", tmp_path / "questions.yaml"
    questions.write_text(
        "caption: {prompt: Describe}\ntags: {prompt: a <i>}\nnumber: {prompt: One, schema: {type: integer}}"
    )
    model = FAKE.model_copy(update={"questions": str(questions)})
    sampled = model.model_copy(update={"temperature": 1.0, "num_captions": 2})

    assert try_images([image], [model, sampled], str(page)) == OK

    printed = capsys.readouterr().out
    assert printed.count("tags: a <i> ") == 2
    assert printed.count("number_error: is not JSON") == 2
    assert printed.count("captions: Describe ") == 2  # of the model that samples
    html = page.read_text()
    assert html.count("tags</span> a &lt;i&gt; ") == 2
    assert html.count("number_error</span> is not JSON") == 2


def check_others_are_left(image: str, failed: ModelConfig, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert try_images([image], [failed, FAKE]) == ERROR

    printed = " ".join(capsys.readouterr().out.split())
    assert reason in printed
    assert "picture" in printed
    with pytest.raises(ModelError, match=reason):
        try_images([image], [failed])


def test_a_model_that_cannot_be_loaded_leaves_the_others(
    image: str, unloadable: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    check_others_are_left(image, unloadable, "tensors do not fit config.json", capsys)


def test_a_model_that_fails_while_it_captions_leaves_the_others(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    with ModelServer(lambda request: failing(401, "the key has expired")) as server:
        check_others_are_left(
            image, ModelConfig(name=server.model, endpoint=[server.url]), "the key has expired", capsys
        )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_the_memory_of_a_model_does_not_depend_on_those_before_it() -> None:
    """Pieces that are freed stay with the C library while a later piece is in use."""
    ref, peaks, kept = resolve(ModelConfig(name="starter")), [], []
    for _ in range(2):
        peak_bytes = _measured_memory(ref, "cpu")
        pieces = [b"x" * num_bytes for num_bytes in range(10_000, 15_000)]
        peaks.append(peak_bytes())
        kept.append(pieces.pop())
        del pieces

    assert min(peaks) > 0.9 * sum(range(10_000, 15_000))


def test_a_caption_without_text_and_a_narrow_terminal_leave_the_names_of_models(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = make_tiny_model("git", tmp_path / "a-model-that-always-ends-at-once")
    settings = json.loads((mute / "generation_config.json").read_text())
    (mute / "generation_config.json").write_text(json.dumps(settings | {"forced_eos_token_id": 2}))
    model = ModelConfig(name=str(mute), max_new_tokens=1)

    for columns, shown in (("120", "always-ends-at-once  (empty)\n"), ("30", "always-ends-at-once\n    (empty)\n")):
        monkeypatch.setenv("COLUMNS", columns)
        try_images([image], [FAKE, model])

        assert shown in capsys.readouterr().out


def test_what_can_be_known_is_said_before_a_model_is_loaded(image: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its folder does not exist"):
        try_images([image], [FAKE], str(tmp_path / "no" / "models.html"))
    for page in ("", str(tmp_path)):
        with pytest.raises(UsageError, match=f"--page {page}: is no file"):
            try_images([image], [FAKE], page)
    for uri in ("https://host/a.jpg", "s3://bucket/a.jpg"):
        with pytest.raises(UsageError, match=f"{uri}: is not on a local disk"):
            try_images([image, uri], [FAKE])
    with pytest.raises(ModelError, match="no such directory"):
        try_images([image], [FAKE, ModelConfig(name=str(tmp_path / "no"))])
    assert try_images([str(tmp_path / "no.jpg")], [FAKE, FAKE]) == TOO_MANY_FAILED
