"""Serve the page of a review or a spot-check over HTTP to one person on this machine.

Every request needs the token in the address. The server listens on 127.0.0.1 and checks the Host header, which keeps
out pages of other sites whose name resolves to this machine (DNS rebinding).

    GET  /TOKEN/                       the page
    GET  /TOKEN/state                  what to show: see `ReviewSession.next`
    GET  /TOKEN/summary                what the end shows: figures, and the next commands
    GET  /TOKEN/about/INDEX            an image's descriptions in the file, or why it cannot be shown
    GET  /TOKEN/image/INDEX/SIZE       JPEG; SIZE "large" or "small"
    POST /TOKEN/decide                 a decision -> state; 409 when it came too late, 400 with {"error"} when invalid
    POST /TOKEN/undo, /TOKEN/again     {} -> state

and for a review alone:

    GET  /TOKEN/state/INDEX            the state for an image of the grid
    GET  /TOKEN/grid?...               a page of all images: see `GridRequest`
    GET  /TOKEN/failed/NUMBER          a small JPEG of an image without a caption
    POST /TOKEN/draft                  {"index", "text"} -> {}: keeps what was typed
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, Protocol
from urllib.parse import urlsplit

from captioner.errors import CaptionerError, UsageError
from captioner.publishing.review.grid import GridRequest
from captioner.publishing.review.previews import Preview, Previews, Size
from captioner.publishing.review.rows import Row
from captioner.publishing.review.session import ReviewSession

HOST = "127.0.0.1"
_OWN_NAMES = {HOST, "localhost"}  # any port: a tunnel (ssh -L) may use another
_MAX_BODY = 65_536
_PIECE = re.compile(r"<!-- (\w+\.html): (.+) -->\n")  # of a page: a file, and the text in it
_IDLE_S = 60.0  # seconds before a silent connection is closed
_HEADERS = {
    "Cache-Control": "no-store",  # keeps the images out of the browser's cache on the disk
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class PageSession(Protocol):
    """What a page needs of its session: see `ReviewSession` and `SpotCheckSession`. `page`: the name of its files."""

    @property
    def page(self) -> str: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row: ...

    def next(self) -> dict[str, Any]: ...

    def parse(self, body: Any) -> Any: ...

    def decide(self, request: Any) -> tuple[bool, dict[str, Any]]: ...

    def undo(self) -> dict[str, Any]: ...

    def show_skipped(self) -> dict[str, Any]: ...

    def summary(self) -> dict[str, Any]: ...


class ReviewServer(ThreadingHTTPServer):
    """Serves one session. `port` 0 takes any free port. Raises OSError when it cannot listen."""

    daemon_threads = True

    def __init__(self, session: PageSession, previews: Previews, port: int) -> None:
        self.session, self.previews = session, previews
        self.token = secrets.token_urlsafe(24)
        self.page = _read_page(session.page)
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print an error of a request, but not that a browser was closed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address of the page, with its token."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"


def _read_page(name: str) -> str:
    """Return a page with its style, its scripts and the pieces of all pages, which it names in comments.

    A piece holds TEXT where the text after its name belongs.
    """
    folder = files("captioner.publishing.review")

    def read(file: str) -> str:
        return folder.joinpath(file).read_text(encoding="utf-8")

    page = _PIECE.sub(lambda match: read(match[1]).replace("TEXT", match[2]), read(f"{name}.html"))
    for file in ("page.css", "shared.js", f"{name}.js"):
        page = page.replace(f"/* {file} */\n", read(file))
    return page


class _HttpError(Exception):
    """Raised to answer a request with an error status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "captioner", ""
    timeout = _IDLE_S
    server: ReviewServer

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def log_message(self, *_: object) -> None:
        pass  # the address holds the token

    def _respond(self) -> None:
        try:
            self._route(self._path_after_token())
        except _HttpError as refusal:
            self.close_connection = True  # the request's body may not have been read
            self._send_json({"error": str(refusal)}, refusal.status)
        except UsageError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except CaptionerError as error:
            self._send_json({"error": str(error)}, HTTPStatus.INTERNAL_SERVER_ERROR)
        except ConnectionError:
            self.close_connection = True  # the browser has closed the connection

    def _path_after_token(self) -> list[str]:
        host = urlsplit(f"//{self.headers.get('Host', '')}")
        if host.hostname not in _OWN_NAMES:
            raise _HttpError(HTTPStatus.FORBIDDEN, "forbidden")
        token, *parts = urlsplit(self.path).path.removeprefix("/").split("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _HttpError(HTTPStatus.FORBIDDEN, "forbidden: open the address that captioner printed")
        return parts

    def _route(self, parts: list[str]) -> None:
        session = self.server.session
        match (self.command, *parts):
            case ("GET", ""):
                self._send_page()
            case ("GET", "state"):
                self._send_json(session.next())
            case ("GET", "summary"):
                self._send_json(session.summary())
            case ("GET", "about", index):
                self._send_json(self._about(self._parse_index(index)))
            case ("GET", "image", index, ("large" | "small") as size):
                self._send_image(self._parse_index(index), size)
            case ("POST", "decide"):
                saved, state = session.decide(session.parse(self._body()))
                self._send_json(state, HTTPStatus.OK if saved else HTTPStatus.CONFLICT)
            case ("POST", "undo"):
                self._body()
                self._send_json(session.undo())
            case ("POST", "again"):
                self._body()
                self._send_json(session.show_skipped())
            case _:
                self._route_review(session, parts)

    def _route_review(self, session: PageSession, parts: list[str]) -> None:
        """Respond to the requests of the review page alone."""
        if not isinstance(session, ReviewSession):
            raise _HttpError(HTTPStatus.NOT_FOUND, "not found")
        match (self.command, *parts):
            case ("GET", "state", index):
                self._send_json(session.open(self._parse_index(index)))
            case ("GET", "grid"):
                self._send_json(session.grid(GridRequest.from_query(urlsplit(self.path).query)))
            case ("GET", "failed", number):
                row = session.failed_row(int(number)) if number.isdecimal() and len(number) <= 10 else None
                if row is None:
                    raise _HttpError(HTTPStatus.NOT_FOUND, "no such image")
                self._send_preview(self.server.previews.preview(row, "small"))
            case ("POST", "draft"):
                session.keep_draft(*self._draft())
                self._send_json({})
            case _:
                raise _HttpError(HTTPStatus.NOT_FOUND, "not found")

    def _parse_index(self, text: str) -> int:
        if not text.isdecimal() or len(text) > 10 or int(text) >= len(self.server.session):
            raise _HttpError(HTTPStatus.NOT_FOUND, "no such image")
        return int(text)

    def _body(self) -> Any:
        """Return the JSON body of a request from our own page. Raises _RefusedError for any other."""
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise _HttpError(HTTPStatus.FORBIDDEN, "forbidden")
        if self.headers.get_content_type() != "application/json":
            raise _HttpError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be JSON")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            raise _HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may have at most {_MAX_BODY} bytes")
        try:
            return json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise _HttpError(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None

    def _draft(self) -> tuple[int, str]:
        body = self._body()
        index, text = (body.get("index"), body.get("text")) if isinstance(body, dict) else (None, None)
        if type(index) is not int or not isinstance(text, str):
            raise UsageError("draft: give the index of an image and a text")
        return self._parse_index(str(index)), text

    def _about(self, index: int) -> dict[str, Any]:
        preview = self.server.previews.preview(self.server.session.row(index), "large")
        return {
            "error": preview.error,
            "descriptions": [{"name": name, "text": text} for name, text in preview.descriptions.items()],
        }

    def _send_image(self, index: int, size: Size) -> None:
        self._send_preview(self.server.previews.preview(self.server.session.row(index), size))

    def _send_preview(self, preview: Preview) -> None:
        if preview.jpeg is None:
            raise _HttpError(HTTPStatus.NOT_FOUND, preview.error)
        self._send(preview.jpeg, "image/jpeg")

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

    def _send(self, data: bytes, content_type: str, status: HTTPStatus = HTTPStatus.OK, policy: str = "") -> None:
        self.send_response(status)
        headers = _HEADERS | {"Content-Type": content_type, "Content-Length": str(len(data))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", policy or "default-src 'none'")
        self.end_headers()
        self.wfile.write(data)
