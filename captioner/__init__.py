"""Caption image archives: every image ends in exactly one row. `captioner.pipeline` is the flow; read it first."""

import os
from typing import Any

# Private unless asked otherwise: read by huggingface_hub and ray when they are imported, here and in every worker.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _use_writable_caches() -> None:
    """Let caches be in the folder of temporary files where this user has no home directory to write to.

    That is so in containers whose user is a number without a name. Models and the login that are in the home directory
    are used.
    """
    home = os.path.expanduser("~")
    cache = os.path.join(home, ".cache")
    if "XDG_CACHE_HOME" in os.environ or os.access(cache if os.path.isdir(cache) else home, os.W_OK):
        return
    import tempfile

    own = os.path.join(tempfile.gettempdir(), f"captioner-{os.getuid()}")
    try:
        os.makedirs(own, mode=0o700, exist_ok=True)
        if os.stat(own).st_uid != os.getuid():
            own = tempfile.mkdtemp(prefix="captioner-")
    except OSError:  # nothing can be written here at all: whatever needs to write says so
        return
    models, token = (os.path.join(cache, "huggingface", name) for name in ("hub", "token"))
    if os.path.isdir(models) and "HF_HOME" not in os.environ:
        os.environ.setdefault("HF_HUB_CACHE", models)
    if os.path.isfile(token) and "HF_HOME" not in os.environ:
        os.environ.setdefault("HF_TOKEN_PATH", token)
    os.environ["XDG_CACHE_HOME"] = own
    os.environ.setdefault("TRITON_HOME", own)


_use_writable_caches()


def __getattr__(name: str) -> Any:
    """`CaptionBatches` and `open_table`, imported when they are asked for: the package itself imports nothing."""
    if name == "CaptionBatches":
        from captioner.run.batches import CaptionBatches

        return CaptionBatches
    if name == "open_table":
        from captioner.store.read import open_datasets

        return open_datasets
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
