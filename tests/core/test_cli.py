"""The command line: what it accepts, what it calls, and that whatever is wrong is one line and an exit code."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

import captioner.console.commands
import captioner.console.trying
import captioner.pipeline
import captioner.starter.render
from captioner.config import CaptionConfig, Setting, command_line, load_config, settings_of
from captioner.errors import EXIT_CODES, CaptionerError, InterruptedRunError, SourceError, TerminatedRunError
from captioner.errors import TooManyFailedError as TooMany
from captioner.run.record import state_after
from captioner.testing import make_folder
from ray_jobs.cli import app, main

FLAGS = [setting for setting in settings_of(CaptionConfig) if not setting.argument]


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[CaptionConfig]:
    """The settings that `caption --local` was called with; nothing is captioned."""
    seen: list[CaptionConfig] = []

    def run(config: CaptionConfig) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(captioner.pipeline, "run", run)
    return seen


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `caption --local` end with an exception."""

    def fail_with(error: BaseException) -> None:
        def run(config: CaptionConfig) -> int:
            raise error

        monkeypatch.setattr(captioner.pipeline, "run", run)

    return fail_with


def example(setting: Setting) -> tuple[list[str], object]:
    """Words for the command line that are not the default, and the value they mean."""
    examples: dict[str, tuple[list[str], object]] = {
        "device": (["mps"], "mps"),
        "dtype": (["bfloat16"], "bfloat16"),
        "quantize": (["int8"], "int8"),
        "preprocess": (["processor"], "processor"),
        "take_as": (["folder"], "folder"),
        "pages": (["all"], "all"),
        "keep_columns": (["a, b"], ["a", "b"]),
        "references_columns": (["a, b"], ["a", "b"]),
        "decode_timeout": (["2.5"], 2.5),
        "max_failed": (["0.25"], 0.25),
        "gpus_per_worker": (["0.5"], 0.5),
        "max_wer": (["0.5"], 0.5),
        "temperature": (["0.5"], 0.5),
        "top_p": (["0.5"], 0.5),
        "min_lift": (["0.5"], 0.5),
        "max_flagged": (["0.5"], 0.5),
        "min_right": (["0.5"], 0.5),
        "max_side": (["512"], 512),
        "request_timeout": (["0.5"], 0.5),
        "endpoint_timeout": (["0.5"], 0.5),
        "price_in": (["0.5"], 0.5),
        "price_out": (["0.5"], 0.5),
    }
    annotation = str(setting.info.annotation)
    if setting.field in examples:
        words, value = examples[setting.field]
    elif setting.info.annotation is bool:
        return [setting.flag], True
    elif "list" in annotation:
        return [setting.flag, "*.jpg", setting.flag, "b,c"], ["*.jpg", "b,c"]
    elif "int" in annotation:
        words, value = ["7"], 7
    else:
        words, value = ["text"], "text"
    return [setting.flag, *words], value


@pytest.mark.parametrize("setting", FLAGS, ids=lambda setting: setting.flag)
def test_every_setting_has_its_flag(setting: Setting, configs: list[CaptionConfig]) -> None:
    words, value = example(setting)

    assert exit_code("caption", "in", "out", "--local", *words) == 0
    assert getattr(getattr(configs[0], setting.group), setting.field) == value


def test_every_flag_of_help_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("caption", "--help-all") == 0

    shown = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown == {setting.flag for setting in FLAGS} | {
        "--config",
        "--set",
        "--print-config",
        "--log-format",
        "--help",
        "--help-all",
    }


def test_no_two_flags_of_a_command_have_one_name() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        flags = [flag for param in command.params for flag in param.opts]
        assert len(flags) == len(set(flags)), name


def test_help_shows_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code("caption", "--help-all")

    shown = " ".join(capsys.readouterr().out.split())
    assert "--dtype auto|float32|bfloat16|float16 " in shown
    assert "--max-new-tokens N Longest caption, in tokens. [default: 40]" in shown
    assert "--batch-size N|auto Images for each forward pass. [default: auto]" in shown


