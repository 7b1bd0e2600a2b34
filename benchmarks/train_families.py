"""A training step of each family, ours beside plain transformers' Trainer with the family's published recipe.

    python -m benchmarks.train_families [--families git,qwen2_vl] [--models family=DIR,...] [--batch-size 4] [--steps 6]
        [--precision float32] [--work DIR]

Trainer's side is what the examples of transformers do: a list of images and captions, a collator that opens each image,
calls the model's processor and copies `input_ids` to `labels` without padding, AdamW and clipping. Ours is the step of
`benchmarks.train`, images decoded ahead of it. Both read the same rendered scenes, each in a process of its own whose
OpenMP threads sleep while they wait. Without --models the models are tiny ones with random weights: they show what is
around a step, not the step.
Prints a line for each side, and one JSON object last: samples/s and peak memory by family, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.train import WARM_UP_STEPS, peak_memory, reset_peak_memory, synchronise
from captioner.testing import make_folder, make_tiny_model
from captioner.training.pairs import TRAINABLE

IGNORED = -100  # a label without loss


def trainer_side(args: argparse.Namespace, family: str) -> dict[str, Any]:
    """Return samples/s and peak memory of plain Trainer."""
    from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

    from captioner.training.recipes import recipe_of

    class Timed(TrainerCallback):
        """Notes when the first steps, which allocate, are over."""

        started = 0.0

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == WARM_UP_STEPS:
                synchronise()
                reset_peak_memory()
                self.started = time.perf_counter()

    lines = (Path(args.data) / "metadata.jsonl").read_text().splitlines()
    rows = [(Path(args.data) / row["file_name"], row["captions"][0]) for row in map(json.loads, lines)]
    model = AutoModelForImageTextToText.from_pretrained(args.model)
    recipe, timed = recipe_of(family), Timed()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=WARM_UP_STEPS + args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.lr_scheduler_type,
            bf16=args.precision == "bf16",
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        collate = Collator(family, args.model)
        trainer = Trainer(model, arguments, collate, train_dataset=rows, callbacks=[timed])
        trainer.train()
        synchronise()
    seconds = time.perf_counter() - timed.started
    return {
        "samples_per_second": round(args.batch_size * args.steps / seconds, 3),
        "peak_memory_gb": round(peak_memory(), 3),
    }


class Collator:
    """Makes a batch of (file, caption) by the model's own processor, as the examples of transformers do."""

    def __init__(self, family: str, model: str) -> None:
        from captioner.models.families import family_of
        from captioner.models.pretrained import open_tokenizer
        from captioner.models.processors import open_image_processor, open_processor

        kind = family_of(family)
        self._prompt = kind.default_prompt
        self._make = {"question": self._answers, "task": self._tasks}.get(kind.prompt, self._captions)
        self._tokenizer, self._images = open_tokenizer(model), open_image_processor(model)
        has_own_tokens = kind.prompt in ("question", "task") or family == "blip-2"
        self._processor = open_processor(model, kind) if has_own_tokens else None
        self._reads_captions = family != "vision-encoder-decoder"  # whose decoder reads its labels, shifted

    def __call__(self, rows: list[tuple[Path, str]]) -> dict[str, Any]:
        from PIL import Image

        return self._make([Image.open(file).convert("RGB") for file, _ in rows], [text for _, text in rows])

    def _captions(self, images: list[Any], texts: list[str]) -> dict[str, Any]:
        if self._processor is not None:
            return with_labels(dict(self._processor(images=images, text=texts, padding=True, return_tensors="pt")))
        tokens = dict(self._tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))
        batch = with_labels({"pixel_values": self._images(images, return_tensors="pt").pixel_values} | tokens)
        return batch if self._reads_captions else {name: batch[name] for name in ("pixel_values", "labels")}

    def _tasks(self, images: list[Any], texts: list[str]) -> dict[str, Any]:
        batch = dict(self._processor(images=images, text=[self._prompt] * len(texts), return_tensors="pt"))
        tokens = self._tokenizer(texts, padding=True, return_tensors="pt")
        return batch | {"labels": with_labels(dict(tokens))["labels"]}

    def _answers(self, images: list[Any], texts: list[str]) -> dict[str, Any]:
        template = self._processor.apply_chat_template
        turns = [template(self._turns(text)) for text in texts]
        nested = [[image] for image in images]
        return with_labels(dict(self._processor(images=nested, text=turns, padding=True, return_tensors="pt")))

    def _turns(self, caption: str) -> list[dict[str, Any]]:
        question = [{"type": "image"}, {"type": "text", "text": self._prompt}]
        answer = [{"type": "text", "text": caption}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with its tokens as labels, but for padding."""
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}


def compare(args: argparse.Namespace, work: Path, family: str) -> dict[str, Any]:
    """Return the figures of both sides and their ratios."""
    model = args.models.get(family) or make_tiny_model(family, work / family)
    shared = ["--model", str(model), "--data", str(work / "pairs"), "--precision", args.precision]
    shared += ["--batch-size", str(args.batch_size), "--steps", str(args.steps)]
    commands = {
        "ours": ["benchmarks.train", "--only", "ours"],
        "trainer": ["benchmarks.train_families", "--only", family],
    }
    figures: dict[str, Any] = {}
    for side, command in commands.items():
        done = subprocess.run([sys.executable, "-m", *command, *shared], stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.strip().splitlines()[-1])
        figures[side] = result[args.precision] if side == "ours" else result
        print(family, side, figures[side], file=sys.stderr, flush=True)
    names = ("samples_per_second", "peak_memory_gb")
    return figures | {"ratio": {name: round(figures["ours"][name] / figures["trainer"][name], 3) for name in names}}


def models_of(text: str) -> dict[str, str]:
    """Return the model directories of `family=DIR,...` by family."""
    return dict(part.split("=", 1) for part in text.split(",") if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(TRAINABLE))
    parser.add_argument("--models", type=models_of, default={}, help="family=DIR,... in place of tiny models")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--work", type=Path, help="where models and images are kept; a temporary folder by default")
    for name in ("--only", "--model", "--data"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as ours: a tiny step is faster with threads that spin
    if args.only:
        print(json.dumps(trainer_side(args, args.only)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        if not (work / "pairs").exists():
            make_folder(work / "pairs", 64, seed=5)
        print(json.dumps({family: compare(args, work, family) for family in args.families.split(",")}))


if __name__ == "__main__":
    main()
