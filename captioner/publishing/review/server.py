"""The review page over HTTP, for one person on this machine.

Only who knows the token in the address gets anything. It listens on 127.0.0.1; the Host header is checked as well, so
that a page of somebody else's whose name is made to point here (DNS rebinding) gets nothing either.

    GET  /TOKEN/                       the page
    GET  /TOKEN/state                  what to show: see `Desk.next`
    GET  /TOKEN/about/PLACE            of a picture: its descriptions in the file, or why it cannot be shown
    GET  /TOKEN/picture/PLACE/SIZE     JPEG; SIZE "large" or "small"
    POST /TOKEN/decide                 {"decision", "places", "shown", "text", "seconds"} -> state; 409 where somebody
                                       else was faster, 400 with {"error"} for an edit that cannot stand
    POST /TOKEN/undo, /TOKEN/again     {} -> state
"""

from __future__ import annotations

import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from captioner.errors import CaptionerError, UsageError
from captioner.publishing.review.previews import Pictures, Size
from captioner.publishing.review.session import Asked, Desk

HOST = "127.0.0.1"
_OWN_NAMES = {HOST, "localhost"}  # any port: a tunnel (ssh -L) may end at another
_MAX_BODY = 65_536
_IDLE_S = 60.0  # seconds before a silent connection is closed
_HEADERS = {
    "Cache-Control": "no-store",  # pictures of the archive are not to lie in a browser's cache on the disk
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class ReviewServer(ThreadingHTTPServer):
    """Serves one desk. `port` 0 takes any free one. Raises OSError where the port cannot be had."""

    daemon_threads = True

    def __init__(self, desk: Desk, pictures: Pictures, port: int) -> None:
        self.desk, self.pictures = desk, pictures
        self.token = secrets.token_urlsafe(24)
        self.page = files("captioner.publishing.review").joinpath("page.html").read_text(encoding="utf-8")
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "captioner", ""
    timeout = _IDLE_S
    server: ReviewServer

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass  # the address holds the token

    def _answer(self) -> None:
        try:
            self._route(self._parts_behind_token())
        except _RefusedError as refusal:
            self.close_connection = True  # a body may be left unread
            self._send_json({"error": str(refusal)}, refusal.status)
        except UsageError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except CaptionerError as error:
            self._send_json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
        except ConnectionError:
            self.close_connection = True  # the browser has gone on

    def _parts_behind_token(self) -> list[str]:
        host = urlsplit(f"//{self.headers.get('Host', '')}")
        if host.hostname not in _OWN_NAMES:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "forbidden")
        token, *parts = urlsplit(self.path).path.removeprefix("/").split("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "forbidden: open the address that `captioner review` printed")
        return parts

    def _route(self, parts: list[str]) -> None:
        desk = self.server.desk
        match (self.command, *parts):
            case ("GET", ""):
                self._send_page()
            case ("GET", "state"):
                self._send_json(desk.next())
            case ("GET", "about", place):
                self._send_json(self._about(self._place(place)))
            case ("GET", "picture", place, ("large" | "small") as size):
                self._send_picture(self._place(place), size)
            case ("POST", "decide"):
                kept, state = desk.decide(Asked.from_json(self._body(), len(desk)))
                self._send_json(state, HTTPStatus.OK if kept else HTTPStatus.CONFLICT)
            case ("POST", "undo"):
                self._body()
                self._send_json(desk.undo())
            case ("POST", "again"):
                self._body()
                self._send_json(desk.show_skipped())
            case _:
                raise _RefusedError(HTTPStatus.NOT_FOUND, "not found")

    def _place(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 10 or int(text) >= len(self.server.desk):
            raise _RefusedError(HTTPStatus.NOT_FOUND, "no such picture")
        return int(text)

    def _body(self) -> Any:
        """The JSON of a request that only a page of ours can send. Raises _RefusedError."""
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "forbidden")
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is wanted")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_MAX_BODY} bytes are taken")
        try:
            return json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "that is no JSON") from None

    def _about(self, place: int) -> dict[str, Any]:
        found = self.server.pictures.preview(self.server.desk.row(place), "large")
        return {
            "error": found.error,
            "descriptions": [{"place": name, "text": text} for name, text in found.descriptions.items()],
        }

    def _send_picture(self, place: int, size: Size) -> None:
        found = self.server.pictures.preview(self.server.desk.row(place), size)
        if found.jpeg is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, found.error)
        self._send(found.jpeg, "image/jpeg")

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = self.server.page.replace("NONCE", nonce)
        self._send(page.encode(), "text/html; charset=utf-8", policy=policy)

    def _send_json(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value).encode(), "application/json", status)

    def _send(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, policy: str = "") -> None:
        self.send_response(status)
        headers = _HEADERS | {"Content-Type": kind, "Content-Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy or "default-src 'none'")
        self.end_headers()
        self.wfile.write(data)
