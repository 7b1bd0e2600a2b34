"""Judge what a model server answers: whether it is a caption, and if not, why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from captioner.data import NO_USAGE, Usage
from captioner.models.thoughts import CUT, ONLY_THOUGHT, without_thought


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to one image.

    `error`: why it is not a caption, or "". `model`, `system_fingerprint`: who gave it, None where it does not say.
    `samples`: the text of each choice where several were asked for, None for one that is not a caption; the other
    fields are those of the first that is one, as in `captioner.data.Captions`.
    """

    text: str = ""
    error: str = ""
    num_tokens: int | None = None
    logprob_mean: float | None = None
    finished: bool = True
    usage: Usage = NO_USAGE
    model: str | None = None
    system_fingerprint: str | None = None
    samples: tuple[str | None, ...] = ()


def joined(replies: Sequence[Reply], count: int) -> Reply:
    """Return the replies to several requests for sampled captions of one image as one, with `count` samples."""
    first = next((reply for reply in replies if not reply.error), replies[0])
    samples = [text for reply in replies for text in reply.samples or (None,)]
    samples += [None] * (count - len(samples))
    usage = Usage.total(reply.usage for reply in replies)
    return replace(first, samples=tuple(samples[:count]), usage=usage)


class NoReplyError(ValueError):
    """Raised where a server's JSON is not a chat completion."""


def error_in(body: Any) -> tuple[str, int | None] | None:
    """Return the message and the status of the error that a JSON body describes; None where it describes none.

    Servers and the gateways before them send errors with status 200 too.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if error is None and body.get("object") == "error":  # vLLM before 0.10
        error = body
    if error is None and "choices" not in body and ("detail" in body or "message" in body):
        error = {"message": body.get("detail", body.get("message"))}
    if not error:
        return None
    if not isinstance(error, dict):
        return str(error), None
    code = error.get("code", error.get("status"))
    code = int(code) if isinstance(code, str) and code.isdecimal() else code
    message = error.get("message") or error.get("type") or "an error without a message"
    return str(message), code if isinstance(code, int) and 400 <= code < 600 else None


def judge(body: Any) -> Reply:
    """Return the reply that a chat completion holds. Raises NoReplyError where it is not one."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices:
        raise NoReplyError("the answer holds no message")
    replies = [_judge_choice(body, choice) for choice in choices]
    if len(replies) == 1:
        return replace(replies[0], samples=(None if replies[0].error else replies[0].text,))
    first = next((reply for reply in replies if not reply.error), replies[0])
    samples = tuple(None if reply.error else reply.text for reply in replies)
    return replace(first, samples=samples, num_tokens=None)  # the server counts the tokens of all choices together


def _judge_choice(body: dict[str, Any], choice: object) -> Reply:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise NoReplyError("the answer holds no message")
    if choice.get("error"):
        raise NoReplyError(f"the answer holds an error: {choice['error']}")
    content, reason = _text(message.get("content")), choice.get("finish_reason")
    text = without_thought(content)
    counts = body.get("usage")
    usage = counts if isinstance(counts, dict) else {}
    completion = _count(usage.get("completion_tokens"))
    error = _why_no_caption(message, content, text, reason)
    return Reply(
        "" if error else text,
        error,
        completion,
        _logprob_mean(choice.get("logprobs")),
        reason != "length",
        Usage(_count(usage.get("prompt_tokens")) or 0, completion or 0),
        _name(body.get("model")),
        _name(body.get("system_fingerprint")),
    )


def _why_no_caption(message: dict[str, Any], content: str, text: str, reason: object) -> str:
    if reason == "content_filter":
        return "content filter: the server withheld the answer"
    if message.get("refusal"):
        return f"refused: {message['refusal']}"
    if reason in ("tool_calls", "function_call"):
        return "no caption: the answer calls a tool"
    if not text:
        thought = content.strip() or message.get("reasoning_content") or message.get("reasoning")
        return (ONLY_THOUGHT if thought else "an empty answer") + (CUT if reason == "length" else "")
    try:
        text.encode()
    except UnicodeEncodeError:
        return "the answer is not valid Unicode"
    return ""


def _text(content: object) -> str:
    """Return the text of a message, which may come in parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def _logprob_mean(logprobs: object) -> float | None:
    """Return the mean natural-log probability of the answer's tokens; None where the server gives none."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not tokens:
        return None
    values = [token.get("logprob") if isinstance(token, dict) else None for token in tokens]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(tokens) else math.nan


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
