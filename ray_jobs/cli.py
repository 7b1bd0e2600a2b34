"""The `captioner` command, with a sub-command for each job. Heavy packages are imported only where they are needed."""

from __future__ import annotations

import atexit
import errno
import functools
import os
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from captioner.config import (
    CaptionConfig,
    CheckTableConfig,
    ExportTextsConfig,
    JudgeTableConfig,
    MakeAltTextConfig,
    TrainConfig,
    refuse_unused,
)
from captioner.console.phases import HEARTBEAT
from captioner.console.stopping import drop_failed_output, ignore_ctrl_c, quit_at_once, stops_redelivered
from captioner.console.text import counted, printable
from captioner.errors import ERROR, INTERRUPTED, OK, CaptionerError, NoAnswerError, UsageError
from ray_jobs import usage_errors
from ray_jobs.help import Command, Group
from ray_jobs.options import takes

app = typer.Typer(
    help="Caption image collections on Ray: every image ends in exactly one row.",
    cls=Group,
    add_completion=False,
    rich_markup_mode=None,  # plain help: nothing in it is markup
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
command = functools.partial(app.command, cls=Command)
Out = Annotated[str, typer.Argument(metavar="OUT", help="Directory of a captions table; local or a URI.")]


def _show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"captioner {version('captioner')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@command()
@takes(CaptionConfig)
def caption(config: CaptionConfig) -> int:
    """Caption SOURCE into a table of Parquet files in OUT.

    The same command again continues a stopped run. SOURCE and OUT may come from --config.
    """
    from captioner.files import check_remains

    check_remains(config.output.path)
    if config.cluster.local:
        from captioner import pipeline

        return pipeline.run(config)
    from ray_jobs import caption

    return caption.run(config)


@command()
def init(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Images to caption, as for `captioner caption`.")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="File to write.")] = "run.yaml",
    out: Annotated[str, typer.Option(metavar="DIR", help="OUT of the run.")] = "captions",
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model of the run [default: one that suits the images].")
    ] = None,
) -> int:
    """Write a commented run.yaml for SOURCE.

    Looks at the first images, and says what SOURCE is taken for. Nothing is captioned. Change the file as you like,
    then run captioner caption --config FILE.
    """
    from captioner.console import first_config

    return first_config.run(source, file, model, out)


@command()
@takes(CaptionConfig, groups=["model", "cluster"])
def doctor(
    config: CaptionConfig,
    out: Annotated[str | None, typer.Option(metavar="OUT", help="Check that every node can write here.")] = None,
) -> int:
    """Check a cluster before a run.

    Checks versions, limits, memory, clock and GPUs of every node, whether the model loads on a worker, and whether
    every node can write to OUT.
    """
    from ray_jobs import doctor

    return doctor.run(config, out)


@command()
@takes(CaptionConfig, groups=["source", "model", "cluster"])
def estimate(
    config: CaptionConfig,
    sample: Annotated[
        int | None, typer.Option(min=16, metavar="N", help="Number of images to caption [default: 256].")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--sample-seed", min=0, metavar="S", help="Seed of the sample [default: 0].")
    ] = None,
    price_per_gpu_hour: Annotated[
        float | None,
        typer.Option("--price-per-gpu-hour", "--price-gpu", min=0, metavar="X", help="Price to compute the cost."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of images: estimate from earlier figures, without SOURCE."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --images: the kind of GPU [default: h100].")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --images: the number of GPUs [default: 1].")
    ] = None,
    cpus_per_gpu: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --images: CPUs to decode for each GPU [default: enough]."),
    ] = None,
) -> int:
    """Predict time, cost and size from a sample.

    Captions a random sample with the workers that a run would use; nothing is written. With --images neither SOURCE
    nor a cluster is needed: the figures are those of docs/scale.md.
    """
    if images is not None:
        from captioner.console import cost

        if config.source.path:
            raise UsageError(f"--images and SOURCE ({config.source.path}) exclude each other; give one of them")
        _refuse_given("with --images", {"--sample": sample, "--sample-seed": seed})
        for group in (config.source, config.model, config.cluster):
            refuse_unused(group, type(group).model_fields, "has no effect with --images")
        return cost.run(images, gpu or "h100", gpus or 1, cpus_per_gpu, price_per_gpu_hour)
    _refuse_given("without --images", {"--gpu": gpu, "--gpus": gpus, "--cpus-per-gpu": cpus_per_gpu})
    from ray_jobs import estimate

    return estimate.run(config, sample or 256, seed or 0, price_per_gpu_hour)


