"""How a caption differs from its reference, word by word."""

from __future__ import annotations

from captioner.scoring.normalise import normalise

Piece = tuple[str, str]  # "same", "missing" (in the reference only) or "added" (in the caption only); words


def word_diff(reference: str, caption: str) -> list[Piece]:
    """The reference turned into the caption, in pieces of words; both normalised as for WER."""
    import jiwer

    known, said = normalise(reference).split(), normalise(caption).split()
    if not known or not said:
        return [piece for piece in (("missing", " ".join(known)), ("added", " ".join(said))) if piece[1]]
    pieces: list[Piece] = []
    for chunk in jiwer.process_words(" ".join(known), " ".join(said)).alignments[0]:
        left = " ".join(known[chunk.ref_start_idx : chunk.ref_end_idx])
        right = " ".join(said[chunk.hyp_start_idx : chunk.hyp_end_idx])
        if chunk.type == "equal":
            pieces.append(("same", left))
        else:
            pieces += [piece for piece in (("missing", left), ("added", right)) if piece[1]]
    return pieces
