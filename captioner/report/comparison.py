"""The page of `captioner try --page`: images with the captions of several models, and time and memory of each model.

One self-contained HTML file without scripts or network access; all data is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from captioner.console.text import counted
from captioner.report.page import template_environment

NO_FIGURE = "-"


@dataclass(frozen=True, slots=True)
class ImageText:
    """What a model wrote of an image, or why it wrote nothing (`error_code`; "" = a caption).

    `answers`: to the questions besides the caption, by column.
    """

    caption: str
    error_code: str = ""
    message: str = ""
    answers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The caption, or the reason."""
        return f"{self.error_code}: {self.message}" if self.error_code else self.caption

    @property
    def more(self) -> list[tuple[str, str]]:
        """The columns besides the caption that have a value, each with it as text; of a list, each item."""
        values = (
            (column, value)
            for column, answer in self.answers.items()
            for value in (answer if isinstance(answer, list | tuple) else [answer])
        )
        return [(column, str(value)) for column, value in values if value is not None]


@dataclass(frozen=True)
class Trial:
    """A model and what it wrote of each image.

    `arithmetic`: dtype and device. `load_seconds`, and `seconds` of captioning all images; `memory`: the most bytes it
    took; None where not measured. `error`: why the model could not be loaded.
    """

    model: str
    prompt: str | None
    arithmetic: str
    texts: list[ImageText]
    load_seconds: float | None = None
    seconds: float | None = None
    memory: int | None = None
    error: str = ""

    @property
    def num_captions(self) -> int:
        return sum(not text.error_code for text in self.texts) if self.seconds is not None else 0

    @property
    def load_time(self) -> str:
        return NO_FIGURE if self.load_seconds is None else f"{self.load_seconds:.1f} s"

    @property
    def time_per_image(self) -> str:
        if not self.num_captions or self.seconds is None:
            return NO_FIGURE
        return f"{self.seconds / self.num_captions:.3f}"

    @property
    def peak_memory(self) -> str:
        if self.memory is None:
            return NO_FIGURE
        return f"{self.memory / 1e9:.1f} GB" if self.memory >= 1e9 else f"{self.memory / 1e6:.0f} MB"


def render(names: Sequence[str], uris: Sequence[str], trials: Sequence[Trial]) -> str:
    """Return the page. `names`, `uris`: of each image its file and the data URI of its thumbnail, or ""."""
    template = template_environment().get_template("comparison.html")
    title = f"{counted(len(trials), 'model')} on {counted(len(names), 'image')}"
    return template.render(title=title, images=list(enumerate(zip(names, uris, strict=True))), trials=trials)
