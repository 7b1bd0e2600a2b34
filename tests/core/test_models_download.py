"""Models are downloaded from a hub (a small one, on this machine) and from a store."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

import captioner
from captioner.config import ModelConfig
from captioner.errors import ModelError
from captioner.models import load, resolve
from captioner.models.weights import TRAINING_IMAGES
from captioner.testing import make_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = make_tiny_model("git", tmp_path_factory.mktemp("model") / "tiny-git")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "consolidated.safetensors").write_bytes(b"the same weights in another format")
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    (directory / TRAINING_IMAGES).write_bytes(b"parquet")
    return directory


class Hub(BaseHTTPRequestHandler):
    """Serves one public model, someone/tiny, whose branch `main` and tag `v1` are COMMIT, like the hub."""

    directory: Path
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny"):
            self.answer_api(path.removeprefix("/api/models/someone/tiny"))
        elif path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
            self.answer_file(self.directory / path.rpartition("/")[2])
        else:
            self.send({"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"", 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer_api(self, rest: str) -> None:
        if rest.startswith("/revision/") and rest.rpartition("/")[2] not in ("main", "v1", COMMIT):
            return self.send({"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"", 404)
        paths = sorted(self.directory.iterdir())
        if rest.startswith("/tree/"):
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)} for f in paths]
            return self.send({}, json.dumps(files).encode())
        info = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in paths]}
        return self.send({}, json.dumps(info).encode())

    def answer_file(self, file: Path) -> None:
        self.send({"X-Repo-Commit": COMMIT, "ETag": f'"{etag(file)}"'}, file.read_bytes())

    def send(self, headers: dict[str, str], body: bytes, status: int = 200) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(model) -> Iterator[ThreadingHTTPServer]:
    handler = type("TestHub", (Hub,), {"directory": model, "requests": []})
    server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 64})(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


RESOLVE = """
import sys
from captioner.config import ModelConfig
from captioner.errors import ModelError
from captioner.models import resolve
try:
    ref = resolve(ModelConfig(name=sys.argv[1], revision=sys.argv[2] or None))
    print(ref.revision, ref.path)
except ModelError as error:
    print("ModelError", error)
"""


@pytest.fixture
def ask(hub, tmp_path):
    """Resolve a hub id in another process, because huggingface_hub reads the environment when imported."""

    def ask(name: str, revision: str = "", **variables: str) -> list[str]:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_ETAG_TIMEOUT": "300",  # by default 10 s, in which a busy machine may not answer
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",
        }
        environment |= variables
        command = [sys.executable, "-c", RESOLVE, name, revision]
        shown = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        # Without the lines about waiting, which a slow machine prints as well.
        return [line for line in shown.stdout.splitlines() if not line.endswith(" s so far")] or [shown.stderr]

    return ask


def test_a_hub_id_is_downloaded_once_and_its_branch_becomes_a_commit(ask, hub, tmp_path) -> None:
    first = ask("someone/tiny")
    downloads = len(hub.RequestHandlerClass.requests)
    second = ask("someone/tiny", "v1")
    offline = ask("someone/tiny", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")

    assert first[0].startswith(f"downloading someone/tiny at {COMMIT} from http://127.0.0.1")
    assert first[1].split()[0] == COMMIT
    assert second == offline == first[1:]
    assert downloads > 5
    assert len([r for r in hub.RequestHandlerClass.requests[downloads:] if "/resolve/" in r]) == 0
    names = {file.name for file in Path(first[1].split()[1]).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", TRAINING_IMAGES} <= names
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "modeling_evil.py"}


def test_a_model_the_hub_does_not_have_is_an_error_of_one_line(ask) -> None:
    (unknown,) = ask("someone/else")
    (revision,) = ask("someone/tiny", "nightly")
    (offline,) = ask("someone/tiny", HF_HUB_OFFLINE="1")
    (silent,) = ask("someone/tiny", HF_ENDPOINT="http://127.0.0.1:9")

    assert unknown.startswith("ModelError --model someone/else: no such directory, and no such model on the hub")
    assert revision == "ModelError --revision nightly: someone/tiny has no such branch, tag or commit"
    assert "HF_HUB_OFFLINE=1 forbids downloading it" in offline
    assert "the hub does not answer" in silent


@pytest.fixture
def store(model, tmp_path, monkeypatch) -> str:
    """Return the URI of the model in a store in this process's memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for file in model.iterdir():
        memory.pipe_file(f"/models/{tmp_path.name}/{file.name}", file.read_bytes())
    return f"memory://models/{tmp_path.name}"


def test_a_uri_is_copied_once(store, model, tmp_path) -> None:
    lines: list[str] = []

    first = resolve(ModelConfig(name=store), notify=lines.append)
    second = resolve(ModelConfig(name=store), notify=lines.append)

    assert len(lines) == 1
    assert lines[0].startswith(f"downloading {store} (0 MB) to {tmp_path}")
    assert first == second
    assert first.fingerprint == resolve(ModelConfig(name=str(model))).fingerprint
    assert (Path(first.path) / TRAINING_IMAGES).is_file()
    names = {file.name for file in Path(first.path).iterdir()}
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "modeling_evil.py"}
    assert [file.name for file in Path(first.path).parent.iterdir()] == [Path(first.path).name]


def test_a_changed_uri_is_copied_again(store, tmp_path) -> None:
    before = resolve(ModelConfig(name=store), notify=len)
    other = make_tiny_model("git", tmp_path / "other", seed=1)
    path = f"/models/{tmp_path.name}/model.safetensors"
    fsspec.filesystem("memory").pipe_file(path, (other / "model.safetensors").read_bytes())

    after = resolve(ModelConfig(name=store), notify=len)

    assert after.sha256 == resolve(ModelConfig(name=str(other))).sha256 != before.sha256


def test_a_machine_without_the_copy_downloads_it(store, tmp_path, monkeypatch) -> None:
    ref = resolve(ModelConfig(name=store), notify=len)
    Path(ref.path).rename(tmp_path / "gone")

    assert load(ref, device="cpu")


@pytest.mark.parametrize("uri", ["memory://models/nowhere", "nosuch://bucket/model"])
def test_a_uri_without_a_model_is_an_error_of_one_line(uri, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    with pytest.raises(ModelError) as raised:
        resolve(ModelConfig(name=uri))

    assert str(raised.value).startswith(f"--model {uri}: ")
    assert "\n" not in str(raised.value)


def test_a_file_uri_is_the_directory_itself(model) -> None:
    assert resolve(ModelConfig(name=f"file://{model}")).path == str(model)


def test_models_and_login_of_a_home_that_cannot_be_written_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TRITON_HOME")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    cache = tmp_path / ".cache/huggingface"
    (cache / "hub").mkdir(parents=True)
    (cache / "token").write_text("hf_x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    captioner._use_writable_caches()

    assert (os.environ["HF_HUB_CACHE"], os.environ["HF_TOKEN_PATH"]) == (str(cache / "hub"), str(cache / "token"))
    assert not os.environ["XDG_CACHE_HOME"].startswith(str(tmp_path))
