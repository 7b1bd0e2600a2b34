"""The caption stage for a pipeline of one's own, on Ray Data or anything that passes batches of columns.

    from captioner import CaptionBatches

    ds = ray.data.read_binary_files("images/", include_paths=True)
    ds = ds.map_batches(CaptionBatches, fn_constructor_kwargs={"model": "starter"}, batch_size=64,
                        compute=ray.data.ActorPoolStrategy(size=1), num_gpus=1)

It brings captions and reasons, not the promise of `captioner caption`: there is no plan and no table here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from captioner.config import ModelConfig, SourceConfig
from captioner.data import RawImage
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import load, resolve, settle_dtype
from captioner.models.devices import pick_device
from captioner.steps import caption_or_reasons


class CaptionBatches:
    """Adds columns to a batch that holds image files as bytes. Load it once for each worker.

    `column`: where the bytes are. `max_pixels`, `decode_timeout`: as of `captioner caption`. `settings`: fields of
    `captioner.config.ModelConfig` other than `name` (`num_beams`, `max_new_tokens`, `device`, `dtype`, `prompt`,
    `batch_size`, ...). Raises ModelError where the model, or a GPU that was reserved for the worker, cannot be used; a
    bad image is a row with an `error_code`, also one that crashes its decoder.
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
        self._max_pixels = max_pixels or SourceConfig().max_pixels
        self._decoder = GuardedDecoder(ref.spec, self._max_pixels, decode_timeout or SourceConfig().decode_timeout)
        self._decoder.start()
        device = pick_device(config.device)
        self._ref = settle_dtype(ref, config.dtype, device.type)
        self._captioner = load(self._ref, str(device), config.batch_size)
        self._column = column

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `caption` (None where failed), `num_tokens`, `logprob_mean` (NaN where failed), `error_code`
        ("" = fine) and `error_message` for each row."""
        from captioner.imaging import decode_images

        raws = [RawImage(str(row), "", bytes(data)) for row, data in enumerate(batch[self._column])]
        decoded = decode_images(raws, self._ref.spec, self._max_pixels, self._decoder)
        codes = decoded.rows["error_code"].to_pylist()
        messages = decoded.rows["error_message"].to_pylist()
        texts: list[str | None] = [None] * len(raws)
        tokens, logprobs = np.zeros(len(raws), np.int32), np.full(len(raws), np.nan, np.float32)
        fine = [row for row, code in enumerate(codes) if not code]
        for row, result in zip(fine, caption_or_reasons(self._captioner, decoded.pixels[fine]), strict=True):
            if isinstance(result, str):
                codes[row], messages[row] = "generate_error", result
            else:
                texts[row], tokens[row] = result.text, result.num_tokens
                logprobs[row] = np.nan if result.logprob_mean is None else result.logprob_mean
        return batch | {
            "caption": np.array(texts, dtype=object),
            "num_tokens": tokens,
            "logprob_mean": logprobs,
            "error_code": np.array(codes, dtype=object),
            "error_message": np.array(messages, dtype=object),
        }
