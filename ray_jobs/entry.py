"""The entry of the `captioner` command: Ctrl-C during its imports is one line, too."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line: see `ray_jobs.cli.main`."""
    try:
        from ray_jobs import cli
    except KeyboardInterrupt:  # before what handles it is imported
        print("captioner: error: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    cli.main()
