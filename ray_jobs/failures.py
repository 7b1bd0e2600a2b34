"""Find the error that a worker raised in the error that Ray raises for it."""

from __future__ import annotations

import gc
import importlib
import re
from collections.abc import Iterator

from captioner.errors import CaptionerError, ClusterError

# How Ray's own errors about a worker that failed begin.
_CONSEQUENCES = ("ActorDiedError", "ActorUnavailableError", "RaySystemError", "RayTaskError", "RuntimeError: The actor")


def cause_of(
    error: BaseException, what_stays: str = "progress is saved; run the same command to continue"
) -> CaptionerError:
    """Return the CaptionerError that a worker raised; a ClusterError with the worker's message for any other error.

    `what_stays`: the end of that message. Ray Train and tasks hand over the exception itself, Ray Data only the text
    of its traceback.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, CaptionerError) and "\n" not in str(cause):
            return cause
    for cause in causes:
        raised = re.findall(r"^(captioner\.[\w.]+)\.(\w+): (.+)$", str(cause), re.MULTILINE)
        if raised:
            module, name, message = raised[-1]
            kind = getattr(importlib.import_module(module), name, None)
            if isinstance(kind, type) and issubclass(kind, CaptionerError):
                return kind(message)
    message = first_error(str(error)) or str(error).strip().splitlines()[-1]
    return ClusterError(f"a worker failed: {message}; {what_stays}")


def execution_error(error: Exception, start_error: CaptionerError | None, no_progress_seconds: float) -> CaptionerError:
    """Return what to raise for an error of a Ray Data execution, and release the actors that the error holds.

    `start_error`: of workers that could not start, if any. `no_progress_seconds`: after which Ray Data gave up where
    no stage had finished a chunk.
    """
    from ray.data.exceptions import ExecutionTimeoutError

    release_actors(error)
    if isinstance(error, ExecutionTimeoutError):
        return ClusterError(
            f"no stage has finished a chunk for {no_progress_seconds:g} s; "
            "progress is saved; run the same command to continue"
        )
    return start_error or cause_of(error)


def first_error(text: str) -> str:
    """Return the first line of tracebacks that names an error; "" where there is none.

    An error in which Ray says what it did about another one counts only where there is no other.
    """
    lines: list[str] = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Exit)\b.*)$", text, re.MULTILINE)
    causes = [line for line in lines if not line.startswith(_CONSEQUENCES)]
    return next(iter(causes + lines), "")


def release_actors(error: BaseException | None) -> None:
    """Drop the references to Ray Data's actors that the error of a run holds.

    Ray ends actors when no reference to them is left. The tracebacks of `error`, and of the errors before it, hold
    frames of Ray Data: while the caller keeps the error, the next run of this process would wait for their CPUs.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()  # Ray Data's own objects hold each other


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and every error that it names as its cause."""
    waiting = [error]
    while waiting:
        cause = waiting.pop()
        yield cause
        failures = getattr(cause, "worker_failures", {}) or {}
        inner = [*failures.values(), getattr(cause, "cause", None), cause.__cause__]
        waiting += [inner_cause for inner_cause in inner if isinstance(inner_cause, BaseException)]