def test_a_setting_that_is_not_given_is_left_to_the_file(tmp_path: Path, configs: list[CaptionConfig]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "source: {path: in, limit: 5}\nmodel: {name: starter, num_beams: 3}\noutput: {path: out, extend: true}\n"
    )

    assert exit_code("caption", "--config", str(file), "--local", "--limit", "9") == 0

    [config] = configs
    assert (config.source.path, config.output.path, config.output.extend) == ("in", "out", True)
    assert (config.model.num_beams, config.source.limit) == (3, 9)


def test_a_text_may_be_given_empty(tmp_path: Path, configs: list[CaptionConfig]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {prompt: a photo of}\n")

    exit_code("caption", "in", "out", "--local", "--config", str(file), "--prompt", "")

    assert configs[0].model.prompt == ""


settings_trees = st.fixed_dictionaries(
    {
        "source": st.fixed_dictionaries(
            {
                "path": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map("./".__add__),
                "include": st.lists(st.text(max_size=5), max_size=3),
                "keep_columns": st.lists(st.sampled_from(["a", "b c", "d-e", "a,b", " f"]), max_size=3),
                "limit": st.none() | st.integers(1, 10**12),
            }
        ),
        "model": st.fixed_dictionaries(
            {
                "name": st.sampled_from(["starter", "microsoft/git-base", "s3://bucket/a model"]),
                "batch_size": st.just("auto") | st.integers(1, 512),
                "prompt": st.none() | st.text(max_size=5),
            }
        ),
        "cluster": st.just({"local": True}),
        "output": st.fixed_dictionaries({"path": st.just("out"), "max_failed": st.floats(0, 1)}),
    }
)


@settings(max_examples=30, deadline=None)
@given(settings_trees)
def test_the_command_line_of_settings_makes_the_same_settings(tree: dict[str, Any]) -> None:
    seen: list[CaptionConfig] = []
    config = load_config(CaptionConfig, None, tree)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(captioner.pipeline, "run", seen.append)
        assert exit_code("caption", *command_line(config)) == 0

    assert seen == [config]


CLIP = ["judge", "out", "--model", "clip"]
SERVER = ["judge", "out", "--model", "m", "--endpoint", "http://127.0.0.1:9/v1"]
LOCAL = ["caption", "a", "b", "--model", "fake", "--local"]
ESTIMATE, IMAGES = ["estimate", "a", "--model", "fake"], ["estimate", "--images", "9"]


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (CLIP, ["--sample", "100"], "has no effect without --endpoint; leave it out"),
        (CLIP, ["--concurrency", "8"], "has no effect without --endpoint"),
        (CLIP, ["--price-out", "0.5"], "has no effect without --endpoint"),
        (CLIP, ["--gpus-per-worker", "2"], "a CLIP or SigLIP model fits one GPU; give 1"),
        ([*CLIP, "--local"], ["--num-workers", "2"], "has no effect with --local; leave it out"),
        ([*CLIP, "--local"], ["--gpus-per-worker", "0.5"], "has no effect with --local"),
        (SERVER, ["--revision", "main"], "has no effect with --endpoint; leave it out"),
        (SERVER, ["--batch-size", "8"], "has no effect with --endpoint"),
        (SERVER, ["--num-others", "8"], "has no effect with --endpoint"),
        (SERVER, ["--references-columns", "a,b"], "has no effect with --endpoint"),
        (SERVER, ["--gpus-per-worker", "2"], "an --endpoint holds the model"),
        ([*SERVER, "--local"], ["--address", "head:6379"], "has no effect with --local"),
        (LOCAL, ["--address", "head:6379"], "has no effect with --local; leave it out"),
        (LOCAL, ["--num-workers", "2"], "has no effect with --local"),
        (LOCAL, ["--decode-cpus", "2"], "has no effect with --local"),
        (LOCAL, ["--gpus-per-worker", "0.5"], "has no effect with --local"),
        (LOCAL, ["--max-side", "512"], "has no effect without --endpoint; leave it out"),
        (["caption", "a", "b", "--model", "fake"], ["--concurrency", "8"], "has no effect without --endpoint"),
        (["try", "a.png", "--model", "fake"], ["--request-timeout", "2.5"], "has no effect without --endpoint"),
        (["doctor"], ["--endpoint-timeout", "2.5"], "has no effect without --endpoint"),
        (["doctor"], ["--local"], "doctor checks the nodes of a Ray cluster"),
        (ESTIMATE, ["--local"], "estimate measures workers on Ray"),
        (ESTIMATE, ["--price-in", "0.5"], "has no effect without --endpoint"),
        (ESTIMATE, ["--gpus", "8"], "has no effect without --images; leave it out"),
        (ESTIMATE, ["--gpu", "h100"], "has no effect without --images"),
        (ESTIMATE, ["--cpus-per-gpu", "8"], "has no effect without --images"),
        (IMAGES, ["--model", "fake"], "has no effect with --images; leave it out"),
        (IMAGES, ["--sample", "64"], "has no effect with --images"),
        (IMAGES, ["--seed", "1"], "has no effect with --images"),
        (IMAGES, ["--sample-seed", "1"], "has no effect with --images"),
        (IMAGES, ["--num-workers", "2"], "has no effect with --images"),
    ],
)
def test_a_flag_without_meaning_is_refused_before_any_work(
    command: list[str],
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where neither source nor table is

    assert exit_code(*command, *flags) == 1

    assert capsys.readouterr().err.startswith(f"captioner: error: {' '.join(flags)}: {message}")


@pytest.mark.parametrize(
    "words",
    [
        [*LOCAL, "--num-workers", "auto", "--max-side", "1536", "--concurrency", "32"],
        [*LOCAL, "--gpus-per-worker", "2"],
        [*CLIP, "--sample", "500"],
        [*CLIP, "--gpus-per-worker", "0.5"],
    ],
)
def test_a_flag_at_its_default_and_one_with_meaning_pass(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert exit_code(*words) == 1

    assert "has no effect" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["caption", "--modle", "x"], ["--modle; did you mean --model? See captioner caption --help"]),
        (["caption", "a", "b", "--batchsize", "8"], ["--batchsize; did you mean --batch-size?"]),
        (["caption", "a", "b", "--dry-run"], ["--dry-run; did you mean --plan-only?"]),
        (["caption", "a", "-o", "b"], ["-o; OUT is given without a flag; see captioner caption --help"]),
        (["caption", "my", "photos", "out"], ["(out); put paths with spaces in quotes; see captioner caption"]),
        (["--model", "starter", "caption", "a", "b"], ["flags stand after the command: captioner caption ... --model"]),
        (["caption", "no such folder/", "b", "--local"], ["no such folder/: no such file or directory"]),
        (["check", "a", "--frobnicate"], ["--frobnicate; see captioner check --help"]),
        (["capton"], ["capton", "Did you mean 'caption'? See captioner --help"]),
        (["caption", "a", "b", "c"], ["c"]),
        (["caption", "a", "b", "--model"], ["--model"]),
        (["caption", "a", "b", "--overwrite=3"], ["--overwrite"]),
        (["caption", "a", "b", "--batch-size", "many"], ["--batch-size", "'many'", "integer", "'auto'"]),
        (["caption", "a", "b", "--num-beams", "0"], ["--num-beams", "'0'", "greater"]),
        (["caption", "a", "b", "--dtype", "float8"], ["--dtype", "'float8'", "'bfloat16'"]),
        (["caption", "--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["try", "--model", "starter"], ["IMAGE"]),
        (["try", "a.jpg", "--num-workers", "2"], ["--num-workers"]),
        (["verify"], ["OUT"]),
        (["status", "a", "b"], ["b"]),
        (["render-scenes", "dir"], ["--count"]),
        (["render-scenes", "dir", "--count", "0"], ["--count", "1"]),
        (["render-scenes", "dir", "--count", "1", "--format", "zip"], ["--format", "zip", "webdataset"]),
        (["--nope"], ["--nope"]),
        (["caption", "a", "b", "--model", "x", "--\x1b[2Jred"], ["[2Jred"]),
        (["train", "a", "b", "--gpus-per-worker", "1.5"], ["--gpus-per-worker '1.5'", "a whole number"]),
        (["caption", "a", "b", "--retry-failed", "--plan-only"], ["--retry-failed and --plan-only exclude each other"]),
        (["caption", "a", "b", "--stop-early"], ["--stop-early: has no effect without --max-wer; add that"]),
    ],
)
def test_a_usage_error_is_one_line_and_exit_1(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*words) == 1

    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"captioner: error: [^\n\x1b]+\n", shown.err)
    assert [part for part in parts if part not in shown.err] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SourceError("no such folder: photos"), 1),
        (TooMany("too many"), 2),
        (InterruptedRunError("stopped"), 130),
        (TerminatedRunError("stopped"), 143),
        (CaptionerError("two\nlines \x1b[31m"), 1),
    ],
)
def test_an_error_of_the_run_is_one_line_and_its_exit_code(
    error: CaptionerError, code: int, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)

    assert exit_code("caption", "in", "out", "--local") == code
    assert re.fullmatch(r"captioner: error: [^\n\x1b]+\n", capsys.readouterr().err)


