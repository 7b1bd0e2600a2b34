"""The text that a model gets with an image: the prompt in its chat template, and a placeholder for the image."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from captioner.models.pretrained import LOADING_ERRORS, quiet


class PromptError(ValueError):
    """Raised where a model cannot take a prompt. With {columns} in --prompt it may be that of one image."""


def check_no_placeholder(prompt: str, placeholder: str) -> None:
    """Raise PromptError where a prompt holds the text that stands for an image."""
    if placeholder in prompt:
        raise PromptError(f"--prompt contains the image placeholder {placeholder}; remove it from the prompt")


def apply_template(processor: Any, prompt: str, system: str | None = None) -> str:
    """Return the prompt after an image in a user's turn of the model's chat template, after the system prompt.

    Raises PromptError.
    """
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    if system:
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    try:
        with quiet():  # transformers warns of templates without the switch for thinking
            question = processor.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)
    except (*LOADING_ERRORS, TemplateError) as error:
        reason = " ".join(str(error).split())
        raise PromptError(f"its chat template cannot be used: {reason}") from None
    if system and system.strip() not in question:
        raise PromptError("its chat template has no system prompt for --system; put it into --prompt")
    placeholder = getattr(processor, "image_token", None)
    num_placeholders = 1 if placeholder is None else question.count(placeholder)
    if num_placeholders != 1:
        raise PromptError(
            f"--prompt and its chat template contain {num_placeholders} image placeholders ({placeholder}), not 1;"
            " remove them from the prompt, or use a model whose template has one"
        )
    return str(question)
