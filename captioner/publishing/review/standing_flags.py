"""Which flags still hold for an alt text, and what they say in words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.publishing.alt_text.findings import FINDINGS
from captioner.scoring.flags import ALL_FLAGS, caption_flags

_WORDS = ALL_FLAGS | FINDINGS
# About the caption's words: the rules may have mended what they were set for. The others are about how it was made.
_ABOUT_WORDS = {"empty", "repeated", "special_tokens", "image_of", "over_125", "over_250"}


def standing_flags(of_caption: Iterable[str] | None, of_text: Iterable[str], alt_text: str) -> list[str]:
    """The flags a reviewer should see: those of the alt text, and those of its caption that no rule has mended."""
    caption_says = set(of_caption or ())
    mended = _ABOUT_WORDS & caption_says
    if mended:
        mended -= set(caption_flags(alt_text))
    return sorted((caption_says - mended) | set(of_text))


def flagged_rows(of_caption: pa.ChunkedArray, made: pa.Table) -> npt.NDArray[np.bool_]:
    """For each alt text whether any flag stands; bool [N]."""
    by_text = pc.list_value_length(made["flags"]).to_numpy() > 0
    by_caption = np.flatnonzero(pc.fill_null(pc.list_value_length(of_caption), 0).to_numpy())
    flagged: npt.NDArray[np.bool_] = by_text.copy()
    for place in by_caption:
        if not flagged[place]:
            text = made["alt_text"][place].as_py()
            flagged[place] = bool(standing_flags(of_caption[place].as_py(), (), text))
    return flagged


def in_words(flag: str) -> str:
    return _WORDS.get(flag, flag.replace("_", " "))
