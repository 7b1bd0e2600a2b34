"""Caption image archives: every image ends in exactly one row. `captioner.pipeline` is the flow; read it first."""

import os
from typing import Any

# Private unless asked otherwise: read by huggingface_hub and ray when they are imported, here and in every worker.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def __getattr__(name: str) -> Any:
    """`captioner.CaptionBatches`, imported when it is asked for: the package itself imports nothing."""
    if name == "CaptionBatches":
        from captioner.run.batches import CaptionBatches

        return CaptionBatches
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