def _refuse_given(where: str, values: dict[str, Any]) -> None:
    """Raise UsageError where one of these flags is given."""
    for flag, value in values.items():
        if value is not None:
            raise UsageError(f"{flag} {value}: has no effect {where}; leave it out")


@command()
def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="Command to run, such as caption SOURCE OUT ...")
    ],
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Dashboard [default: RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265]."),
    ] = None,
    working_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Upload this directory and run in it; by default none of your files is uploaded."
        ),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the job [default: derived from the command].")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Environment variable of the job; K alone takes its value here. Repeatable."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-wait", help="Follow to the end, or only submit.")] = True,
    pending_timeout: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds to wait for the job to start.")
    ] = 600,
    entrypoint_num_cpus: Annotated[float, typer.Option(min=0, metavar="N", help="CPUs to reserve for the driver.")] = 0,
    entrypoint_num_gpus: Annotated[float, typer.Option(min=0, metavar="N", help="GPUs to reserve for the driver.")] = 0,
) -> int:
    """Run a command as a job on a Ray cluster.

    Submitting the same command again follows the running job, or starts a new one after its end. The exit code is that
    of the command.
    """
    from ray_jobs import submit as submitting

    commands: Any = typer.main.get_command(app)
    submission = submitting.make_submission(
        commands.commands, command, submission_id, working_dir, env, entrypoint_num_cpus, entrypoint_num_gpus
    )
    return submitting.submit(submission, address, follow, pending_timeout)


@command("try")
@takes(CaptionConfig, groups=["model"], each="model.name")
def try_images(
    configs: list[CaptionConfig],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    page: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write images, captions, time and memory as a page.")
    ] = None,
) -> int:
    """Caption a few images on the terminal, without Ray.

    Several --model are compared: the captions of each image one below the other, and time and memory of each model.
    """
    from captioner.console import trying

    return trying.try_images(images, [config.model for config in configs], page)


@command()
def verify(out: Out) -> int:
    """Prove that every planned image has exactly one row.

    Proves that each planned image has exactly one current row, and that every file holds the bytes that were written.

    Cannot prove that captions are right (see check), that source images are still the same, or that files of an
    earlier version, which hold no checksums, have not changed.
    """
    from captioner.console import commands

    return commands.verify(out)


@command()
def status(out: Out) -> int:
    """Count the images in OUT: ok, failed by reason, remaining."""
    from captioner.console import commands

    return commands.status(out)


@command()
@takes(CheckTableConfig)
def check(
    config: CheckTableConfig,
    out: Out,
    against: Annotated[str | None, typer.Option(metavar="OTHER_OUT", help="Compare with another table.")] = None,
) -> int:
    """Score and flag captions, write the report.

    Scores a sample against references, and flags doubtful captions, which needs no references.

    Exit 2 where --max-wer, --min-lift, --max-flagged or --min-right is not met.
    """
    from captioner.console import commands

    return commands.check(out, config.check, against)


@command()
@takes(JudgeTableConfig)
def judge(config: JudgeTableConfig, out: Out) -> int:
    """Score captions against their images.

    A CLIP or SigLIP model embeds captions and images: CLIPScore, beside that of the same captions on other images, and
    whether each caption finds its image among 100 others. Needs no references. Images are read again from the source.

    With --endpoint a chat model on a server is asked, of a sample, whether captions name anything that is not in their
    image. The cost is estimated first.

    The same command again judges only what is new. The scores are in OUT/checks/judge, the weakest captions in the
    report.
    """
    from captioner.console import commands
    from captioner.run.judging import LocalJudgeEngine
    from captioner.run.object_judge import LocalObjectJudgeEngine

    if config.cluster.local and config.judge.endpoint:
        return commands.judge_objects(out, config, LocalObjectJudgeEngine())
    if config.cluster.local:
        return commands.judge(out, config, LocalJudgeEngine())
    from ray_jobs.judge import RayJudgeEngine

    engine = RayJudgeEngine(config.cluster)
    return (commands.judge_objects if config.judge.endpoint else commands.judge)(out, config, engine)


