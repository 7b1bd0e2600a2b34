"""What was measured, as TensorBoard events in OUT/tensorboard."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from captioner.store.directory import Directory


def write_events(out: Directory, entries: list[dict[str, Any]]) -> None:
    """Write entries of a history, each with its `step`: "train/loss", "eval/wer" and so on, as Trainer names them.

    Called at each checkpoint. The file is named after its last step, so a run that goes on replaces what it does again.
    """
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="captioner-events-") as folder:
        with SummaryWriter(folder) as writer:
            for entry in entries:
                for name, value in entry.items():
                    if isinstance(value, int | float) and name not in ("step", "epoch"):
                        writer.add_scalar(_tag(name), value, entry["step"])
        (file,) = Path(folder).iterdir()
        out.write_bytes(f"tensorboard/events.out.tfevents.{entries[-1]['step']:08d}", file.read_bytes())


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
