"""The text that a model gets with an image: the prompt in its chat template, and a placeholder for the image."""

from __future__ import annotations

from contextlib import suppress
from datetime import date
from typing import Any

from jinja2 import TemplateError

from captioner.models.pretrained import LOADING_ERRORS, quiet

# What templates get that ask for the date: with today's, the same table would ask something else tomorrow.
DAY = date(2026, 1, 1)
_FORMS = [f"%{code}" for code in ("a", "A", "b", "B", "d", "-d", "m", "-m", "y", "Y", "j", "H", "I", "M", "S", "p")]
_TODAY = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace({form!r}, {DAY.strftime(form)!r})" for form in _FORMS)
    + " }}{% endmacro %}"
)


class PromptError(ValueError):
    """Raised where a model cannot take a prompt. With {columns} in --prompt it may be that of one image."""


def check_no_placeholder(prompt: str, placeholder: str) -> None:
    """Raise PromptError where a prompt holds the text that stands for an image."""
    if placeholder in prompt:
        raise PromptError(f"--prompt contains the image placeholder {placeholder}; remove it from the prompt")


def chat_template_of(processor: Any) -> str | None:
    """Return the chat template of a processor, for which it is always DAY; None where it has none.

    In older directories it is that of the tokenizer. Of several by name it is the default.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    # A macro of the template's own comes before what transformers defines. The line's end belongs to the macro.
    return f"{_TODAY}\n{template}" if template and "strftime_now" in template else template


def apply_template(processor: Any, prompt: str, system: str | None = None) -> str:
    """Return the prompt after an image in a user's turn of the model's chat template, after the system prompt.

    Raises PromptError.
    """
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    question = _with_system(processor, turns, system) if system else _render(processor, turns)
    placeholder = getattr(processor, "image_token", None)
    num_placeholders = 1 if placeholder is None else question.count(placeholder)
    if num_placeholders != 1:
        raise PromptError(
            f"--prompt and its chat template contain {num_placeholders} image placeholders ({placeholder}), not 1;"
            " remove them from the prompt, or use a model whose template has one"
        )
    return question


def _with_system(processor: Any, turns: list[dict[str, Any]], system: str) -> str:
    """Return the turns in their template, after the system prompt: most templates take it in parts, some as a text."""
    part = {"type": "text", "text": system}
    with suppress(PromptError):
        question = _render(processor, [{"role": "system", "content": [part]}, *turns])
        if system.strip() in question and str(part) not in question:
            return question
    question = _render(processor, [{"role": "system", "content": system}, *turns])
    if system.strip() not in question:
        raise PromptError("its chat template has no system prompt for --system; put it into --prompt")
    return question


def _render(processor: Any, turns: list[dict[str, Any]]) -> str:
    try:
        with quiet():  # transformers warns of templates without the switch for thinking
            return str(processor.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False))
    except (*LOADING_ERRORS, TemplateError) as error:
        reason = " ".join(str(error).split())
        raise PromptError(f"its chat template cannot be used: {reason}") from None
