"""The example runs: `captioner demo` captions rendered scenes, `demo train` trains, `demo server` loses its server."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from captioner.config import CaptionConfig, TrainConfig
from captioner.console.stopping import notify
from captioner.console.text import counted, printable
from captioner.errors import UsageError

IMAGES, SEED = 2_000, 3
SERVED_IMAGES, REST_S = 30, 5.0
QUESTIONS = """\
# What `captioner demo server` asks about each image. The tiny model has random weights: its answers mean nothing, and
# those that are too long for the schema are asked for once more, then failed with the reason.
caption:
  prompt: Describe the image in one sentence.
shape:
  prompt: Which shape is in the image?
  schema: {type: string, maxLength: 20}
"""


def caption(directory: Path, count: int, is_local: bool) -> int:
    """Render `count` scenes into DIR/archive, caption them into DIR/captions with the starter model, check the table.

    Again in the same directory it goes on where it was stopped. `is_local`: without Ray.
    """
    from captioner import pipeline
    from captioner.console import commands
    from ray_jobs import caption

    images, out = directory / "archive", directory / "captions"
    if _render_once(images, count):
        print(f"rendered {counted(count, 'scene')} into {printable(images)}", flush=True)
    config = CaptionConfig.model_validate(
        {
            "source": {"path": str(images)},
            "model": {"name": "starter"},
            "cluster": {"local": is_local},
            "output": {"path": str(out)},
        }
    )
    code = pipeline.run(config) if is_local else caption.run(config)
    return code or commands.check(str(out), config.check)


def train(directory: Path) -> int:
    """Render posters into DIR/images, train on them with two workers and print the WER before and after.

    The posters are those of `captioner.starter.scenes`.
    """
    from ray_jobs import train

    images, out = directory / "images", directory / "run"
    _render_once(images, IMAGES, SEED, width=64, family="poster")
    config = demo_config(images, out)
    code = train.run(config)
    measured = json.loads((out / "train.json").read_text(encoding="utf-8"))
    before, after = measured["before"]["wer"], measured["measured"]["eval"]["wer"]
    print(f"WER {before:.3f} before, {after:.3f} after {config.training.max_steps} steps", flush=True)
    print(f"see {out}/report.html", file=sys.stderr)
    return code


def _render_once(images: Path, count: int, seed: int = 0, **options: Any) -> bool:
    """Render scenes where an earlier run did not, and return whether it did now. `options`: of `render_scenes`.

    Raises UsageError where that was another number of scenes.
    """
    from captioner.starter.render import render_scenes

    if images.exists():
        number = sum(1 for _ in (images / "images").glob("*.png"))
        if number != count:
            raise UsageError(f"{images} holds {counted(number, 'scene')}, not {count:,}; remove {images.parent} first")
        return False
    rendering = images.with_name(f"{images.name}.part")  # a demo that is stopped leaves no part of the scenes as all
    shutil.rmtree(rendering, ignore_errors=True)
    render_scenes(rendering, count, seed, **options)
    rendering.rename(images)
    return True


def demo_config(images: Path, out: Path) -> TrainConfig:
    """Return settings for a run of about two minutes on two cores."""
    return TrainConfig.model_validate(
        {
            "data": {"path": str(images), "max_eval_samples": 100},
            "model": {"name": "starter"},
            "cluster": {"num_workers": 2, "gpus_per_worker": 0},
            "training": {
                "max_steps": 220,
                "per_device_train_batch_size": 16,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 10,
                "eval_steps": 110,
            },
            "output": {"path": str(out)},
        }
    )


def server(directory: Path) -> int:
    """Ask `transformers serve` two questions about scenes; kill it half-way, start it again, verify the table.

    The model has random weights: its answers mean nothing. Raises UsageError where the server's packages are missing.
    """
    from captioner import pipeline
    from captioner.console import commands
    from captioner.testing import make_tiny_model

    if not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")):
        raise UsageError("demo server: fastapi, uvicorn or openai is missing; pip install 'captioner[demo-server]'")
    images, model, out = directory / "images", directory / "model", directory / "captions"
    _render_once(images, SERVED_IMAGES, SEED, width=64)
    (directory / "questions.yaml").write_text(QUESTIONS, encoding="utf-8")
    if not (model / "config.json").exists():
        make_tiny_model("smolvlm", model)
    with DemoServer(model) as served:
        threading.Thread(target=served.fail_once, args=(SERVED_IMAGES,), daemon=True).start()
        config = served_config(images, out, model, served.url, directory / "questions.yaml")
        code = pipeline.run(config)
    return code or commands.verify(str(out))


def served_config(images: Path, out: Path, model: Path, url: str, questions: Path) -> CaptionConfig:
    """Return settings for a run of half a minute."""
    served = {
        "name": str(model),
        "endpoint": [url],
        "concurrency": 2,
        "max_new_tokens": 12,
        "questions": str(questions),
    }
    return CaptionConfig.model_validate(
        {
            "source": {"path": str(images)},
            "model": served,
            "cluster": {"local": True},
            "output": {"path": str(out), "overwrite": True},
        }
    )


class DemoServer:
    """`transformers serve` on a free port of this machine. A context manager."""

    def __init__(self, model: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self._model = model
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> DemoServer:
        self._start()
        self._wait_for("Uvicorn running", 1)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def fail_once(self, after: int) -> None:
        """Kill the server after some answers, start it again a few seconds later and read its log to the end."""
        self._wait_for('" 200', after)
        notify(f"demo: the server is killed after {after} answers")
        self._process.kill()
        self._process.wait()
        time.sleep(REST_S)
        notify("demo: the server is started again")
        self._start()
        self._wait_for("no such line", 1)

    def _start(self) -> None:
        program = str(Path(sys.executable).with_name("transformers"))
        command = [program, "serve", str(self._model), "--device", "cpu", "--host", "127.0.0.1"]
        self._process = subprocess.Popen(
            [*command, "--port", str(self._port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def _wait_for(self, text: str, count: int) -> None:
        """Read the server's log until that many lines hold the text, or to its end."""
        for line in self._process.stdout or ():
            count -= text in line
            if not count:
                return
