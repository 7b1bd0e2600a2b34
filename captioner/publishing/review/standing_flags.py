"""The flags that still apply to an alt text after the rules, and their descriptions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from captioner.publishing.alt_text.findings import FINDINGS
from captioner.scoring.chat_habits import HABITS
from captioner.scoring.flags import ALL_FLAGS, caption_flags, flag_name

_DESCRIPTIONS = ALL_FLAGS | FINDINGS
# Flags about the caption's words, which a rule may have fixed. The others are about how the caption was generated.
_ABOUT_WORDS = {"empty", "repeated", "special_tokens", "image_of", "over_125", "over_250", *HABITS} - {"repeats_prompt"}


def standing_flags(of_caption: Iterable[str] | None, of_text: Iterable[str], alt_text: str) -> list[str]:
    """Return the flags a reviewer should see: those of the alt text, and those of its caption that no rule fixed."""
    caption_flag_names = set(of_caption or ())
    fixed = _ABOUT_WORDS & caption_flag_names
    if fixed:
        fixed -= set(caption_flags(alt_text))
    return sorted((caption_flag_names - fixed) | set(of_text))


def flagged_rows(of_caption: pa.ChunkedArray, alt_texts: pa.Table) -> npt.NDArray[np.bool_]:
    """Return for each alt text whether any flag still applies; bool [N]."""
    flagged: npt.NDArray[np.bool_] = pc.list_value_length(alt_texts["flags"]).to_numpy() > 0
    with_caption_flags = np.flatnonzero(pc.fill_null(pc.list_value_length(of_caption), 0).to_numpy())
    for index in with_caption_flags:
        if not flagged[index]:
            text = alt_texts["alt_text"][index].as_py()
            flagged[index] = bool(standing_flags(of_caption[index].as_py(), (), text))
    return flagged


def describe_flag(flag: str) -> str:
    """Return a flag as a phrase for people."""
    return _DESCRIPTIONS.get(flag, flag_name(flag))
