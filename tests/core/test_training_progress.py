"""What a person sees of a training run: lines in a log."""

import io

from captioner.training.progress import TrainProgress


def told(step: int, **more: object) -> dict:
    return {"step": step, "total": 40, "loss": 0.25, "wer": 0.5, "samples_per_second": 16.0} | more


def shown(latest: dict | None, doing: str = "", stream: io.StringIO | None = None) -> TrainProgress:
    progress = TrainProgress(stream=stream or io.StringIO())
    progress.set_total(40, samples_per_step=8)
    progress.watch(lambda: latest)
    progress.show_status(doing)
    return progress


def test_a_line_says_step_loss_wer_rate_and_time_left() -> None:
    assert shown(told(10)).line() == "step 10/40  loss 0.2500  WER 0.500  16.0 samples/s  ETA 00:15"


def test_before_its_pairs_are_known_a_run_says_what_it_waits_for() -> None:
    progress = TrainProgress(stream=io.StringIO())
    assert progress.line().startswith("training  starting, ")

    progress.show_status("examined 64 of 113 pairs")

    assert progress.line().startswith("training  examined 64 of 113 pairs, ")


def test_until_the_first_step_it_says_what_the_workers_wait_for() -> None:
    waiting = told(0, loss=None, wer=None, samples_per_second=None, status="loading weights")

    assert shown(waiting).line().startswith("step 0/40  loading weights, ")
    assert (
        shown(waiting, "examined 64 of 113 pairs")
        .line()
        .startswith("step 0/40  examined 64 of 113 pairs; loading weights, ")
    )


def test_an_evaluation_between_steps_is_shown_beside_them() -> None:
    line = shown(told(10, status="evaluated 64 of 128 images")).line()

    assert line == "step 10/40  loss 0.2500  WER 0.500  16.0 samples/s  ETA 00:15  evaluated 64 of 128 images"


def test_what_is_not_known_yet_is_left_out() -> None:
    line = shown(told(1, loss=None, wer=None)).line()

    assert line == "step 1/40  16.0 samples/s  ETA 00:20"


def test_a_log_ends_with_a_whole_line() -> None:
    stream = io.StringIO()

    with shown(told(40), stream=stream):
        pass

    assert stream.getvalue().startswith("step 40/40  loss 0.2500  WER 0.500  16.0 samples/s  in ")
    assert stream.getvalue().endswith("\n")
