"""Train the starter model: `python -m captioner.starter.build OUT [--steps N] [--threads N]`.

Trains a GIT model of 1.4 million parameters and a byte-level BPE tokenizer from scratch on rendered scenes (see
`captioner.starter.scenes`). Every batch has new scenes, so the model cannot overfit and needs neither dropout nor
weight decay. Loss and logits are computed for caption tokens only. The same seed, steps and thread count give the same
weights on the same machine.

Writes a model directory that plain `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor` load,
with a model card that states the WER on scenes of another seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import GenerationConfig, GitConfig, GitForCausalLM, GitProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captioner.scoring.wer import corpus_wer
from captioner.starter.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, make_scene, make_scenes

TRAIN_SEED, HELD_OUT_SEED = 1, 2
PIXELS = 64
VOCABULARY = 384
PAD, BOS, EOS = 0, 1, 2
HELD_OUT = 1_000
CARD = """---
library_name: transformers
pipeline_tag: image-to-text
license: apache-2.0
language: en
tags: [image-captioning, git]
metrics: [wer]
---

# Captioner's starter model

A GIT model of {parameters:,} parameters that ships with the package, so that everything can be tried without a
download. It knows rendered scenes (`captioner render-scenes`) and nothing else: **its captions of photographs mean
nothing.**

- Input: {pixels} x {pixels} pixels, RGB, shorter side resized and centre cropped.
- Vocabulary: byte-level BPE of {vocabulary} tokens, learned on the scenes; any text survives the round trip.
- Scenes: {colours} colours, {shapes} shapes, {sizes} sizes, {backgrounds} backgrounds, one to three things in a row or
  a column.
- Training: `python -m captioner.starter.build OUT{flags}`, {steps:,} steps of {batch_size} fresh scenes, AdamW at
  {learning_rate:g} with linear decay, cross-entropy over caption tokens; {minutes} minutes on {threads} CPU
  threads.
- WER {wer:.4f} on {held_out_scenes:,} held-out scenes of another seed (greedy; minimum over two references).

Trained only on images rendered by this package.
"""
_VOCABULARY = {
    "pixels": PIXELS,
    "vocabulary": VOCABULARY,
    "colours": len(COLOURS),
    "shapes": len(SHAPES),
    "sizes": len(SIZES),
    "backgrounds": len(BACKGROUNDS),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on both captions of 5,000 scenes; it encodes and decodes any text without loss."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [caption for scene in make_scenes(5_000, TRAIN_SEED) for caption in scene.captions]
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model() -> GitForCausalLM:
    """Create an untrained model."""
    config = GitConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": PIXELS,
            "patch_size": 8,
        },
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = GitForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=40)
    return model


def make_processor(tokenizer: PreTrainedTokenizerFast) -> GitProcessor:
    """Create the processor of the model."""
    side = {"height": PIXELS, "width": PIXELS}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return GitProcessor(image_processor, tokenizer)


class SceneBatches(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches of new scenes: pixels float32 [N, 3, 64, 64] in -1..1, token ids int64 [N, T] padded with `PAD`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int) -> None:
        self.tokenizer, self.steps, self.batch_size = tokenizer, steps, batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(self.steps):
            first = step * self.batch_size
            scenes = [make_scene(TRAIN_SEED, index) for index in range(first, first + self.batch_size)]
            ids = self.tokenizer([scene.captions[0] for scene in scenes], padding=True, return_tensors="pt").input_ids
            yield pixels_of(scenes), ids


def pixels_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """Render scenes as float32 [N, 3, 64, 64] in -1..1, resized as in `captioner.imaging`."""
    rendered = torch.stack(
        [torch.frombuffer(bytearray(scene.render().tobytes()), dtype=torch.uint8) for scene in scenes]
    )
    side = round((rendered.shape[1] / 3) ** 0.5)
    rendered = rendered.view(-1, side, side, 3).permute(0, 3, 1, 2)
    resized = functional.interpolate(rendered, size=(PIXELS, PIXELS), mode="bicubic", antialias=True)
    return resized.float() / 127.5 - 1.0


def caption_loss(model: GitForCausalLM, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over caption tokens; position t predicts token t + 1."""
    inputs, labels = ids[:, :-1], ids[:, 1:]
    hidden = model.git(input_ids=inputs, attention_mask=(inputs != PAD).long(), pixel_values=pixels).last_hidden_state
    logits = model.output(hidden[:, -inputs.shape[1] :])
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD)


