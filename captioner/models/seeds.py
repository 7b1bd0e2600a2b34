"""The random numbers of sampled captions. They depend on the image and on --seed, not on its batch or worker.

Equal images get equal captions, as in greedy search, so byte-equal copies need not be captioned again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from captioner.config import ModelConfig
from captioner.errors import UsageError
from captioner.models.ref import ModelRef

MAX_SERVER_SEED = (1 << 31) - 1  # the largest that every model server takes
_OF_SAMPLING = ("top_p", "seed", "num_captions")


def sampling_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a ModelRef that say how captions are sampled."""
    return {name: getattr(config, name) for name in ("temperature", *_OF_SAMPLING)}


def check_sampling(config: ModelConfig) -> None:
    """Raise UsageError for settings of sampling that have no effect, or that beams exclude."""
    if config.temperature and config.num_beams > 1:
        raise UsageError(
            f"--num-beams {config.num_beams} and --temperature {config.temperature:g} exclude each other; give one of "
            "them"
        )
    for name in () if config.temperature else _OF_SAMPLING:
        value = getattr(config, name)
        if value != ModelConfig.model_fields[name].get_default():
            flag = f"--{name.replace('_', '-')} {value:g}"
            raise UsageError(f"{flag}: has no effect without sampling; add --temperature, such as 0.8, or leave it out")


def image_seed(image: npt.NDArray[np.uint8], seed: int, sample: int = 0) -> int:
    """Return the seed of a caption of an image, uint8 [height, width, 3]: 63 bits. `sample`: its number, from 0."""
    digest = blake2b(f"{seed} {sample} {image.shape}".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(image).data)
    return int.from_bytes(digest.digest()) >> 1


def request_sampling(model: ModelConfig | ModelRef, options: Sequence[str], seed: int, count: int) -> dict[str, Any]:
    """Return the settings of a request to a model server for `count` sampled captions; greedy where none are sampled.

    `options`: those of "n" and "seed" that the server takes. `seed`: from `image_seed`.
    """
    settings: dict[str, Any] = {"temperature": model.temperature}
    if model.top_p < 1:
        settings["top_p"] = model.top_p
    if model.temperature and "seed" in options:
        settings["seed"] = seed & MAX_SERVER_SEED
    if count > 1 and "n" in options:
        settings["n"] = count
    return settings


def random_numbers(
    images: Iterable[npt.NDArray[np.uint8]], seed: int, num_captions: int, length: int
) -> npt.NDArray[np.float64]:
    """Return a random number in [0, 1) for each token of each caption of N images, [N, num_captions, length]."""
    numbers = [
        [np.random.default_rng(image_seed(image, seed, sample)).random(length) for sample in range(num_captions)]
        for image in images
    ]
    return np.array(numbers)