def test_ctrl_c_anywhere_is_130(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())

    assert exit_code("caption", "in", "out", "--local") == 130
    assert capsys.readouterr().err == "captioner: error: stopped by Ctrl-C\n"


def test_ctrl_c_while_an_error_is_reported_is_130_without_a_traceback(tmp_path: Path) -> None:
    code = f"""
import os, signal
from ray_jobs import cli
cli.printable = lambda text: os.kill(os.getpid(), signal.SIGINT)
cli.main(["caption", {str(tmp_path / "nowhere")!r}, {str(tmp_path / "out")!r}, "--local"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_ctrl_c_during_the_imports_is_130_without_a_traceback() -> None:
    code = """
import os, signal, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "pydantic":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from ray_jobs.entry import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "captioner: error: stopped by Ctrl-C\n")


LOST_STOP = """
import os, signal, sys, time
from captioner import pipeline
from captioner.console.stopping import stoppable
from ray_jobs import cli

class Signalled:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        sum(range(100))  # Python runs the handler here

def run(config):
    with stoppable("progress is saved in OUT"):
        lost = [Signalled(), Signalled()]
        {ending}
        time.sleep(60)

pipeline.run = run
cli.main(["caption", "in", "out", "--local"])
"""
STOPPED = "captioner: error: stopped by {}; progress is saved in OUT; run the same command to continue\n"


