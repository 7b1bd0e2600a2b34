"""`--log-format json`: write the messages on standard error as JSON Lines for a log collector.

The periodic progress line has its figures as keys: see `captioner.console.progress.Progress.fields`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO


class JsonLines(io.TextIOBase):
    """A text stream that writes each complete line to `stream` as {"time", "level", "message"}.

    Empty lines are dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._incomplete_line = stream, ""

    def write(self, text: str) -> int:
        """Write the complete lines and keep the rest."""
        *lines, self._incomplete_line = (self._incomplete_line + text).split("\n")
        for line in lines:
            if line.strip():
                self._stream.write(json.dumps(_entry(line.strip()), ensure_ascii=False) + "\n")
        return len(text)

    def write_fields(self, line: str, fields: Mapping[str, Any]) -> None:
        """Write a line whose figures become keys of its object."""
        entry = {**_entry(line), "event": "progress", **fields}
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        with suppress(ValueError):  # closed at exit
            self._stream.flush()

    def writable(self) -> bool:
        return True


def log_as_json() -> None:
    """Switch standard error of this process to JSON Lines."""
    if not isinstance(sys.stderr, JsonLines):
        sys.stderr = JsonLines(sys.stderr)


def _entry(line: str) -> dict[str, Any]:
    message = line.removeprefix("captioner: ")
    level = "error" if message.startswith("error: ") else "info"
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return {"time": now, "level": level, "message": message.removeprefix("error: ")}
