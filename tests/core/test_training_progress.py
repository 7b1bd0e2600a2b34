"""The progress of a training run as lines in a log."""

import io

from captioner.training.progress import TrainProgress


def latest(step: int, **more: object) -> dict:
    return {"step": step, "total": 40, "loss": 0.25, "wer": 0.5, "samples_per_second": 16.0} | more


def progress_of(figures: dict | None, status: str = "", stream: io.StringIO | None = None) -> TrainProgress:
    progress = TrainProgress(stream=stream or io.StringIO())
    progress.set_total(40, samples_per_step=8)
    progress.watch(lambda: figures)
    progress.show_status(status)
    return progress


def test_a_line_has_step_loss_wer_rate_and_remaining_time() -> None:
    assert progress_of(latest(10)).line() == "step 10/40  loss 0.2500  WER 0.500  16.0 samples/s  ETA 00:15"


def test_before_its_pairs_are_read_a_run_shows_its_status() -> None:
    progress = TrainProgress(stream=io.StringIO())
    assert progress.line().startswith("training  starting, ")

    progress.show_status("examined 64 of 113 pairs")

    assert progress.line().startswith("training  examined 64 of 113 pairs, ")


def test_until_the_first_step_the_status_of_the_workers_is_shown() -> None:
    waiting = latest(0, loss=None, wer=None, samples_per_second=None, status="loading weights")

    assert progress_of(waiting).line().startswith("step 0/40  loading weights, ")
    assert (
        progress_of(waiting, "examined 64 of 113 pairs")
        .line()
        .startswith("step 0/40  examined 64 of 113 pairs; loading weights, ")
    )


def test_an_evaluation_is_shown_after_the_figures() -> None:
    line = progress_of(latest(10, status="evaluated 64 of 128 images")).line()

    assert line == "step 10/40  loss 0.2500  WER 0.500  16.0 samples/s  ETA 00:15  evaluated 64 of 128 images"


def test_figures_that_are_missing_are_left_out() -> None:
    line = progress_of(latest(1, loss=None, wer=None)).line()

    assert line == "step 1/40  16.0 samples/s  ETA 00:20"


def test_a_log_ends_with_a_complete_line() -> None:
    stream = io.StringIO()

    with progress_of(latest(40), stream=stream):
        pass

    assert stream.getvalue().startswith("step 40/40  loss 0.2500  WER 0.500  16.0 samples/s  in ")
    assert stream.getvalue().endswith("\n")
