"""Models of each family with random weights, small enough to caption hundreds of images in a second.

For `captioner.testing`. torch and transformers are imported when a model is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from captioner.testing.tiny_chat_models import CHAT, TINY_CHATS, make_tiny_chat
from captioner.testing.tiny_parts import END, LAYERS, PAD, START, special_ids, starter_tokenizer

TINY_SIDE = 32  # pixels, of the tiny models' images


def make_tiny_model(family: str, path: Path, seed: int = 0) -> Path:
    """A model directory of `family` (see `captioner.models.FAMILIES`) with random weights.

    Images of 32x32, or of families that take any size of about that; vocabulary and tokenizer of the starter. A
    random model says the same of every image; here the weight matrices are enlarged until the captions of different
    images differ.
    """
    import torch

    from captioner.models.pretrained import quiet

    makers: dict[str, Callable[[Path], Any]] = {
        "git": _make_git,
        "blip": _make_blip,
        "blip-2": _make_blip2,
        "vision-encoder-decoder": _make_vision_encoder_decoder,
        "florence2": _make_florence2,
        "idefics3": partial(_make_tiled, "Idefics3"),
        "smolvlm": partial(_make_tiled, "SmolVLM"),
        "qwen2_vl": _make_qwen2,
        "qwen2_5_vl": _make_qwen2_5,
    }
    makers |= {family: partial(make_tiny_chat, family) for family in TINY_CHATS}
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = makers[family](path)
        _enlarge(model, **_gains(family))
        model.save_pretrained(path)
    return path


# By how much the weight matrices are enlarged (transformers draws them with a standard deviation of 0.02); those of
# BLIP's text layers less, or they drown the image; the end token's row more, so that some captions end early.
_GAINS: dict[str, dict[str, float]] = {
    "git": {"gain": 20.0, "end_gain": 2.0},
    "blip": {"gain": 25.0, "end_gain": 2.0, "text_gain": 10.0},
    "blip-2": {"gain": 25.0, "end_gain": 1.6},
    "vision-encoder-decoder": {"gain": 25.0, "end_gain": 1.6},
    "florence2": {"gain": 15.0, "end_gain": 1.6},
}


def _gains(family: str) -> dict[str, float]:
    gain = TINY_CHATS[family].gain if family in TINY_CHATS else 15.0
    return _GAINS.get(family, {"gain": gain, "end_gain": 1.6})


def _enlarge(model: Any, gain: float, end_gain: float, text_gain: float | None = None) -> None:
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "position_embedding" not in name:
                weight.mul_(text_gain if text_gain and name.startswith("text_decoder.bert.encoder") else gain)
        parts = (getattr(model, name, None) for name in ("text_decoder", "decoder", "language_model"))
        writer = next((part for part in parts if part is not None), model)
        writer.get_output_embeddings().weight[END] *= end_gain


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _make_git(path: Path) -> Any:
    from transformers import GitConfig, GitForCausalLM, GitProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = starter_tokenizer()
    side = {"height": TINY_SIDE, "width": TINY_SIDE}
    GitProcessor(CLIPImageProcessorPil(size={"shortest_edge": TINY_SIDE}, crop_size=side), tokenizer).save_pretrained(
        path
    )
    return GitForCausalLM(
        GitConfig(
            vision_config=LAYERS | {"image_size": TINY_SIDE, "patch_size": 8},
            vocab_size=len(tokenizer),
            max_position_embeddings=64,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
            **LAYERS,
            **_NO_DROPOUT,
        )
    )


def _make_blip(path: Path) -> Any:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = starter_tokenizer()
    side = {"height": TINY_SIDE, "width": TINY_SIDE}
    BlipProcessor(BlipImageProcessorPil(size=side), tokenizer).save_pretrained(path)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "encoder_hidden_size": LAYERS["hidden_size"],
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
        "sep_token_id": END,
    }
    return BlipForConditionalGeneration(
        BlipConfig(
            text_config=LAYERS | _NO_DROPOUT | text,
            vision_config=LAYERS | {"image_size": TINY_SIDE, "patch_size": 8, "initializer_range": 0.02},
        )
    )


def _make_vision_encoder_decoder(path: Path) -> Any:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    tokenizer = starter_tokenizer()
    tokenizer.save_pretrained(path)
    ViTImageProcessorPil(size={"height": TINY_SIDE, "width": TINY_SIDE}).save_pretrained(path)
    encoder = ViTConfig(image_size=TINY_SIDE, patch_size=8, **LAYERS, **_NO_DROPOUT)
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        add_cross_attention=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = START, PAD, END
    return VisionEncoderDecoderModel(config=config)


def _make_blip2(path: Path) -> Any:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, OPTConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = starter_tokenizer("<image>", ends=False)
    side = {"height": TINY_SIDE, "width": TINY_SIDE}
    Blip2Processor(BlipImageProcessorPil(size=side), tokenizer, num_query_tokens=4).save_pretrained(path)
    text = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0} | special_ids(
        tokenizer
    )
    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=LAYERS | {"image_size": TINY_SIDE, "patch_size": 8, "initializer_range": 0.02},
            qformer_config=LAYERS | _NO_DROPOUT,
            text_config=OPTConfig(**LAYERS, **text).to_dict(),
            num_query_tokens=4,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )


def _make_florence2(path: Path) -> Any:
    from transformers import BartConfig, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = starter_tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    side = {"height": TINY_SIDE, "width": TINY_SIDE}
    tokens = {"image_seq_length": 65}  # 8 x 8 places, and one for all of them
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, **tokens)
    Florence2Processor(images, tokenizer).save_pretrained(path)
    sizes = dict.fromkeys(("num_heads", "num_groups"), (2, 2, 2, 2))
    vision = {"depths": (1, 1, 1, 1), "embed_dim": (8, 16, 16, 16), "window_size": 4, "projection_dim": 32} | sizes
    shrinking = {"patch_size": (3, 3, 3, 3), "patch_stride": (2, 2, 1, 1), "patch_padding": (1, 1, 1, 1)}
    halves = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    text = BartConfig(
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=256,
        dropout=0.0,
        decoder_start_token_id=END,
        forced_bos_token_id=START,
        **halves,
        **special_ids(tokenizer),
    )
    return Florence2ForConditionalGeneration(
        Florence2Config(
            vision_config=vision | shrinking | {"drop_path_rate": 0.0},
            text_config=text.to_dict(),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )


def _make_tiled(kind: str, path: Path) -> Any:
    """Idefics3 or SmolVLM: images of at most 32 x 32, cut into tiles of 16 x 16."""
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    positions = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *positions]
    tokenizer = starter_tokenizer(*special, ends=False)
    images = {"Idefics3": Idefics3ImageProcessorPil, "SmolVLM": SmolVLMImageProcessorPil}[kind](
        size={"longest_edge": TINY_SIDE}, max_image_size={"longest_edge": TINY_SIDE // 2}
    )
    # 16 x 16 pixels are 4 x 4 patches, of which each 2 x 2 become one token.
    transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=CHAT.replace("IMAGE", "<image>")
    ).save_pretrained(path)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=LAYERS | {"image_size": TINY_SIDE // 2, "patch_size": 4},
        text_config=LAYERS | special_ids(tokenizer) | {"model_type": "llama", "max_position_embeddings": 256},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=PAD,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _make_qwen2(path: Path) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2} | _QWEN_VISION
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**_qwen(path, Qwen2VLProcessor), vision_config=vision))


def _make_qwen2_5(path: Path) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 16} | _QWEN_VISION
    vision["fullatt_block_indexes"] = [1]
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(**_qwen(path, Qwen2_5_VLProcessor), vision_config=vision)
    )


_QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4}


def _qwen(path: Path, kind: Any) -> dict[str, Any]:
    """Settings of a Qwen-VL; saves its processor: images of 64 to 1024 pixels, in multiples of 8."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from captioner.models.processors import images_only

    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = starter_tokenizer(*special, ends=False)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": TINY_SIDE**2}, patch_size=4, merge_size=2
    )
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    images_only(kind)(images, tokenizer, None, chat_template=template).save_pretrained(path)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    heads = {"num_key_value_heads": 2, "max_position_embeddings": 256, "rope_parameters": rope}
    return dict(zip(names, tokenizer.convert_tokens_to_ids(special), strict=True)) | {
        "text_config": LAYERS | special_ids(tokenizer) | heads
    }
