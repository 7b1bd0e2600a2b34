"""A small CLIP, with random weights or trained on the rendered scenes, and a small SigLIP: they judge captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from captioner.testing.tiny_parts import LAYERS, START, special_ids, starter_tokenizer

SIDE = 32  # pixels
END = "<end>"
SCENES, SEED = 1_500, 1_000  # trained on; tests render those of other seeds
BATCH, RATE, WARM_UP = 96, 1e-3, 20


def make_tiny_clip(path: Path, num_steps: int = 0) -> Path:
    """Write a CLIP model directory, trained for so many steps: 120 take 7 s of one core.

    The loss is CLIP's (Radford et al. 2021): each caption of a batch is to find its image, and each image its caption.
    """
    import torch

    from captioner.models.pretrained import quiet

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = _untrained()
        if num_steps:
            _train(model, processor.tokenizer, num_steps)
        processor.save_pretrained(path)
        model.eval().save_pretrained(path)
    return path


def make_tiny_siglip(path: Path) -> Path:
    """Write a SigLIP model directory with random weights, whose texts and images differ."""
    import torch
    from transformers import SiglipConfig, SiglipModel, SiglipProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from captioner.models.pretrained import quiet

    tokenizer, half = make_tokenizer(), [0.5, 0.5, 0.5]
    layers = LAYERS | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config=layers | {"max_position_embeddings": 24, "projection_size": 64} | special_ids(tokenizer),
        vision_config=layers | {"image_size": SIDE, "patch_size": 8},
    )
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SiglipModel(config).eval().save_pretrained(path)
        SiglipProcessor(images, tokenizer).save_pretrained(path)
    return path


def _untrained() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer, side, half = make_tokenizer(), {"height": SIDE, "width": SIDE}, [0.5, 0.5, 0.5]
    layers = LAYERS | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    ids = special_ids(tokenizer) | {"eos_token_id": len(tokenizer) - 1}
    config = CLIPConfig(
        text_config=layers | {"max_position_embeddings": 48} | ids,
        vision_config=layers | {"image_size": SIDE, "patch_size": 8},
        projection_dim=64,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side, image_mean=half, image_std=half)
    return CLIPModel(config), CLIPProcessor(images, tokenizer)


def make_tokenizer() -> Any:
    """The starter's with an end token of the highest id, since CLIP takes the text's embedding from there."""
    from tokenizers import processors

    tokenizer = starter_tokenizer(END)
    special = [("<s>", START), (END, tokenizer.convert_tokens_to_ids(END))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {END}", special_tokens=special
    )
    return tokenizer


def _train(model: Any, tokenizer: Any, num_steps: int) -> None:
    """Train on batches of scenes. The learning rate rises in WARM_UP steps, then falls in a line to 0."""
    import numpy as np
    import torch

    from captioner.scoring.clip_score import PREFIX
    from captioner.starter.scenes import make_scenes

    scenes = list(make_scenes(SCENES, SEED))
    rendered = np.stack([np.asarray(scene.render(SIDE)) for scene in scenes])
    pixels = torch.from_numpy(rendered).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = tokenizer([PREFIX + scene.captions[0] for scene in scenes], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / num_steps)
    )
    for _ in range(num_steps):
        batch = torch.randperm(SCENES)[:BATCH]
        texts = {name: tokens[name][batch] for name in ("input_ids", "attention_mask")}
        loss = model(pixel_values=pixels[batch], **texts, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
