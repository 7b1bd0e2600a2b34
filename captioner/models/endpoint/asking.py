"""One request to one model server, and what its failure means.

answered                     a Reply; whether it is a caption is judged in `reply`
RejectedError                a 4xx for this image: the image's row
BusyError                    429 and 503: ask again, not before Retry-After
BrokenError                  5xx, no connection, half an answer, none in time: the server rests and is asked again
EndpointError                a wrong key, an unknown model, a redirect: the run stops
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from captioner.errors import EndpointError, UsageError
from captioner.models.endpoint.api_key import VARIABLES, ApiKey
from captioner.models.endpoint.reply import NoReplyError, Reply, error_in, judge

if TYPE_CHECKING:
    import httpx2

MAX_ANSWER_BYTES = 16 << 20
CONNECT_TIMEOUT_S = 10.0
JPEG_QUALITY = 90
TEMPERATURE = 0
GREEDY: Mapping[str, Any] = MappingProxyType({"temperature": TEMPERATURE})


EXAMPLE = "http://HOST:8000/v1"


class RejectedError(Exception):
    """Raised where a server refuses one image."""


class BrokenError(Exception):
    """Raised where a server did not answer. `blames`: the image may be the reason, since the server took it."""

    def __init__(self, reason: str, blames: bool = True) -> None:
        super().__init__(reason)
        self.blames = blames


class BusyError(Exception):
    """Raised where a server has too much to do. `seconds`: what it says of when to come back; None for nothing."""

    def __init__(self, reason: str, seconds: float | None) -> None:
        super().__init__(reason)
        self.seconds = seconds


def checked_url(url: str) -> str:
    """Return an --endpoint without a slash at its end. Raises UsageError where it is not a URL, or holds a key."""
    import httpx2

    url = url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        _ = parts.port, httpx2.URL(url)  # both raise where the connection would
    except (ValueError, httpx2.InvalidURL) as error:
        raise UsageError(f"--endpoint {url}: {error}; give the URL of the server's API, such as {EXAMPLE}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"--endpoint {parts.scheme}://{parts.hostname}: give a key in {VARIABLES[0]}, not in the URL, and no query"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--endpoint {url}: give the URL of the server's API, such as {EXAMPLE}")
    if parts.path.endswith("/chat/completions"):
        raise UsageError(f"--endpoint {url}: leave out /chat/completions")
    return url


def image_url(image: npt.NDArray[np.uint8]) -> str:
    """Return an image, uint8 [height, width, 3], as the data URL of a JPEG without metadata."""
    from PIL import Image

    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def json_schema(schema: str | None) -> dict[str, Any] | None:
    """Return a question's schema as `request_body` takes it."""
    return {"name": "answer", "schema": json.loads(schema)} if schema else None


def request_body(
    image: str,
    model: str,
    prompt: str,
    max_tokens: int,
    *,
    system: str | None = None,
    logprobs: bool = False,
    sampling: Mapping[str, Any] = GREEDY,
    schema: dict[str, Any] | None = None,
) -> bytes:
    """Return the JSON of a chat completion about an image, which is given as a data URL.

    `sampling`: the request's settings of that name, such as temperature and seed. `schema`: the
    `json_schema` of the answer, as in OpenAI's structured outputs; None for text.

    The image comes before the prompt, so that a server with a prefix cache reads it once for several prompts.
    """
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    settings: dict[str, Any] = {"max_tokens": max_tokens, **sampling}
    if logprobs:
        settings["logprobs"] = True
    if schema is not None:
        settings["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps({"model": model, "messages": messages, **settings}).encode()


class Client:
    """Connections to model servers, of one event loop. An asynchronous context manager.

    Neither proxies nor keys are taken from the environment or from ~/.netrc: nothing is contacted but what is named.
    """

    def __init__(self, key: ApiKey, request_timeout: float) -> None:
        import httpx2

        self._key, self._limit = key, request_timeout
        self._http = httpx2.AsyncClient(
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            headers={"Accept-Encoding": "identity", **key.headers()},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def models(self, url: str) -> list[str]:
        """Return the names of the models that a server lists. Raises as `ask` does."""
        body = await self._send("GET", f"{url}/models")
        entries = body.get("data") if isinstance(body, dict) else None
        names = [entry.get("id") for entry in entries or [] if isinstance(entry, dict)]
        return [name for name in names if isinstance(name, str)]

    async def ask(self, url: str, body: bytes) -> Reply:
        """Send a chat completion to a server. Raises the errors in this module's docstring."""
        answer = await self._send("POST", f"{url}/chat/completions", body)
        try:
            return judge(answer)
        except NoReplyError as error:
            raise BrokenError(self._shown(str(error))) from None

    async def _send(self, method: str, url: str, body: bytes | None = None) -> Any:
        import httpx2

        headers = {"Content-Type": "application/json"} if body else {}
        try:
            async with (
                asyncio.timeout(self._limit),
                self._http.stream(method, url, content=body, headers=headers) as response,
            ):
                data = await _read(response)
        except TimeoutError:
            raise BrokenError(f"no answer within {self._limit:g} s") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if isinstance(error.__cause__, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY" in str(error):
                raise EndpointError(f"{url}: its certificate cannot be trusted: {_line(error)}") from None
            raise BrokenError(f"no connection: {_line(error)}", blames=False) from None
        except httpx2.HTTPError as error:
            raise BrokenError(f"the connection broke: {_line(error)}") from None
        return self._checked(url, response, data)

    def _checked(self, url: str, response: httpx2.Response, data: bytes) -> Any:
        """Return the JSON of an answer. Raises where its status, or an error in its body, says that it is not one."""
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        error, status = error_in(answer), response.status_code
        if status < 300 and error is None:
            if answer is None:
                raise BrokenError("the answer is not JSON")
            return answer
        message, code = error or (data[:200].decode(errors="replace"), None)
        if status < 300:
            status = code or 500
        raise self._failure(url, status, self._shown(message), response)

    def _failure(self, url: str, status: int, message: str, response: httpx2.Response) -> Exception:
        """Return the exception that an error of this status is."""
        reason = f"{status}: {message}" if message else f"{status}"
        if status < 400:
            location = self._shown(response.headers.get("Location", ""))
            return EndpointError(f"{url}: redirects to {location or 'nowhere'}, which is not followed; give that URL")
        if status in (401, 403):
            return EndpointError(f"{url}: the key is refused ({reason}); set {VARIABLES[0]} to a key of this server")
        if status in (402, 404, 405, 407):
            return EndpointError(f"{url}: {reason}; check --endpoint and --model")
        if status in (429, 503):
            return BusyError(reason, retry_after(response.headers.get("Retry-After")))
        return BrokenError(reason) if status >= 500 or status in (408, 409, 425) else RejectedError(reason)

    def _shown(self, text: str) -> str:
        """Return what a server says as one line without the key."""
        return " ".join(self._key.hidden_in(text).split())[:300]


def retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After, which is a number or a date; None where there is none."""
    if not value:
        return None
    try:
        return max(0.0, float(value)) if float(value) < float("inf") else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


async def _read(response: httpx2.Response) -> bytes:
    data = bytearray()
    async for part in response.aiter_bytes():
        data += part
        if len(data) > MAX_ANSWER_BYTES:
            raise BrokenError(f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
    return bytes(data)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
