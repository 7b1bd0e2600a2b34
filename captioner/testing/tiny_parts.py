"""What the tiny models share: the size of their layers and the starter's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import captioner.starter

PAD, START, END = 0, 1, 2  # ids of the starter's tokenizer
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Settings of a configuration: the size of the tokenizer's vocabulary and its special tokens."""
    special = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    return {"vocab_size": len(tokenizer)} | special


def starter_tokenizer(*special: str, ends: bool = True, **options: Any) -> Any:
    """The starter's, with more special tokens. Unless it `ends` a text, it only begins it."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(Path(captioner.starter.__file__).parent / "model" / "tokenizer.json"))
    if not ends:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_max_length=64 if not special else 4096,
        **options,
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer
