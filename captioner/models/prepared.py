"""Images that decoders have resized for Idefics3, SmolVLM and Qwen-VL: cut into tiles or patches, and normalised.

Each class stands in for the image processor inside a model's processor, which then writes the prompt and its
placeholders as always. Values stay uint8 until they are on the device; `normalised` does there what the image processor
does last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import BatchFeature

from captioner.data import PixelSpec

Image = npt.NDArray[np.uint8]  # [height, width, 3]


class _Prepared:
    """Has all settings of the image processor `settings`."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settings, name)

    def _normalised(self, values: torch.Tensor) -> torch.Tensor:
        """Return uint8 values [N, 3, ...] rescaled and normalised, float32."""
        ones = (1,) * (values.dim() - 2)
        mean = torch.tensor(self.settings.image_mean, device=values.device).view(3, *ones)
        std = torch.tensor(self.settings.image_std, device=values.device).view(3, *ones)
        normalised: torch.Tensor = (values.float() * self.settings.rescale_factor - mean) / std
        return normalised


class PreparedTiles(_Prepared):
    """Cuts images with PixelSpec.resize "tiles"."""

    def __call__(self, images: Sequence[Sequence[Image]], **options: Any) -> BatchFeature:
        """Return the tiles of one image for each prompt.

        `pixel_values`: uint8 [N, T, 3, S, S], where T is the largest number of tiles; only the first `num_tiles` [N] of
        an image are set. `rows`, `cols`: of tiles, without the whole image; 0 of an image that is one tile.
        """
        side = self.settings.max_image_size["longest_edge"]
        grids = [(image.shape[0] // side - 1, image.shape[1] // side) for (image,) in images]
        grids = [(rows, cols) if rows else (0, 0) for rows, cols in grids]
        num_tiles = [rows * cols + 1 for rows, cols in grids]
        tiles = np.empty((len(images), max(num_tiles), 3, side, side), np.uint8)
        for (image,), (rows, cols), cut in zip(images, grids, tiles, strict=True):
            split = image[: rows * side].reshape(rows, side, cols, side, 3) if rows else image[:0]
            if rows:
                cut[: rows * cols].reshape(rows, cols, 3, side, side)[:] = split.transpose(0, 2, 4, 1, 3)
            cut[rows * cols] = image[rows * side :, :side].transpose(2, 0, 1)
        return BatchFeature(
            {
                "pixel_values": torch.from_numpy(tiles),
                "num_tiles": torch.tensor(num_tiles),
                "rows": [[rows] for rows, _ in grids],
                "cols": [[cols] for _, cols in grids],
            }
        )

    def normalised(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the model: tiles of float32, 0 where an image has fewer than others.

        Without the processor's mask of pixels, which of whole tiles is 1 everywhere.
        """
        inputs = dict(inputs)
        tiles, num_tiles = inputs["pixel_values"], inputs.pop("num_tiles")
        used = torch.arange(tiles.shape[1], device=tiles.device) < num_tiles[:, None]
        normalised = self._normalised(tiles.flatten(0, 1)).view(tiles.shape)
        return inputs | {"pixel_values": normalised.masked_fill_(~used[:, :, None, None, None], 0)}


class PreparedPatches(_Prepared):
    """Cuts images with PixelSpec.resize "patches"."""

    def __call__(self, images: Sequence[Sequence[Image]], **options: Any) -> BatchFeature:
        """Return the patches of one image for each prompt, one image after the other.

        `pixel_values`: uint8 [patches, 3 * patch_size ** 2]. `image_grid_thw`: int64 [N, 3], 1 and the rows and columns
        of patches. Raises ValueError for an image that the image processor refuses.
        """
        patch, merge = self.settings.patch_size, self.settings.merge_size
        grids, patches = [], []
        for (image,) in images:
            rows, cols = (side // (patch * merge) for side in image.shape[:2])
            if image.shape[:2] != (rows * patch * merge, cols * patch * merge):
                raise ValueError("the image's aspect ratio is above 200, which the model refuses")
            blocks = image.reshape(rows, merge, patch, cols, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            patches.append(blocks.reshape(-1, 3 * patch * patch))
            grids.append([1, rows * merge, cols * merge])
        values = torch.from_numpy(np.concatenate(patches))
        return BatchFeature({"pixel_values": values, "image_grid_thw": torch.tensor(grids)})

    def normalised(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the model: patches float32 [patches, 3 * T * patch_size ** 2], where all T are equal."""
        patches, times = inputs["pixel_values"], self.settings.temporal_patch_size
        values = self._normalised(patches.view(len(patches), 3, -1))
        repeated = values[:, :, None].expand(-1, -1, times, -1).reshape(len(patches), -1)
        return inputs | {"pixel_values": repeated}


def prepared_by_decoders(spec: PixelSpec, image_processor: Any) -> PreparedTiles | PreparedPatches | None:
    """Return what stands in for an image processor; None where decoders do not do its work."""
    if spec.resize == "tiles":
        return PreparedTiles(image_processor)
    return PreparedPatches(image_processor) if spec.resize == "patches" else None
