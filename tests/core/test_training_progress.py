"""What a person sees of a training run: lines in a log."""

import io

from captioner.training.progress import TrainProgress


def told(step: int, **more: object) -> dict:
    return {"step": step, "total": 40, "loss": 0.25, "wer": 0.5, "samples_per_second": 16.0} | more


def test_a_line_says_step_loss_wer_rate_and_time_left() -> None:
    progress = TrainProgress(40, lambda: told(10), samples_per_step=8, stream=io.StringIO())

    assert progress.line() == "step 10/40  loss 0.2500  WER 0.500  16.0 samples/s  ETA 00:15"


def test_before_the_first_step_it_says_that_it_starts() -> None:
    progress = TrainProgress(40, lambda: None, samples_per_step=8, stream=io.StringIO())

    assert progress.line().startswith("step 0/40  starting, ")


def test_what_is_not_known_yet_is_left_out() -> None:
    nothing = told(0, loss=None, wer=None, samples_per_second=None)

    assert TrainProgress(40, lambda: nothing, samples_per_step=8, stream=io.StringIO()).line() == "step 0/40"


def test_a_log_ends_with_a_whole_line() -> None:
    stream = io.StringIO()

    with TrainProgress(40, lambda: told(40), samples_per_step=8, stream=stream):
        pass

    assert stream.getvalue().startswith("step 40/40  loss 0.2500  WER 0.500  16.0 samples/s  in ")
    assert stream.getvalue().endswith("\n")
