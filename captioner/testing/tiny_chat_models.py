"""Chat models with random weights, by a table: what each type's processor, tokenizer and configuration need.

For `captioner.testing.tiny_models`. torch and transformers are imported when a model is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from captioner.testing.tiny_parts import LAYERS, special_ids, starter_tokenizer

SIDE = 32  # pixels, of the largest images
CHAT = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %} {{ part['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_SQUARE = {"height": SIDE, "width": SIDE}
_VISION = LAYERS | {"image_size": SIDE, "patch_size": 8}  # 4 x 4 patches
_TEXT: dict[str, Any] = LAYERS | {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


@dataclass(frozen=True)
class TinyChat:
    """What a tiny model of one type is made of.

    `kind`: the beginning of the names of its classes in transformers. `images`: the module below transformers.models
    and the class of its image processor, with its settings. `tokens`: special tokens by the name that the tokenizer has
    for them. `image`: the text of an image in the chat template. `processor`, `vision`, `text` and `settings`: options
    of the processor, and sections and settings of the configuration; settings that are special tokens become their ids.
    `gain`: by how much the weights are enlarged (see `captioner.testing.tiny_models`).
    """

    kind: str
    images: tuple[str, str, dict[str, Any]]
    tokens: dict[str, str]
    image: str
    processor: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    gain: float = 15.0


_CROP = {"crop_size": _SQUARE}
_LLAVA_PROCESSOR = {
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
_QWEN_IMAGES = (
    "qwen2_vl.image_processing_pil_qwen2_vl",
    "Qwen2VLImageProcessorPil",
    {"size": {"shortest_edge": 64, "longest_edge": SIDE**2}, "patch_size": 4, "merge_size": 2},
)
_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_IDS = {f"{name}_id": token for name, token in _QWEN_TOKENS.items()}

TINY_CHATS = {
    "qwen3_vl": TinyChat(
        "Qwen3VL",
        _QWEN_IMAGES,
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        vision={"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64}
        | {"out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        text={"rope_parameters": _ROPE | {"mrope_interleaved": True}},
        settings=_QWEN_IDS,
    ),
    "gemma3": TinyChat(
        "Gemma3",
        ("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil", {"size": _SQUARE}),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        "<start_of_image>",
        processor={"image_seq_length": 4},
        vision=_VISION | {"model_type": "siglip_vision_model"},
        text={"query_pre_attn_scalar": 16},
        settings={"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}
        | {"image_token_index": "<image_soft_token>", "mm_tokens_per_image": 4},
    ),
    "llava": TinyChat(
        "Llava",
        (
            "llava.image_processing_pil_llava",
            "LlavaImageProcessorPil",
            {"size": {"shortest_edge": SIDE}} | _CROP,
        ),
        {"image_token": "<image>"},
        "<image>\n",
        processor=_LLAVA_PROCESSOR,
        vision=_VISION | {"model_type": "clip_vision_model"},
        text={"model_type": "llama"},
        settings={"image_token_index": "<image>", "image_seq_length": 16},
    ),
    # In none of the tables of captioner.models: tried through its chat template.
    "vipllava": TinyChat(
        "VipLlava",
        ("clip.image_processing_pil_clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": SIDE}} | _CROP),
        {"image_token": "<image>"},
        "<image>\n",
        processor=_LLAVA_PROCESSOR,
        vision=_VISION | {"model_type": "clip_vision_model"},
        text={"model_type": "llama"},
        settings={"image_token_index": "<image>", "vision_feature_layers": [-1, -2]},
    ),
    "internvl": TinyChat(
        "InternVL",
        (
            "got_ocr2.image_processing_pil_got_ocr2",
            "GotOcr2ImageProcessorPil",
            {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "max_patches": 4},
        ),
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        | {"video_token": "<video>"},
        "<IMG_CONTEXT>\n",
        processor={"image_seq_length": 4},
        vision=LAYERS | {"image_size": [16, 16], "patch_size": [4, 4]},
        text={"model_type": "qwen2"},
        settings={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
    ),
}


def make_tiny_chat(family: str, path: Path) -> Any:
    """Save the processor of a tiny model of `family` in `path`, and return its network."""
    import torch
    import transformers

    from captioner.models.families import family_of
    from captioner.models.processors import images_only, processor_class

    tiny = TINY_CHATS[family]
    special = list(dict.fromkeys(tiny.tokens.values()))
    tokenizer = starter_tokenizer(*special, ends=False, extra_special_tokens=tiny.tokens)
    module, name, options = tiny.images
    images = getattr(import_module(f"transformers.models.{module}"), name)(**options)
    kind = processor_class(family_of(family))
    absent = dict.fromkeys(set(kind.get_attributes()) - {"image_processor", "tokenizer"})
    template = CHAT.replace("IMAGE", tiny.image)
    images_only(kind)(
        image_processor=images, tokenizer=tokenizer, chat_template=template, **absent, **tiny.processor
    ).save_pretrained(path)
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    settings = {
        name: ids[value] if isinstance(value, str) and value in ids else value for name, value in tiny.settings.items()
    }
    text = _TEXT | special_ids(tokenizer) | tiny.text
    config = getattr(transformers, f"{tiny.kind}Config")(
        text_config=text, vision_config=tiny.vision, tie_word_embeddings=False, **settings
    )
    model = getattr(transformers, f"{tiny.kind}ForConditionalGeneration")(config)
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():  # drawn as zeros, so that nothing passes before training
            torch.nn.init.normal_(weight, std=0.02)
    return model
