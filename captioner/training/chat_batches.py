"""Batches of chat models: the question about an image, then the caption as the assistant's answer.

    [image tokens and question][caption][end of the turn][padding]

The model's own processor prepares images and questions, as for captioning. Only the caption and the end of the turn
have labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from jinja2 import TemplateError

from captioner.data import Pixels
from captioner.models.chat import ChatCaptioner
from captioner.models.pretrained import LOADING_ERRORS, quiet
from captioner.models.thoughts import END
from captioner.training.collate import Collate, pixels_of

_ANSWER = "The answer."  # any text without white space at its ends


@dataclass(frozen=True)
class ChatCollate(Collate):
    """Makes a batch of decoded pairs, on the CPU: the processor's output, answers, `positions` and `labels`.

    `process`: returns the processor's output for images. `before`: what comes before an answer, see `answer_frame`.
    """

    process: Callable[[Pixels], dict[str, Any]]
    before: str

    def __call__(self, rows: pa.Table) -> dict[str, torch.Tensor]:
        return self.join(self.process(pixels_of(rows, self.spec)), rows["caption"].to_pylist())

    def join(self, processed: dict[str, Any], captions: list[str]) -> dict[str, torch.Tensor]:
        """Return the batch of questions, as `ChatCaptioner.process` returns them, and their captions.

        Tensors with the shape of its `input_ids` belong to single tokens: they are moved to the left,
        and continued by 1 in the attention mask and by 0 elsewhere. All others belong to images and stay as they are.
        """
        questions = {name: value for name, value in processed.items() if isinstance(value, torch.Tensor)}
        tokens = self.tokenizer([self.before + caption for caption in captions], add_special_tokens=False).input_ids
        answers = [[*ids[: self.max_tokens], self.end] for ids in tokens]
        is_token = questions["attention_mask"].bool()
        lengths = is_token.sum(dim=1).tolist()
        total = max(length + len(answer) - 1 for length, answer in zip(lengths, answers, strict=True))
        batch = dict(questions)
        for name, values in questions.items():
            if values.shape == is_token.shape:
                batch[name] = values.new_full((len(values), total), self.padding if name == "input_ids" else 0)
                for row, length in enumerate(lengths):
                    batch[name][row, :length] = values[row, is_token[row]]
        positions: list[int] = []
        for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
            end = length + len(answer) - 1  # the last token is predicted, not read
            batch["input_ids"][row, length:end] = torch.tensor(answer[:-1], dtype=torch.int64)
            batch["attention_mask"][row, length:end] = 1
            positions += range(row * total + length - 1, row * total + end)
        labels = [token for answer in answers for token in answer]
        return batch | {"positions": torch.tensor(positions), "labels": torch.tensor(labels)}


def answer_frame(captioner: ChatCaptioner, end_ids: list[int]) -> tuple[str, int]:
    """Return what the chat template puts around an answer: white space before it, and the id of the token that ends it.

    Where the question ends with the beginning of a thought, the thought is ended before the answer. `end_ids`: of the
    tokens that end a caption. The first of them ends the answer where the template has none.
    """
    question = captioner.text_of(captioner.prompts[0])
    end_of_thought = END if captioner.begins_thought else ""
    content = [{"type": "image"}, {"type": "text", "text": captioner.prompts[0]}]
    answer = [{"type": "text", "text": _ANSWER}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    try:
        with quiet():
            text = str(captioner.processor.apply_chat_template(turns, enable_thinking=False))
    except (*LOADING_ERRORS, TemplateError):  # a template without answers
        return end_of_thought, end_ids[0]
    head, _, tail = text.partition(_ANSWER)
    before = head.removeprefix(question) if head.startswith(question) else ""
    following = captioner.tokenizer(tail, add_special_tokens=False).input_ids
    end = next((token for token in following if token in end_ids), end_ids[0])
    return end_of_thought or (before if before.isspace() else ""), end
