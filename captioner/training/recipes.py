"""Learning rate, warm-up and schedule for each family where the settings name none, each from a published recipe.

The table in docs/train.md has the same values and their sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from captioner.config import TrainConfig

# Of every family with --lora-rank, from LLaMA-Factory's examples/train_lora and smollm's Smol_VLM_FT.ipynb.
LORA_LEARNING_RATE = 1e-4


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a family is fine-tuned by default.

    `warmup_steps`: below 1 a share of all steps. `caption_words`: the usual length of the captions that the family's
    checkpoints were trained on, in words; None where they answer at any length. `source`: where the values are from.
    """

    learning_rate: float
    lr_scheduler_type: Literal["linear", "cosine"]
    warmup_steps: float
    caption_words: int | None
    source: str


_COCO_WORDS = 10  # of a caption of COCO, at the median

_CHAT = Recipe(1e-5, "cosine", 0.1, None, "LLaMA-Factory, examples/train_full/qwen2_5vl_full_sft.yaml")
_RECIPES = {
    "git": Recipe(5e-5, "linear", 0, _COCO_WORDS, "the image captioning guide of transformers"),
    "blip": Recipe(1e-5, "cosine", 0, _COCO_WORDS, "salesforce/BLIP, configs/caption_coco.yaml"),
    "blip-2": Recipe(1e-5, "cosine", 0.1, _COCO_WORDS, "salesforce/LAVIS, blip2/train/caption_coco_ft.yaml"),
    "vision-encoder-decoder": Recipe(5e-5, "linear", 0, _COCO_WORDS, "the defaults of transformers' Trainer"),
    "florence2": Recipe(1e-6, "linear", 0, None, "huggingface.co/blog/finetune-florence2"),
}


def recipe_of(family: str) -> Recipe:
    """Return the recipe of a family; of those that are not in the table, that of chat models."""
    return _RECIPES.get(family, _CHAT)


def with_recipe(config: TrainConfig, family: str) -> TrainConfig:
    """Return the settings with the family's values in place of those that were not given."""
    recipe, settings = recipe_of(family), config.training
    defaults: dict[str, Any] = {
        "learning_rate": recipe.learning_rate if config.model.lora_rank is None else LORA_LEARNING_RATE,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "warmup_steps": recipe.warmup_steps,
    }
    missing = {name: value for name, value in defaults.items() if getattr(settings, name) is None}
    return config.model_copy(update={"training": settings.model_copy(update=missing)})
