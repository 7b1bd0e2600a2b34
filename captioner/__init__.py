"""Caption image archives: every picture ends in exactly one row. `captioner.pipeline` is the flow; read it first."""

import os

# Private unless asked otherwise: read by huggingface_hub and ray when they are imported, here and in every worker.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
