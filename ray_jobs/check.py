"""Check a captions table: `python -m ray_jobs.check OUT --references FILE ...`. Reads the table in one process."""

from __future__ import annotations

import sys

from captioner.config import CheckTableConfig


def run(out: str, config: CheckTableConfig, against: str | None = None) -> int:
    """Check OUT and write its report; returns the exit code. Raises CaptionerError."""
    from captioner import commands

    return commands.check(out, config.check, against)


def main(argv: list[str] | None = None) -> None:
    """The same arguments as `captioner check`; ends the process with its exit code."""
    from ray_jobs.cli import main as command

    command(["check", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