@command()
def report(
    out: Out,
    open: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> int:
    """Write OUT/report/index.html, a page about the run.

    The page is one file that needs no network; report.json beside it has its figures.
    """
    from captioner.console import commands

    return commands.report(out, open)


@command()
@takes(MakeAltTextConfig)
def alt_text(config: MakeAltTextConfig, out: Out) -> int:
    """Make alt texts from the captions, for people to review.

    Rules shorten and tidy the captions; each can be switched off. Texts that need a person's decision are flagged. The
    captions are not changed.
    """
    from captioner.publishing.alt_text.command import run

    return run(out, config.alt_text)


@command()
def review(
    out: Out,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="P", help="Port of the page; 0 is any free one.")] = 0,
    reviewer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name to store with each decision [default: your login name].")
    ] = None,
    queue: Annotated[
        Literal["flagged", "random", "all"],
        typer.Option(
            help="flagged: flagged texts first, then the weakest by `captioner judge`, then the least certain. "
            "random: to measure the acceptance rate."
        ),
    ] = "flagged",
    only: Annotated[
        str | None,
        typer.Option(
            metavar="SELECTOR", help="Review only these, as caption --only: flags, logprob<10%, judge<10%, ..."
        ),
    ] = None,
    open: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> int:
    """Decide about each alt text on a page.

    Serves a page on this machine: one key for each decision (a approve, e edit, r reject, ? lists all), g for a grid of
    all images; Ctrl-C here ends it.

    Every decision is saved at once in OUT/reviews; the same command again continues the review.
    """
    from captioner.publishing.review import command
    from captioner.run.selector import rows_matching

    choose = (lambda table, reviews: rows_matching(table, only, reviews)) if only else None
    return command.run(out, port, reviewer, queue, open, choose)


@command()
def spot_check(
    out: Out,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of captions [default: as the last time, or 200].")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|folder", help="Draw from each value of a column of the table, or from each folder."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="S", help="Seed of the sample [default: as the last time, or 0].")
    ] = None,
    reviewer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name to store with each verdict [default: your login name].")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="P", help="Port of the page; 0 is any free one.")] = 0,
    open: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> int:
    """Judge a random sample of captions on a page.

    Serves a page on this machine: one key for each verdict (1 right, 2 small fault, 3 wrong, 4 offensive); Ctrl-C here
    ends it and prints the share of right captions with its interval, which report and check show too.

    Every verdict is saved at once in OUT/spot_checks; the same command again continues. Several people judge the same
    captions, each under another name, to see how far they agree.
    """
    from captioner.publishing.review import command

    return command.spot_check(out, sample, seed, by, reviewer, port, open)


@command()
@takes(ExportTextsConfig)
def export(config: ExportTextsConfig, out: Out) -> int:
    """Write reviewed texts in a format for other programs.

    By default only texts that a person has approved. Every text names its model and its reviewer; texts that are left
    out are counted.
    """
    from captioner.publishing.exports.command import run

    return run(out, config.export)


@command()
def feedback(
    out: Out,
    pairs: Annotated[str, typer.Argument(metavar="PAIRS", help="A new directory, for `captioner train`.")],
) -> int:
    """Turn approved and edited texts into training pairs.

    Other decisions are left out and counted. Checks of a model trained on the pairs leave their images out.
    """
    from captioner.publishing.alt_text.feedback import run

    return run(out, pairs)


models = typer.Typer(
    help="List the families of models and known checkpoints.",
    invoke_without_command=True,
    no_args_is_help=False,
    cls=Group,
    rich_markup_mode=None,
)
app.add_typer(models, name="models")


@models.callback()
def list_models(context: typer.Context) -> None:
    """List the families of models and known checkpoints."""
    from captioner.models.catalogue import table

    if context.invoked_subcommand is None:
        typer.echo(table())


@models.command("convert", cls=Command)
def convert(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Model directory with pytorch_model.bin.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A new directory, for --model.")],
) -> int:
    """Write the pickled weights (.bin) of a model as safetensors.

    Opens the pickles in a process of its own and refuses those that would run code. Other files are copied.
    """
    from captioner.models import converting

    return converting.run(directory, out)


@command()
def render_scenes(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images.")],
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the scenes.")] = 0,
    format: Annotated[
        Literal["folder", "webdataset", "parquet"], typer.Option(help="Format; folder is Hugging Face's ImageFolder.")
    ] = "folder",
) -> int:
    """Render sample images with known captions."""
    from captioner.starter.render import render_scenes

    render_scenes(directory, count, seed, format)
    typer.echo(f"rendered {counted(count, 'scene')} into {printable(directory)}")
    return OK


