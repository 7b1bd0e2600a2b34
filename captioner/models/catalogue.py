"""The list that `captioner models` prints: the families, well-known checkpoints of each, and which to begin with."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass

from captioner.models.families import FAMILY_BY_NAME, QUESTION

MAX_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on the hub, or the starter.

    `year`: of its release. `parameters`: in billions. `safetensors`: False where the hub has pickled weights only.
    """

    name: str
    year: int
    parameters: float
    licence: str
    language: str = "English"
    safetensors: bool = True

    @property
    def memory(self) -> float:
        """The memory of the weights in bfloat16, in GB: two bytes a parameter."""
        return 2 * self.parameters

    @property
    def lines(self) -> list[str]:
        """The two lines of the list, of at most 60 characters."""
        weights = "safetensors" if self.safetensors else "pickled (.bin)"
        return [
            f"  {self.name:<43}{_short(self.parameters):>6}{_size(self.memory):>9}",
            f"    {self.year}; {self.licence}; {self.language}; {weights}",
        ]


def _short(parameters: float) -> str:
    return f"{parameters:.1f} B" if parameters >= 1 else f"{1000 * parameters:.0f} M"


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.0f} MB"


# Licences are those in the metadata of the cards on huggingface.co, years those of the first release there, and numbers
# of parameters those that the hub counts in the safetensors files, all as of 2026, read in the sources that are named.
CATALOGUE: dict[str, tuple[Checkpoint, ...]] = {
    "git": (
        Checkpoint("starter", 2026, 0.0013, "Apache-2.0"),  # captioner/starter/model
        # huggingface.co/microsoft/git-base-coco (MIT, December 2022); 176.6 M parameters as loaded here
        Checkpoint("microsoft/git-base-coco", 2022, 0.177, "MIT"),
        # promptlayer.com/models/git-large-coco (394 M, MIT, safetensors)
        Checkpoint("microsoft/git-large-coco", 2022, 0.394, "MIT"),
    ),
    "blip": (
        # unfragile.ai, the hub's tags of both in May 2026: license:bsd-3-clause; safetensors for the large one only.
        # Parameters from the size of the float32 weights, 1.0 and 1.9 GB.
        Checkpoint("Salesforce/blip-image-captioning-base", 2022, 0.247, "BSD-3-Clause", safetensors=False),
        Checkpoint("Salesforce/blip-image-captioning-large", 2022, 0.470, "BSD-3-Clause"),
    ),
    "blip-2": (
        # promptlayer.com/models/blip2-opt-27b (3.74 B, MIT); the hub's tags of blip2-opt-2.7b-coco: license:mit,
        # safetensors. The text model, OPT, has a licence of its own.
        Checkpoint("Salesforce/blip2-opt-2.7b", 2023, 3.74, "MIT (its OPT: OPT licence)"),
        # README of huggingface.co/Salesforce/blip2-flan-t5-xl (license: mit); promptlayer.com (3.94 B)
        Checkpoint("Salesforce/blip2-flan-t5-xl", 2023, 3.94, "MIT"),
    ),
    # unfragile.ai, the hub's tags in May 2026: license:apache-2.0, no safetensors; March 2022
    "vision-encoder-decoder": (
        Checkpoint("nlpconnect/vit-gpt2-image-captioning", 2022, 0.239, "Apache-2.0", safetensors=False),
    ),
    "florence2": (
        # aiwiki.ai/wiki/florence_2 and llmreference.com: MIT, 232 and 771 M; transformers' docs: June 2024
        Checkpoint("florence-community/Florence-2-base", 2024, 0.232, "MIT"),
        Checkpoint("florence-community/Florence-2-large", 2024, 0.771, "MIT"),
    ),
    "idefics3": (
        # README of huggingface.co/HuggingFaceTB/SmolVLM-Instruct: Apache 2.0, English
        Checkpoint("HuggingFaceTB/SmolVLM-256M-Instruct", 2025, 0.256, "Apache-2.0"),
        # README of huggingface.co/HuggingFaceM4/Idefics3-8B-Llama3: Apache 2.0, English; its parent is Llama 3.1
        Checkpoint("HuggingFaceM4/Idefics3-8B-Llama3", 2024, 8.46, "Apache-2.0"),
    ),
    "smolvlm": (
        # card of SmolVLM2-2.2B-Instruct: Apache 2.0, English
        Checkpoint("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 2025, 0.507, "Apache-2.0"),
        Checkpoint("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 2025, 2.25, "Apache-2.0"),
    ),
    # From the size of the float32 weights, 8.8 GB
    "qwen2_vl": (Checkpoint("Qwen/Qwen2-VL-2B-Instruct", 2024, 2.2, "Apache-2.0", "many languages"),),
    "qwen2_5_vl": (
        # openlaboratory.ai/models/qwen2_5-vl-3b-instruct: Qwen Research License, non-commercial; January 2025
        Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", 2025, 3.75, "Qwen Research", "many languages"),
        Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", 2025, 8.3, "Apache-2.0", "many languages"),
    ),
    "qwen3_vl": (
        # arXiv:2511.21631 (dense models of 2, 4, 8 and 32 B); README of huggingface.co/Qwen/Qwen3-VL-8B-Instruct:
        # license: apache-2.0; October 2025. Parameters counted in transformers' model of the published layer sizes: the
        # numbers in the names leave out the vision part.
        Checkpoint("Qwen/Qwen3-VL-2B-Instruct", 2025, 2.13, "Apache-2.0", "many languages"),
        Checkpoint("Qwen/Qwen3-VL-4B-Instruct", 2025, 4.44, "Apache-2.0", "many languages"),
        Checkpoint("Qwen/Qwen3-VL-8B-Instruct", 2025, 8.77, "Apache-2.0", "many languages"),
        Checkpoint("Qwen/Qwen3-VL-32B-Instruct", 2025, 33.4, "Apache-2.0", "many languages"),
    ),
    "gemma3": (
        # hivebook.wiki on Gemma 3: Gemma Terms of Use, March 2025, 140 languages; featherless.ai: 4.3 B parameters
        Checkpoint("google/gemma-3-4b-it", 2025, 4.3, "Gemma Terms of Use", "140 languages"),
    ),
}
RECOMMENDED = {
    "a laptop without GPU": "microsoft/git-base-coco",
    "a GPU of 8 GB": "Qwen/Qwen3-VL-2B-Instruct",
    "a GPU of 24 GB": "Qwen/Qwen3-VL-8B-Instruct",
    "a GPU of 80 GB": "Qwen/Qwen3-VL-32B-Instruct",
    "many languages": "google/gemma-3-4b-it",
    "tags": "Qwen/Qwen3-VL-4B-Instruct",
}

_TASKS = FAMILY_BY_NAME["florence2"].tasks
_LEGEND = {
    "search": "fast: a search of captioner's own with the token ids of transformers' generate; generic: generate.",
    "pixels": "fixed: images are resized to one size as by the model's image processor (--preprocess fast, or "
    "processor for exactly its pixels); any: images of any size go to the model's image processor itself.",
    "prompt": "none: takes none; start: the caption continues --prompt; question: asked of a chat model (default "
    f"{QUESTION!r}); task: {', '.join(_TASKS)}, or a question in words (default {_TASKS[0]});"
    f" prefix: text before the caption, in the words of the model's card.",
    "memory": "of the weights in bfloat16; images, beams and the batch take more. Twice as much in float32.",
}
_RECOMMENDED_NOTE = (
    "Chosen by memory, age, licence and languages, not by measuring captions: try a few on your own images. Tags: "
    "--prompt 'List ten tags for this image, separated by commas.'"
)
_PICKLED = "Pickled weights are refused; make safetensors of them: captioner models convert DIR OUT."
_LICENCES = (
    "A licence here is that of the checkpoint's own card, which may have changed. Qwen Research is for "
    "non-commercial use."
)
_OFFLINE = "For machines without network, download a checkpoint once and give its directory to --model:"
_DOWNLOAD = """\
  hf download microsoft/git-base-coco --exclude '*.bin' \\
    --exclude '*.h5' --exclude '*/*' --local-dir models/git"""


def table() -> str:
    """Return the catalogue as text, for terminals of 60 columns and more."""
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    lines = ["Begin with", *(f"  {use:<22}{name}" for use, name in RECOMMENDED.items()), ""]
    lines += [*textwrap.wrap(_RECOMMENDED_NOTE, width), "", f"{'Checkpoints':<45}{'size':>6}{'memory':>9}"]
    for name, checkpoints in CATALOGUE.items():
        family = FAMILY_BY_NAME[name]
        facts = f"{name}: search {family.search}, pixels {family.pixels}, prompt {family.prompt}"
        lines += ["", *textwrap.wrap(facts, width, break_on_hyphens=False)]
        lines += [line for checkpoint in checkpoints for line in checkpoint.lines]
    others = [name for name in FAMILY_BY_NAME if name not in CATALOGUE]
    lines += [
        "",
        *textwrap.wrap(f"Also supported: {', '.join(others)}, and other chat models (docs/models.md).", width),
    ]
    for term, text in _LEGEND.items():
        lines += ["", *textwrap.wrap(f"{term}  {text}", width, subsequent_indent=" " * 8)]
    for text in (_LICENCES, _PICKLED, _OFFLINE):
        lines += ["", *textwrap.wrap(text, width, break_on_hyphens=False)]
    return "\n".join([*lines, _DOWNLOAD])
