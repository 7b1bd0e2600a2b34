"""Write training and evaluation figures as TensorBoard events into OUT/tensorboard."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from captioner.store.directory import Directory


def write_events(out: Directory, entries: list[dict[str, Any]]) -> None:
    """Write entries of a history, each with its `step`, under Trainer's names: "train/loss", "eval/wer" and so on.

    Called at each checkpoint. The file is named after its last step, so a resumed run replaces the events of steps that
    it repeats.
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