@command()
@takes(TrainConfig)
def train(config: TrainConfig) -> int:
    """Fine-tune a model on images with captions.

    Give OUT/model to `captioner caption --model`.

    The same command again continues from the last checkpoint. DATA and OUT may come from --config.
    """
    from captioner.files import check_remains
    from ray_jobs import train

    check_remains(config.output.path)
    return train.run(config)


demo = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=False,
    cls=Group,
    rich_markup_mode=None,
)
app.add_typer(demo, name="demo")


@demo.callback()
def demo_caption(
    context: typer.Context,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images.")] = 300,
    local: Annotated[bool, typer.Option("--local", help="Run in this process, without Ray.")] = False,
) -> int:
    """Caption rendered scenes with the starter model, or run another example.

    Alone it renders scenes into demo/archive, captions them into demo/captions, checks them and names the report.
    """
    from ray_jobs import demo

    return OK if context.invoked_subcommand else demo.caption(Path("demo"), count, local)


@demo.command("train", cls=Command)
def demo_train(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for images and model.")] = Path(
        "demo-train"
    ),
) -> int:
    """Train the starter model on new shapes and a new wording, in about two minutes on two cores."""
    from ray_jobs import demo

    return demo.train(directory)


@demo.command("server", cls=Command)
def demo_server(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory for images, model and captions.")] = Path(
        "demo-server"
    ),
) -> int:
    """Caption by a model server that is killed half-way, in about a minute on two cores."""
    from ray_jobs import demo

    return demo.server(directory)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process: SystemExit with one of `captioner.errors.EXIT_CODES`.

    An error that the user can fix is one line on standard error; a traceback means a defect in this program.
    """
    atexit.register(ignore_ctrl_c)  # runs last, after Ray's, during which Ctrl-C ends the process at once
    try:
        with stops_redelivered():
            _run_command(argv)
    except KeyboardInterrupt:  # Ctrl-C again, while the first one or another error is reported
        quit_at_once(signal.SIGINT)


def _run_command(argv: list[str] | None) -> NoReturn:
    """Run the command line as `main` does; Ctrl-C while an error is reported comes out as KeyboardInterrupt."""
    HEARTBEAT.line_printed()  # what this process did before does not count as silence
    words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = _invoke(words)
        sys.stdout.flush()  # while an error of it can be told
    except NoAnswerError as error:
        _fail(str(error), error.exit_code, at_once=True)
    except CaptionerError as error:
        _fail(str(error), error.exit_code)
    except typer.TyperException as error:  # an unknown flag or command, a missing or misplaced value
        _fail(usage_errors.describe(error), ERROR)
    except (KeyboardInterrupt, EOFError, typer.Abort):
        _fail("stopped by Ctrl-C", INTERRUPTED)
    except OSError as error:
        _fail_by_system(error)
    sys.exit(code)


def _invoke(words: list[str]) -> int:
    """Run the command of a command line and return its exit code.

    Not by `main` of typer, which takes every broken pipe for that of the output, and Ctrl-C for an end without a word.
    """
    try:
        with _commands().make_context("captioner", list(words)) as context:
            code: int = _commands().invoke(context) or OK
    except typer.Exit as end:
        code = end.exit_code
    return code


def _fail_by_system(error: OSError) -> NoReturn:
    """End the process because of an error of the system that is no defect, such as a full disk; raise others."""
    if drop_failed_output() and isinstance(error, BrokenPipeError):
        sys.exit(ERROR)  # without a word: whoever reads the output has enough
    if isinstance(error, ConnectionError):
        _fail(f"a connection broke: {error}; run the same command again", ERROR)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        _fail(f"{error}; free space, also where the output goes, then run the same command again", ERROR)
    raise error


@functools.cache
def _commands() -> Any:
    """Return `app` as a command, with all its flags; built once in a process, since that takes 25 ms."""
    return typer.main.get_command(app)


def _fail(message: str, exit_code: int, at_once: bool = False) -> NoReturn:
    """Print an error and end the process. `at_once`: without waiting for what it still does."""
    if exit_code == INTERRUPTED and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, quit_at_once)  # whoever presses Ctrl-C again does not wait for Ray's end
    print(f"captioner: error: {printable(message)}", file=sys.stderr)
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
