"""Reasoning in the answers of chat models, which is never part of a caption."""

from __future__ import annotations

import re

BEGINNING, END = "<think>", "\n</think>\n\n"
# Why an answer is no caption, and what follows where it ended at the limit.
ONLY_THOUGHT, CUT = "only reasoning, no caption", ", cut at --max-new-tokens"
_THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
# Templates that begin the thought themselves give only its end; an answer that is cut gives only its beginning.
_END_OF_THOUGHT = re.compile(r"^.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_BEGINNING_OF_THOUGHT = re.compile(r"<think(?:ing)?>.*$", re.DOTALL | re.IGNORECASE)
_BEGINNING_AT_END = re.compile(r"<think(?:ing)?>\s*$", re.IGNORECASE)
# GLM-4.1V-Thinking puts tags around what follows its thought, and may leave out the second.
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>)?", re.DOTALL)


def without_thought(answer: str) -> str:
    """Return an answer without the reasoning in it; "" where it holds nothing else."""
    text = _END_OF_THOUGHT.sub("", _THOUGHT.sub("", answer))
    text = _BEGINNING_OF_THOUGHT.sub("", text).strip()
    tagged = _ANSWER.fullmatch(text) if text != answer.strip() else None
    return tagged[1].strip() if tagged else text


def begins_thought(question: str) -> bool:
    """Return whether a question in its chat template ends with the beginning of a thought."""
    return _BEGINNING_AT_END.search(question) is not None
