"""What can be trained, and how long its captions may be."""

from __future__ import annotations

from captioner.models.ref import ModelRef

TRAINABLE = ("git", "blip", "vision-encoder-decoder")  # families whose loss is in loss.py


def max_caption_tokens(ref: ModelRef) -> int | None:
    """The longest caption the model has text positions for: start and end token take one each."""
    return None if ref.max_positions is None else ref.max_positions - 2
