"""The `captioner` command: one sub-command for each job. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from captioner.config import CaptionConfig, CheckTableConfig, ExportTextsConfig, MakeAltTextConfig, TrainConfig
from captioner.console.stopping import quit_at_once
from captioner.console.text import printable
from captioner.errors import ERROR, EXIT_CODES, INTERRUPTED, OK, CaptionerError
from ray_jobs.options import takes

EXIT_CODE_TABLE = "\n".join(["\b", "Exit codes:", *(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())])

app = typer.Typer(
    help="Caption image archives on Ray: every image ends in exactly one row.",
    epilog=EXIT_CODE_TABLE,
    add_completion=False,
    rich_markup_mode=None,  # plain help: nothing in it is markup
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
Out = Annotated[str, typer.Argument(metavar="OUT", help="Directory of a captions table; local or a URI.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"captioner {version('captioner')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@takes(CaptionConfig)
def caption(config: CaptionConfig) -> int:
    """Caption SOURCE into a table of Parquet files in OUT.

    The same command again goes on where it was stopped. SOURCE and OUT may come from --config.
    """
    if config.cluster.local:
        from captioner import pipeline

        return pipeline.run(config)
    from ray_jobs import caption

    return caption.run(config)


@app.command()
@takes(CaptionConfig, groups=["model", "cluster"])
def doctor(
    config: CaptionConfig,
    out: Annotated[str | None, typer.Option(metavar="OUT", help="Check that every node can write here.")] = None,
) -> int:
    """Check a cluster before a run.

    Versions, limits, memory, clock and GPUs of every node, whether the model loads on a worker, whether OUT can be
    written from all.
    """
    from ray_jobs import doctor

    return doctor.run(config, out)


@app.command()
@takes(CaptionConfig, groups=["source", "model", "cluster"])
def estimate(
    config: CaptionConfig,
    sample: Annotated[int, typer.Option(min=16, metavar="N", help="Images to caption for it.")] = 256,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Another seed draws another sample.")] = 0,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, metavar="X", help="Adds what it costs.")] = None,
) -> int:
    """Predict time, cost and size from a sample.

    Captions a seeded sample with the workers a run would use; nothing is written.
    """
    from ray_jobs import estimate

    return estimate.run(config, sample, seed, price_per_gpu_hour)


@app.command()
def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="caption SOURCE OUT ..., for instance.")
    ],
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Dashboard [default: RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265]."),
    ] = None,
    working_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Upload this directory and run in it; without it nothing of yours."),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Name of the job [default: derived from the command].")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Environment of the job; K alone takes the value it has here."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow/--no-wait", help="Follow to the end, or only submit.")] = True,
    pending_timeout: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds to wait for the job to start.")
    ] = 600,
    entrypoint_num_cpus: Annotated[float, typer.Option(min=0, metavar="N", help="CPUs to hold for the driver.")] = 0,
    entrypoint_num_gpus: Annotated[float, typer.Option(min=0, metavar="N", help="GPUs to hold for the driver.")] = 0,
) -> int:
    """Run a command as a job on a Ray cluster.

    Submitting the same command again follows the job that runs; after its end it starts the next. The exit code is
    the command's own.
    """
    from ray_jobs import submit as submitting

    commands: Any = typer.main.get_command(app)
    wanted = submitting.make_submission(
        commands.commands, command, submission_id, working_dir, env, entrypoint_num_cpus, entrypoint_num_gpus
    )
    return submitting.submit(wanted, address, follow, pending_timeout)


@app.command("try")
@takes(CaptionConfig, groups=["model"])
def try_images(
    config: CaptionConfig,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
) -> int:
    """Caption a few images on the terminal, without Ray."""
    from captioner.console import commands

    return commands.try_images(images, config.model)


@app.command()
def verify(out: Out) -> int:
    """Prove that every planned image has exactly one row.

    Proves that each planned image has exactly one current row, and that every file holds the bytes that were written.

    Cannot prove that captions are right (see check), that source images are still the same, or that files of an
    earlier version, which hold no checksums, have not changed.
    """
    from captioner.console import commands

    return commands.verify(out)


@app.command()
def status(out: Out) -> int:
    """Show what OUT holds: ok, failed by reason, remaining."""
    from captioner.console import commands

    return commands.status(out)


@app.command()
@takes(CheckTableConfig)
def check(
    config: CheckTableConfig,
    out: Out,
    against: Annotated[str | None, typer.Option(metavar="OTHER_OUT", help="Compare with another table.")] = None,
) -> int:
    """Score and flag captions, write the report.

    Scores a sample against references and flags doubtful captions without.

    Exit 2 where --max-wer or --min-lift is not met.
    """
    from captioner.console import commands

    return commands.check(out, config.check, against)


@app.command()
def report(
    out: Out,
    open: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> int:
    """Write OUT/report/index.html, a page about the run.

    One file that needs no network; report.json beside it holds its figures.
    """
    from captioner.console import commands

    return commands.report(out, open)


@app.command()
@takes(MakeAltTextConfig)
def alt_text(config: MakeAltTextConfig, out: Out) -> int:
    """Make alt texts of the captions, for people to review.

    Rules shorten and tidy, one by one switchable; what a person has to decide is flagged. The captions stay as they
    are.
    """
    from captioner.publishing.alt_text.command import run

    return run(out, config.alt_text)


@app.command()
def review(
    out: Out,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="P", help="0: any free one.")] = 0,
    reviewer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Kept with each decision [default: your login name].")
    ] = None,
    queue: Annotated[
        Literal["flagged", "random", "all"],
        typer.Option(help="flagged: those first, then the least certain. random: measures the acceptance rate."),
    ] = "flagged",
    open: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> int:
    """Decide about each alt text on a page.

    Serves a page on this machine for accepting, editing and rejecting alt texts.

    Every decision is saved at once in OUT/reviews; the same command goes on where it ended.
    """
    from captioner.publishing.review import command

    return command.run(out, port, reviewer, queue, open)


@app.command()
@takes(ExportTextsConfig)
def export(config: ExportTextsConfig, out: Out) -> int:
    """Write reviewed texts in the form that others read.

    Only what a person has approved, unless told otherwise. Every text says what model made it and who reviewed it;
    what is left out is counted.
    """
    from captioner.publishing.exports.command import run

    return run(out, config.export)


@app.command()
def feedback(
    out: Out,
    pairs: Annotated[str, typer.Argument(metavar="PAIRS", help="A new directory; `captioner train` takes it.")],
) -> int:
    """Turn approved and edited texts into training pairs.

    Other decisions are left out and counted. Checks of a model trained on the pairs leave their images out.
    """
    from captioner.publishing.alt_text.feedback import run

    return run(out, pairs)


@app.command()
def models() -> int:
    """List the families of models and known checkpoints."""
    from captioner.models.catalogue import table

    typer.echo(table())
    return OK


@app.command()
def render_scenes(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    count: Annotated[int, typer.Option(min=1, metavar="N", help="How many images.")],
    seed: Annotated[int, typer.Option(metavar="S", help="Other seeds draw other scenes.")] = 0,
    format: Annotated[
        Literal["folder", "webdataset", "parquet"], typer.Option(help="folder is Hugging Face's ImageFolder.")
    ] = "folder",
) -> int:
    """Render a sample archive with known captions."""
    from captioner.starter.render import render_scenes

    render_scenes(directory, count, seed, format)
    typer.echo(f"rendered {count:,} scenes into {printable(directory)}")
    return OK


@app.command()
@takes(TrainConfig)
def train(config: TrainConfig) -> int:
    """Fine-tune a model on images with captions.

    OUT/model is what `captioner caption --model` takes.

    The same command again goes on from the last checkpoint. DATA and OUT may come from --config.
    """
    from ray_jobs import train

    return train.run(config)


demo = typer.Typer(help="Small runs that show what a job does.", rich_markup_mode=None)
app.add_typer(demo, name="demo")


@demo.command("train")
def demo_train(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to render and train.")] = Path("demo-train"),
) -> int:
    """Teach the starter model shapes and a wording it has never seen: about two minutes on two cores."""
    from ray_jobs import demo

    return demo.train(directory)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and end the process: SystemExit with one of `captioner.errors.EXIT_CODES`.

    What a person can mend is one line on standard error; a traceback means a defect in this program.
    """
    words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    command: Any = typer.main.get_command(app)
    try:
        sys.exit(command.main(words, prog_name="captioner", standalone_mode=False) or OK)
    except CaptionerError as error:
        _fail(str(error), error.exit_code)
    except typer.TyperException as error:  # an unknown flag or command, a missing or misplaced value
        _fail(f"{error.format_message().rstrip('.')}; see captioner --help", ERROR)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", INTERRUPTED)


def _fail(message: str, exit_code: int) -> NoReturn:
    if exit_code == INTERRUPTED and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, quit_at_once)  # whoever presses Ctrl-C again does not wait for Ray's end
    print(f"captioner: error: {printable(message)}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
