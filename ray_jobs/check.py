"""Check a captions table: `python -m ray_jobs.check OUT --references FILE ...`. Reads the table in one process."""

from __future__ import annotations

import sys

from captioner.config import CheckTableConfig


def run(out: str, config: CheckTableConfig, against: str | None = None) -> int:
    """Check OUT and write its report; returns the exit code. Raises CaptionerError."""
    from captioner.console import commands

    return commands.check(out, config.check, against)


if __name__ == "__main__":  # the same arguments and exit code as `captioner check`
    from ray_jobs.cli import main

    main(["check", *sys.argv[1:]])
