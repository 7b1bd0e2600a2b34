"""Run `captioner check` as `python -m ray_jobs.check OUT --references FILE ...`, in one process."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["check", *sys.argv[1:]])