@pytest.mark.parametrize(
    ("name", "ending", "code", "error"),
    [
        ("SIGINT", "lost.pop()", 130, STOPPED.format("Ctrl-C")),
        ("SIGTERM", "lost.clear()", 143, STOPPED.format("SIGTERM")),
        ("SIGINT", "lost.clear()", 130, ""),  # pressed twice: at once
    ],
)
def test_a_stop_that_comes_while_an_object_is_destroyed_is_not_lost(
    name: str, ending: str, code: int, error: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOST_STOP.format(name=name, ending=ending)], capture_output=True, text=True, timeout=50
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", error)


def test_ctrl_c_at_the_very_end_leaves_the_exit_code() -> None:
    """While Python unloads its modules: their objects are destroyed last."""
    code = """
import os, signal, sys
from captioner import pipeline
from ray_jobs import cli

class Last:
    def __init__(self):
        self.kill, self.arguments = os.kill, (os.getpid(), signal.SIGINT)
    def __del__(self):
        self.kill(*self.arguments)

sys.modules["last"] = Last()  # nothing refers to it but this
pipeline.run = lambda config: 5
cli.main(["caption", "in", "out", "--local"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (ended.returncode, ended.stdout, ended.stderr) == (5, "", "")


def test_a_connection_of_a_store_that_breaks_is_one_line(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))

    assert exit_code("caption", "in", "out", "--local") == 1
    assert capsys.readouterr().err == (
        "captioner: error: a connection broke: [Errno 32] Broken pipe; run the same command again\n"
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("ending", ["", ", flush=True"])
def test_an_output_that_takes_no_more_is_one_line_and_one_that_is_closed_none(ending: str, unbuffered: str) -> None:
    """Whether the text is written at once or kept until the end."""
    code = f"""
