"""Whether captions are good enough: --max-wer and --min-lift."""

from __future__ import annotations

from captioner.config import CheckConfig
from captioner.errors import CheckFailedError
from captioner.scoring.scores import Scores


def failed_gates(scores: Scores, settings: CheckConfig) -> list[str]:
    """What is not good enough, in words; empty where nothing was asked for or all is well.

    A gate on a figure for which there is no data fails: nothing shows that the captions are good enough.
    """
    failed = []
    if settings.max_wer is not None:
        if scores.wer is None:
            failed.append(f"--max-wer {settings.max_wer:g} cannot be judged: no caption has a reference to score it by")
        elif scores.wer > settings.max_wer:
            failed.append(
                f"WER {scores.wer:.3f} of {scores.num_rows:,} captions is above --max-wer {settings.max_wer:g}"
            )
    if settings.min_lift is not None:
        if scores.lift is None:
            failed.append(f"--min-lift {settings.min_lift:g} cannot be judged: fewer than two captions could be scored")
        elif scores.lift < settings.min_lift:
            better = "too little better" if scores.lift > 0 else "no better"
            failed.append(
                f"lift {scores.lift:.3f} is below --min-lift {settings.min_lift:g}: WER {scores.wer:.3f} is {better} "
                f"than {scores.shuffled_wer:.3f}, that of the same captions on other pictures"
            )
    return failed


def enforce(scores: Scores, settings: CheckConfig) -> None:
    """Raises CheckFailedError that names what is not good enough."""
    failed = failed_gates(scores, settings)
    if failed:
        raise CheckFailedError("the captions are not good enough: " + "; ".join(failed))
