"""A caption stage for your own pipeline, on Ray Data or anything else that passes batches of columns.

    from captioner import CaptionBatches

    ds = ray.data.read_binary_files("images/", include_paths=True)
    ds = ds.map_batches(CaptionBatches, fn_constructor_kwargs={"model": "starter"}, batch_size=64,
                        compute=ray.data.ActorPoolStrategy(size=1), num_gpus=1)

It adds captions and error codes. There is no plan and no table, so nothing guarantees one row for each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from captioner.config import ModelConfig, SourceConfig
from captioner.data import RawImage
from captioner.errors import UsageError
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import load, resolve, resolve_dtype
from captioner.models.devices import pick_device
from captioner.models.questions import answer_fields, check_columns
from captioner.steps import caption_or_reasons

COLUMNS = ("caption", "num_tokens", "logprob_mean", "error_code", "error_message")  # that are added to a batch


class CaptionBatches:
    """Adds captions to batches that hold image files as bytes. Create one for each worker.

    `column`: of the bytes. `max_pixels`, `decode_timeout`: as in `captioner caption`. `settings`: fields of
    `captioner.config.ModelConfig` other than `name` (`num_beams`, `max_new_tokens`, `device`, `dtype`, `prompt`,
    `batch_size`, ...). Raises ModelError where the model, or a GPU that was reserved for the worker, cannot be used,
    also where the GPU fails later; a bad image is a row with an `error_code`, also one that crashes its decoder.
    """

    def __init__(
        self,
        model: str,
        column: str = "bytes",
        max_pixels: int | None = None,
        decode_timeout: float | None = None,
        **settings: Any,
    ) -> None:
        config = ModelConfig.model_validate({"name": model, **settings})
        ref = resolve(config)
        check_columns(ref, [], "batches have none")
        if answer_fields(ref):
            raise UsageError("questions: CaptionBatches asks for captions only; caption into a table instead")
        if ref.num_captions > 1:
            raise UsageError("num_captions: CaptionBatches gives one caption an image; caption into a table instead")
        limits = {"max_pixels": max_pixels, "decode_timeout": decode_timeout}
        source = SourceConfig.model_validate({name: limit for name, limit in limits.items() if limit is not None})
        self._max_pixels = source.max_pixels
        self._decoder = GuardedDecoder(ref.spec, self._max_pixels, source.decode_timeout)
        self._decoder.start()
        device = pick_device(config.device)
        self._ref = resolve_dtype(ref, config.dtype, device.type)
        self._captioner = load(self._ref, str(device), config.batch_size)
        self._column = column

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with its captions and errors.

        They are `caption` (None where failed), `num_tokens`, `logprob_mean` (NaN where failed), `error_code` ("" = no
        error) and `error_message`. Raises UsageError where the batch cannot be captioned, or has such a column already.
        """
        from captioner.imaging import decode_images

        _check_batch(batch, self._column)
        raws = [_raw_image(str(row), cell) for row, cell in enumerate(batch[self._column])]
        decoded = decode_images(raws, self._ref.spec, self._max_pixels, self._decoder)
        codes = decoded.rows["error_code"].to_pylist()
        messages = decoded.rows["error_message"].to_pylist()
        texts: list[str | None] = [None] * len(raws)
        tokens, logprobs = np.zeros(len(raws), np.int32), np.full(len(raws), np.nan, np.float32)
        decoded_rows = [row for row, code in enumerate(codes) if not code]
        for row, result in zip(
            decoded_rows, caption_or_reasons(self._captioner, decoded.pixels[decoded_rows]), strict=True
        ):
            if isinstance(result, str):
                codes[row], messages[row] = "generate_error", result
            else:
                texts[row], tokens[row] = result.text, result.num_tokens or 0
                logprobs[row] = np.nan if result.logprob_mean is None else result.logprob_mean
        return dict(batch) | {
            "caption": np.array(texts, dtype=object),
            "num_tokens": tokens,
            "logprob_mean": logprobs,
            "error_code": np.array(codes, dtype=object),
            "error_message": np.array(messages, dtype=object),
        }


def _check_batch(batch: Mapping[str, Any], column: str) -> None:
    if not isinstance(batch, Mapping):
        raise UsageError(f"CaptionBatches: a batch is a {type(batch).__name__}; give batch_format='numpy'")
    if column not in batch:
        raise UsageError(f"CaptionBatches: a batch has no column {column!r}; it has: {', '.join(map(str, batch))}")
    if taken := [name for name in COLUMNS if name in batch]:
        raise UsageError(f"CaptionBatches: a batch has a column {taken[0]!r} already; rename or drop it before")


def _raw_image(image_id: str, cell: Any) -> RawImage:
    """Return the image of a cell: bytes, or the dict of a Hugging Face image; None and NaN are missing."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None or (isinstance(data, float | np.floating) and np.isnan(data)):  # as pandas has for missing values
        return RawImage(image_id, "", None)
    if not isinstance(data, bytes | bytearray | memoryview):
        return RawImage(image_id, "", None, "not_an_image", f"the cell holds {type(data).__name__}, not bytes")
    return RawImage(image_id, "", bytes(data))
