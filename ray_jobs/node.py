"""What one node has, as the doctor asks it of each: versions, limits, memory, clock. Runs there; imports little."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import resource
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "transformers", "torch", "pyarrow", "pillow", "numpy")


def facts() -> dict[str, Any]:
    """Versions as `versions`, sizes in bytes, `time` in seconds since the epoch."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "captioner code": code_digest()}
    return {
        "versions": found | {package: _version(package) for package in PACKAGES},
        "torchvision": torchvision_problem(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        "free_disk": shutil.disk_usage("/tmp").free,
        "time": time.time(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def code_digest() -> str:
    """Return eight characters that stand for the sources of `captioner` and `ray_jobs` as this process has them.

    With a job they travel as files, without a version.
    """
    import captioner
    import ray_jobs

    digest = hashlib.sha256()
    for package in (captioner, ray_jobs):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def torchvision_problem() -> str:
    """Return why an installed torchvision cannot be used; "" where it can, or is not installed.

    transformers imports it where it finds it, so one that was built for another torch keeps models from loading.
    """
    if importlib.util.find_spec("torchvision") is None:
        return ""
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return f"torchvision {_version('torchvision')} does not fit torch {_version('torch')}: {error}"
    return ""
