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
_VOCABULARY = "the number of the tokenizer's tokens"  # in settings, in place of that number
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


@dataclass(frozen=True)
class TinyChat:
    """What a tiny model of one type is made of.

    `kind`: the beginning of the names of its classes in transformers. `images`: the module below transformers.models
    and the class of its image processor, with its settings. `tokens`: special tokens by the name that the tokenizer has
    for them. `image`: the text of an image in the chat template; "" for a model without one. `processor`, `vision`,
    `text` and `settings`: options of the processor, and sections and settings of the configuration; settings that are
    special tokens become their ids. `gain`: by how much the weights are enlarged (see `captioner.testing.tiny_models`).
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

_QWEN3_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
}
_QWEN3_ROPE = _ROPE | {"mrope_interleaved": True}
_QWEN3_5_TEXT: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": _QWEN3_ROPE | {"partial_rotary_factor": 1.0},
}
_TILES = {"size": {"height": 16, "width": 16}, "crop_to_patches": True, "max_patches": 4}
_GRIDS = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
_TILE_VISION = LAYERS | {"image_size": 16, "patch_size": 4}  # 4 x 4 patches
_GLM_TOKENS = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "image_start_token": "<|begin_of_image|>",
    "image_end_token": "<|end_of_image|>",
    "video_start_token": "<|begin_of_video|>",
    "video_end_token": "<|end_of_video|>",
}

TINY_CHATS = {
    "qwen3_vl": TinyChat(
        "Qwen3VL",
        _QWEN_IMAGES,
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        vision=_QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        text={"rope_parameters": _QWEN3_ROPE},
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
        ("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil", _TILES),
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        | {"video_token": "<video>"},
        "<IMG_CONTEXT>\n",
        processor={"image_seq_length": 4},
        vision=LAYERS | {"image_size": [16, 16], "patch_size": [4, 4]},
        text={"model_type": "qwen2"},
        settings={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
    ),
    "qwen3_vl_moe": TinyChat(
        "Qwen3VLMoe",
        _QWEN_IMAGES,
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        vision=_QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        text={"rope_parameters": _QWEN3_ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        settings=_QWEN_IDS,
    ),
    "qwen3_5": TinyChat(
        "Qwen3_5",
        _QWEN_IMAGES,
        _QWEN_TOKENS,
        _QWEN_IMAGE,
        vision=_QWEN3_VISION,
        text=_QWEN3_5_TEXT,
        settings=_QWEN_IDS,
        gain=8.0,
    ),
    "gemma4": TinyChat(
        "Gemma4",
        (
            "gemma4.image_processing_pil_gemma4",
            "Gemma4ImageProcessorPil",
            {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        ),
        {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
        | {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
        "<|image|>",
        vision=LAYERS | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
        text={"global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400},
        settings={"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>"},
        gain=12.0,
    ),
    "llava_next": TinyChat(
        "LlavaNext",
        (
            "llava_next.image_processing_pil_llava_next",
            "LlavaNextImageProcessorPil",
            {"size": {"shortest_edge": SIDE}} | _CROP | _GRIDS,
        ),
        {"image_token": "<image>"},
        "<image>\n",
        processor=_LLAVA_PROCESSOR,
        vision=_VISION | {"model_type": "clip_vision_model"},
        text={"model_type": "llama"},
        settings={"image_token_index": "<image>"} | _GRIDS,
    ),
    "llava_onevision": TinyChat(
        "LlavaOnevision",
        (
            "llava_onevision.image_processing_pil_llava_onevision",
            "LlavaOnevisionImageProcessorPil",
            {"size": _SQUARE} | _GRIDS,
        ),
        {"image_token": "<image>", "video_token": "<video>"},
        "<image>\n",
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        vision=_VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text={"model_type": "qwen2"},
        settings={"image_token_index": "<image>", "video_token_index": "<video>"} | _GRIDS,
    ),
    "glm4v": TinyChat(
        "Glm4v",
        (
            "glm4v.image_processing_pil_glm4v",
            "Glm4vImageProcessorPil",
            {"size": {"shortest_edge": 128, "longest_edge": 2 * SIDE**2}, "patch_size": 4},
        ),
        _GLM_TOKENS,
        "<|begin_of_image|><|image|><|end_of_image|>",
        vision={"depth": 2, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
        | {"image_size": SIDE, "patch_size": 4},
        text={"rope_parameters": _ROPE},
        settings={f"{name}_id": token for name, token in _GLM_TOKENS.items()},
    ),
    "aya_vision": TinyChat(
        "AyaVision",
        ("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil", _TILES),
        {
            "image_token": "<image>",
            "start": "<|START_OF_IMG|>",
            "end": "<|END_OF_IMG|>",
            "patch": "<|IMG_PATCH|>",
            "tile": "TILE",
            "global": "TILE_GLOBAL",
        },
        "<image>",
        processor={"patch_size": 4, "img_size": 16, "downsample_factor": 2},
        vision=_TILE_VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text={"model_type": "cohere2"},
        settings={"image_token_index": "<|IMG_PATCH|>"},
    ),
    "ovis2": TinyChat(
        "Ovis2",
        ("ovis2.image_processing_pil_ovis2", "Ovis2ImageProcessorPil", _TILES),
        {name: f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END", "ATOM")} | {"image_token": "<image>"},
        "<image>\n",
        processor={"image_seq_length": 4},
        vision=_TILE_VISION | {"hidden_stride": 2, "vocab_size": 64},
        text={"model_type": "qwen2"},
        settings={"image_token_id": "<IMG_ATOM>", "hidden_size": 32, "vocab_size": _VOCABULARY}
        | {"visual_indicator_token_ids": [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]},
        gain=25.0,
    ),
    "minicpmv4_6": TinyChat(
        "MiniCPMV4_6",
        (
            "minicpmv4_6.image_processing_pil_minicpmv4_6",
            "MiniCPMV4_6ImageProcessorPil",
            {"scale_resolution": SIDE, "patch_size": 4, "max_slice_nums": 4},
        ),
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
        "<|image_pad|>",
        vision=LAYERS | {"image_size": SIDE, "patch_size": 4, "insert_layer_id": 0},
        text={"model_type": "qwen3_5_text"} | _QWEN3_5_TEXT,
        settings={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "insert_layer_id": 0},
        gain=8.0,
    ),
    "deepseek_vl": TinyChat(
        "DeepseekVL",
        ("deepseek_vl.image_processing_pil_deepseek_vl", "DeepseekVLImageProcessorPil", {"size": _SQUARE}),
        {"image_token": "<image_placeholder>"},
        "<image_placeholder>",
        processor={"num_image_tokens": 16},
        vision=_VISION | {"model_type": "siglip_vision_model"},
        text={"model_type": "llama"},
        settings={"image_token_id": "<image_placeholder>"},
    ),
    "paligemma": TinyChat(
        "PaliGemma",
        (
            "siglip.image_processing_pil_siglip",
            "SiglipImageProcessorPil",
            {"size": _SQUARE, "image_seq_length": 16},
        ),
        {"image_token": "<image>"},
        "",
        vision=_VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text={"model_type": "gemma"},
        settings={"image_token_index": "<image>", "vocab_size": _VOCABULARY, "projection_dim": 32, "hidden_size": 32},
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
    kind = processor_class(family_of(family), path)
    absent = dict.fromkeys(set(kind.get_attributes()) - {"image_processor", "tokenizer"})
    parts = {"image_processor": images, "tokenizer": tokenizer} | absent | tiny.processor
    if tiny.image:
        parts["chat_template"] = CHAT.replace("IMAGE", tiny.image)
    images_only(kind)(**parts).save_pretrained(path)
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    ids[_VOCABULARY] = len(tokenizer)
    settings = {name: _with_ids(value, ids) for name, value in tiny.settings.items()}
    text = _TEXT | special_ids(tokenizer) | tiny.text
    config = getattr(transformers, f"{tiny.kind}Config")(
        text_config=text, vision_config=tiny.vision, tie_word_embeddings=False, **settings
    )
    model = getattr(transformers, f"{tiny.kind}ForConditionalGeneration")(config)
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():  # drawn as zeros, so that nothing passes before training
            torch.nn.init.normal_(weight, std=0.02)
    return model


def _with_ids(value: Any, ids: dict[str, int]) -> Any:
    """Return a setting with ids in place of special tokens."""
    if isinstance(value, list):
        return [_with_ids(part, ids) for part in value]
    return ids.get(value, value) if isinstance(value, str) else value
