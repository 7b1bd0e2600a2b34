"""Features of images that all questions about them share: the vision part of a chat model runs once for each image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

MAX_BYTES = 1 << 30  # of features that are kept; further images are encoded again for each question
# Parts of what `get_image_features` returns that only the vision part itself needs; the first is the largest by far.
_UNUSED = ("last_hidden_state", "hidden_states", "attentions")

Key = tuple[int, ...]  # ids of the images of a batch


class SharedFeatures:
    """Takes the place of `get_image_features` of a network, and keeps what it returned for batches of images.

    A batch is found again where it holds the same images, in the same order. `batch` and `sharing` say when.
    """

    def __init__(self, network: Any) -> None:
        self._kept: dict[Key, Any] = {}
        self._num_bytes = 0
        self._key: Key | None = None
        self._shared: set[int] = set()  # ids of images
        vision = network.base_model
        encode = getattr(vision, "get_image_features", None)
        if encode is not None:
            vision.get_image_features = wraps(encode)(lambda *args, **options: self._features(encode, args, options))

    @contextmanager
    def sharing(self, images: Iterable[Any]) -> Iterator[None]:
        """Keep the features of batches of these images until the end."""
        ids = set(map(id, images))
        self._shared |= ids
        try:
            yield
        finally:
            self._shared -= ids
            self.free(ids)

    @contextmanager
    def batch(self, images: Sequence[Any]) -> Iterator[None]:
        """Say which images the network is to encode next."""
        key = tuple(map(id, images))
        self._key = key if self._shared.issuperset(key) else None
        try:
            yield
        finally:
            self._key = None

    def free(self, ids: set[int] | None = None) -> None:
        """Forget the features of batches that hold one of these images, or all."""
        for key in [key for key in self._kept if ids is None or not ids.isdisjoint(key)]:
            self._num_bytes -= _num_bytes(self._kept.pop(key))

    def _features(self, encode: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._key is None:
            return encode(*args, **options)
        if self._key not in self._kept:
            features = encode(*args, **options)
            if not hasattr(features, "pooler_output"):
                return features
            features = type(features)(**{name: part for name, part in features.items() if name not in _UNUSED})
            if self._num_bytes + _num_bytes(features) > MAX_BYTES:
                return features
            self._kept[self._key] = features
            self._num_bytes += _num_bytes(features)
        return copy.copy(self._kept[self._key])  # `generate` sets the attributes of what it gets


def _num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in the output of a network."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_num_bytes, parts))
