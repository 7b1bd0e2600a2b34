"""An OpenAI-compatible model server for tests, which misbehaves on order.

    with ModelServer(lambda request: too_many_requests(5) if request.number == 3 else None) as server:
        captioner caption images/ out/ --endpoint {server.url} --model {server.model}

`python -m captioner.testing.model_server --help` starts one that answers after a fixed time, for measurements.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from PIL import Image


@dataclass(frozen=True)
class Request:
    """A request about an image.

    `number`: from 1, without the requests by which a run finds out what the server is. `image`: the bytes that came.
    """

    number: int
    image: bytes
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def caption(self) -> str:
        """Words that only equal images share."""
        return f"a picture {zlib.crc32(self.image):08x}"

    @property
    def captions(self) -> list[str]:
        """The captions of all choices that are asked for; sampled ones depend on the seed too."""
        if not self.body.get("temperature"):
            return [self.caption]
        drawn = [zlib.crc32(f"{self.body.get('seed')} {index}".encode()) for index in range(self.body.get("n", 1))]
        return [f"{self.caption} {number:08x}" for number in drawn]


@dataclass(frozen=True)
class Answer:
    """What the server does with a request.

    `changes`: to the chat completion. `body`: instead of it, JSON or bytes. `sent`: share of the bytes that are sent
    before the connection is cut. `held`: an event to wait for before anything is sent.
    """

    status: int = 200
    changes: dict[str, Any] = field(default_factory=dict)
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    sent: float = 1.0
    held: threading.Event | None = None


def too_many_requests(seconds: float | str) -> Answer:
    """Return the answer 429 with Retry-After."""
    return Answer(429, body={"error": {"message": "slow down"}}, headers={"Retry-After": str(seconds)})


def failing(status: int, message: str = "out of order") -> Answer:
    """Return an error of a status."""
    return Answer(status, body={"error": {"message": message, "code": status}})


def saying(content: str | None, finish_reason: str = "stop", **message: Any) -> Answer:
    """Return a chat completion with this content, reason to finish and other fields of its message."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}}
    return Answer(changes={"choices": [{**choice, "finish_reason": finish_reason}]})


HALF_A_REPLY, NO_REPLY = Answer(sent=0.5), Answer(sent=0.0)
Rule = Callable[[Request], Answer | None]


class ModelServer:
    """A server on a free port of this machine; a context manager.

    `rule`: what it does with a request about an image; None is a caption of the image. `delay`: seconds before each
    answer. `logprobs`: whether it gives log-probabilities. `key`: what it accepts, "" for anything. `asked`: the
    requests about images so far, `refuses`: settings of a request that it answers with 400. `most_choices`: that it
    gives at once, whatever is asked. `is_down`: it answers 503 to everything. `probes`: those by which runs find out
    what it is. `most_at_once`: under way.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        model: str = "tiny-vlm",
        delay: float = 0.0,
        logprobs: bool = True,
        key: str = "",
        system_fingerprint: str | None = None,
        port: int = 0,
        refuses: Collection[str] = (),
        most_choices: int = 100,
    ) -> None:
        self.rule: Rule = rule or (lambda request: None)
        self.model, self.system_fingerprint = model, system_fingerprint
        self.delay, self.logprobs, self.key = delay, logprobs, key
        self.refuses, self.most_choices = refuses, most_choices
        self.is_down = False
        self.asked: list[Request] = []
        self.probes: list[Request] = []
        self.most_at_once = 0
        self._at_once = 0
        self._changed = threading.Condition()
        self._http = _Http(("127.0.0.1", port), _handler_of(self))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._http.cut_connections()

    def wait_for(self, count: int) -> None:
        """Wait until it was asked about `count` images."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.asked) >= count)

    def note_request(self, body: dict[str, Any], headers: dict[str, str]) -> Request:
        """Note a request, and return it."""
        image = _image_in(body)
        with self._changed:
            is_probe = _is_grey(image)
            request = Request(0 if is_probe else len(self.asked) + 1, image, body, headers)
            (self.probes if is_probe else self.asked).append(request)
            self._at_once += not is_probe
            self.most_at_once = max(self.most_at_once, self._at_once)
            self._changed.notify_all()
        return request

    def answer(self, request: Request) -> Answer:
        """Return what to do with a request."""
        key, model = request.headers.get("Authorization"), request.body["model"]
        if self.is_down:
            return failing(503)
        if self.key and key != f"Bearer {self.key}":
            return failing(401, f"Incorrect API key provided: {key}")
        if model != self.model:
            return failing(404, f"The model `{model}` does not exist.")
        refused = sorted(set(self.refuses) & set(request.body))
        if refused:
            return failing(400, f"{refused[0]} is not supported")
        return (self.rule(request) if request.number else None) or Answer()

    def note_answer(self, request: Request) -> None:
        """Note that a request is about to be answered."""
        with self._changed:
            self._at_once -= request.number > 0

    def completion(self, request: Request) -> dict[str, Any]:
        """Return the chat completion with the caption of an image."""
        captions = request.captions[: self.most_choices]
        choices = [self._choice(index, text, request.body) for index, text in enumerate(captions)]
        return {
            "object": "chat.completion",
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
            "usage": {"prompt_tokens": 100, "completion_tokens": sum(len(text.split()) for text in captions)},
        }

    def _choice(self, index: int, text: str, body: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": "stop"}
        if self.logprobs and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": token, "logprob": -0.5} for token in text.split()]}
        return choice


class _Http(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def cut_connections(self) -> None:
        """End the connections that clients keep open, as the end of a process does."""
        for connection in self._connections:
            with suppress(OSError):  # it is closed
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are what tests are about."""


def _handler_of(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            """Write no log."""

        def do_GET(self) -> None:
            models = {"object": "list", "data": [{"id": server.model, "object": "model"}]}
            self._send(Answer(body=models), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = server.note_request(body, dict(self.headers))
            try:
                answer = server.answer(request)
                if answer.held is not None:
                    answer.held.wait()
                time.sleep(server.delay)
            finally:
                server.note_answer(request)
            self._send(answer, server.completion(request))

        def _send(self, answer: Answer, completion: dict[str, Any]) -> None:
            body = completion | answer.changes if answer.body is None else answer.body
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            if answer.sent:
                self.send_response(answer.status)
                standard = {"Content-Type": "application/json", "Content-Length": str(len(data))}
                for name, value in (standard | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: int(len(data) * answer.sent)])
            self.close_connection = answer.sent < 1

    return Handler


def _image_in(body: dict[str, Any]) -> bytes:
    (url,) = (part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")
    header, _, data = url.partition(",")
    assert header == "data:image/jpeg;base64"
    return base64.b64decode(data)


def _is_grey(image: bytes) -> bool:
    """Return whether an image is of one colour: no image of an archive is."""
    with Image.open(io.BytesIO(image)) as opened:
        return opened.size == (64, 64) and all(low == high for low, high in opened.convert("RGB").getextrema())  # type: ignore[misc]


def main() -> None:
    """Start a server and print its URL."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    arguments = parser.parse_args()
    with ModelServer(port=arguments.port, delay=arguments.delay) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