from captioner.console import commands
from ray_jobs import cli
commands.verify = lambda out: print("proven"{ending})
cli.main(["verify", "out"])
"""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reader, closed = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(closed, "w") as pipe:
        ended = [
            subprocess.run(
                [sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, text=True, env=environment
            )
            for output in (full, pipe)
        ]

    assert [end.returncode for end in ended] == [1, 1]
    assert re.fullmatch(r"captioner: error: .*No space left on device; free space, .*\n", ended[0].stderr)
    assert ended[1].stderr == ""


def test_a_defect_keeps_its_traceback(failing: Any) -> None:
    failing(ZeroDivisionError("a defect"))

    with pytest.raises(ZeroDivisionError):
        main(["caption", "in", "out", "--local"])


def test_the_exit_code_of_a_command_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioner.pipeline, "run", lambda config: 2)

    assert exit_code("caption", "in", "out", "--local") == 2


def test_render_scenes_calls_the_renderer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(captioner.starter.render, "render_scenes", lambda *given: calls.append(given))

    assert exit_code("render-scenes", "dir", "--count", "12", "--seed", "3", "--format", "parquet") == 0
    assert calls == [(Path("dir"), 12, 3, "parquet")]
    assert "12 scenes" in capsys.readouterr().out


def test_try_takes_images_and_the_flags_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], list[tuple[str, int]]]] = []

    def try_images(paths: list[str], models: Any, page: str | None) -> int:
        calls.append((paths, [(model.name, model.num_beams) for model in models]))
        return 0

    monkeypatch.setattr("captioner.console.trying.try_images", try_images)

    assert exit_code("try", "a.jpg", "b.jpg", "--model", "starter", "--num-beams", "3") == 0
    assert exit_code("try", "a.jpg", "--model", "starter", "--model", "models/git") == 0
    assert exit_code("try", "a.jpg", "--set", "model.name=starter") == 0
    assert calls == [
        (["a.jpg", "b.jpg"], [("starter", 3)]),
        (["a.jpg"], [("starter", 1), ("models/git", 1)]),
        (["a.jpg"], [("starter", 1)]),
    ]


@pytest.mark.parametrize("command", ["verify", "status"])
def test_verify_and_status_take_the_table(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(out: str) -> int:
        seen.append(out)
        return 0

    monkeypatch.setattr(captioner.console.commands, command, run)

    assert exit_code(command, "s3://bucket/out") == 0
    assert seen == ["s3://bucket/out"]


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_lists_commands_and_exit_codes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*words) == 0

    shown = capsys.readouterr().out
    assert [
        name for name in ("caption", "try", "verify", "status", "render-scenes") if f"\n  {name} " not in shown
    ] == []
    for code, meaning in EXIT_CODES.items():
        assert f" {code} {meaning} " in " ".join([*shown.split(), ""])
    assert "..." not in shown.replace("[ARGS]...", ""), "a description is cut off"


@pytest.mark.parametrize(
    "command", ["caption", "try", "verify", "status", "render-scenes", "submit", "doctor", "estimate"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command, "--help") == 0
    assert f"Usage: captioner {command} " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert re.fullmatch(r"captioner \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ray_jobs.cli import main\n"
        "try: main(['caption', '--help'])\nexcept SystemExit: pass\n"
        "heavy = ['ray', 'torch', 'transformers', 'datasets', 'evaluate', 'pyarrow', 'numpy', 'PIL']\n"
        "print([name for name in heavy if name in sys.modules])"
    )

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("foo://x/y", "unknown URI scheme foo"),
        ("ftp://head.invalid/y", "cannot be opened: "),
        ("github://x", "cannot be opened: "),  # raises TypeError
        ("hdfs://head.invalid/y", "cannot be opened: "),
    ],
)
def test_a_uri_that_cannot_be_opened_is_one_line_wherever_it_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], uri: str, message: str
) -> None:
    images, out = str(make_folder(tmp_path / "images", 1)), str(tmp_path / "out")
    for words in (
        ["caption", uri, out, "--model", "fake"],
        ["caption", images, uri, "--model", "fake"],
        ["caption", images, out, "--model", uri],
        ["caption", images, out, "--model", "fake", "--references", f"{uri}.json"],
        ["train", uri, out, "--model", "starter"],
        ["verify", uri],
    ):
        assert exit_code(*words) == 1, words
        assert message in capsys.readouterr().err, words


def test_verify_says_what_is_left_of_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["caption", str(make_folder(tmp_path / "images", 1)), str(tmp_path / "out"), "--model", "fake", "--local"]
    assert exit_code(*words, "--plan-only") == 0
    assert exit_code("verify", str(tmp_path / "out")) == 1

    shown = capsys.readouterr()
    assert "incomplete: 0 of 1 row; none missing or duplicated so far" in shown.out
    assert "1 image left; run the same command to continue" in shown.err
    assert exit_code(*words) == exit_code("verify", str(tmp_path / "out")) == 0
    assert "proven: 1 planned image, each with one row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
        (InterruptedRunError("stopped by Ctrl-C; progress is saved in OUT; run ..."), "stopped by Ctrl-C"),
        (TerminatedRunError("stopped by SIGTERM; progress is saved in OUT"), "stopped by SIGTERM"),
        (SourceError("the disk is gone; mount it"), "stopped: the disk is gone; mount it"),
        (MemoryError(), "stopped: MemoryError"),
    ],
)
def test_the_state_of_a_run_that_ended_says_why(error: BaseException, state: str) -> None:
    assert state_after(error) == state


def test_exchanged_paths_and_an_archive_that_is_not_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = make_folder(tmp_path / "my photos", 1)
    (tmp_path / "photos.ZIP").write_bytes(b"PK")
    fake = ("--model", "fake", "--local")

    assert exit_code("caption", str(photos), str(photos), *fake) == 1
    assert "give another OUT (SOURCE stands before OUT)" in capsys.readouterr().err
    assert exit_code("caption", str(tmp_path / "photos.ZIP"), str(tmp_path / "out"), *fake) == 1
    assert "unpack it and give the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["caption", "museum/photso", "new"], "museum/photos"),
        (["caption", "musuem/photso/2020/", "new"], "museum/photos/2020"),
        (["caption", "photso", "new"], None),  # nothing near it where it was looked for
        (["caption", "museum/zebras", "new"], None),
        (["caption", "s3:/bucket/photos", "new"], "s3://bucket/photos"),
        (["check", "museum/table/captions"], "museum/table"),
        (["status", "museum/table/captions/part-00000.parquet"], "museum/table"),
        (["verify", "museum/tabel"], "museum/table"),
        (["report", "museum/photos"], None),  # it is there, and holds no table
    ],
)
def test_a_mistyped_path_names_what_it_may_have_meant(
    words: list[str],
    meant: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "museum/photos/2020").mkdir(parents=True)
    (tmp_path / "museum/table/captions").mkdir(parents=True)
    (tmp_path / "museum/table/table.json").write_text("{}")
    flags = ["--model", "starter", "--local"] if words[0] == "caption" else []

    assert exit_code(*words, *flags) == 1

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert (
        (f"did you mean {meant}?" in error or f"did you mean {tmp_path / meant}?" in error)
        if meant
        else ("did you mean" not in error)
    )