@torch.inference_mode()
def held_out_wer(
    model: GitForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = HELD_OUT, show: int = 0
) -> float:
    """Return the corpus WER of greedy captions on scenes of another seed, against the best reference of each.

    Prints the first `show` scenes whose caption is not the first reference.
    """
    model.eval()
    scenes, captions = list(make_scenes(count, HELD_OUT_SEED)), []
    for first in range(0, count, 100):
        ids = model.generate(pixel_values=pixels_of(scenes[first : first + 100]), max_new_tokens=40, do_sample=False)
        captions += tokenizer.batch_decode(ids, skip_special_tokens=True)
    model.train()
    pairs = [(scene.captions[0], caption) for scene, caption in zip(scenes, captions, strict=True)]
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    for reference, caption in wrong[:show]:
        print(f"  reference: {reference}\n  caption:   {caption}", flush=True)
    wer = corpus_wer(captions, [scene.captions for scene in scenes])
    assert wer is not None  # every scene has references
    return wer


def train(
    steps: int, batch_size: int, learning_rate: float, seed: int, bf16: bool
) -> tuple[GitForCausalLM, PreTrainedTokenizerFast]:
    """Train with AdamW, linear warm-up and linear decay to zero; returns model and tokenizer."""
    torch.manual_seed(seed)
    tokenizer, model = make_tokenizer(), make_model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    warm_up = max(1, min(200, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    batches = DataLoader(SceneBatches(tokenizer, steps, batch_size), batch_size=None, num_workers=1, prefetch_factor=8)
    start, running_loss = time.perf_counter(), 0.0
    for step, (pixels, ids) in enumerate(batches, start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = caption_loss(model, pixels, ids)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]  # torch annotates only a part of Tensor
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        running_loss += loss.item()
        if step % 50 == 0 or step == steps:
            rate = step / (time.perf_counter() - start)
            minutes_left = (steps - step) / rate / 60
            print(
                f"step {step}/{steps}  loss {running_loss / 50:.4f}  {rate:.2f} steps/s  ETA {minutes_left:.1f} min",
                flush=True,
            )
            running_loss = 0.0
        if step % 1000 == 0 and step < steps:
            print(f"step {step}: held-out WER {held_out_wer(model, tokenizer, 200, show=4):.4f}", flush=True)
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    """Train the model, measure it and write the model directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=7_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast (weights stay float32)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    model, tokenizer = train(args.steps, args.batch_size, args.learning_rate, args.seed, args.bf16)
    minutes = (time.perf_counter() - start) / 60
    wer = held_out_wer(model, tokenizer, show=20)
    model.save_pretrained(args.out)
    make_processor(tokenizer).save_pretrained(args.out)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "threads": torch.get_num_threads(),
        "flags": f" --threads {torch.get_num_threads()}" + (" --bf16" if args.bf16 else ""),
        "minutes": round(minutes, 1),
        "held_out_scenes": HELD_OUT,
        "wer": round(wer, 4),
    }
    write_card(args.out, figures)
    print(json.dumps(figures))


def write_card(out: Path, figures: dict[str, Any]) -> None:
    """Write the model card, README.md, with the measured figures."""
    (out / "README.md").write_text(CARD.format(**figures, **_VOCABULARY), encoding="utf-8")


if __name__ == "__main__":
    main()
