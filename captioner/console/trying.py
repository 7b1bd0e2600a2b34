"""`captioner try`: caption a few images with one model, or with several to compare them, without Ray and a table."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from captioner.config import ModelConfig, SourceConfig
from captioner.console.phases import phase
from captioner.console.stopping import notify
from captioner.console.text import counted, printable, shorten
from captioner.data import SAMPLES_FIELD, RawImage
from captioner.errors import ERROR, OK, TOO_MANY_FAILED, CaptionerError, ModelError, OutputError, UsageError
from captioner.files import is_uri, local_path, shown
from captioner.imaging.sandbox.decoder import GuardedDecoder
from captioner.models import ModelRef, load, resolve, resolve_dtype
from captioner.models.devices import pick_device
from captioner.models.loading import import_family
from captioner.models.questions import check_columns, prompts_of
from captioner.report.comparison import ImageText, Trial, render
from captioner.report.page_images import MAX_PIXELS, SIDE, data_uri
from captioner.sources.reading import ReadLimits, read_file
from captioner.sources.root import Root, readable
from captioner.steps import caption_or_reasons

MODEL_WIDTH, TABLE_WIDTH, MIN_TEXT_WIDTH = 28, 100, 20


def try_images(files: Sequence[str], models: Sequence[ModelConfig], page: str | None = None) -> int:
    """Print a caption for each file, and failures on standard error; of several models, a comparison.

    A model with --quantize is compared with itself, unquantised.

    `page`: an HTML file to write, with the images. Returns exit code 2 when no file has a caption, and 1 when one of
    several models could not be loaded or used; where it is the only one, its error is raised.
    """
    if page is not None:
        _check_page(page)
    for name in files:
        if is_uri(name):
            raise UsageError(f"{shown(name)}: is not on a local disk; give a file that is")
    refs = [_resolve(model) for model in models]
    images = [_read(name) for name in files]
    trials_of = [_try_model(ref, device, model, images) for (ref, device), model in zip(refs, models, strict=True)]
    trials = [trial for pair in trials_of for trial in pair]
    if len(trials) == 1:
        if trials[0].error:
            raise ModelError(trials[0].error)
        _print_captions(files, trials[0])
    else:
        _print_comparison(files, trials)
    for unquantised, quantised in (pair for pair in trials_of if len(pair) > 1):
        print(_share_equal(unquantised, quantised))
    if page is not None:
        names = [printable(name) for name in files]
        try:
            Path(page).write_text(render(names, _thumbnails(images), trials), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--page {page}: cannot be written: {error.strerror or error}") from None
        print(f"captioner: the page: {printable(page)}", file=sys.stderr)
    if any(pair[-1].error for pair in trials_of):
        return ERROR
    return OK if any(trial.num_captions for trial in trials) else TOO_MANY_FAILED


def _check_page(page: str) -> None:
    """Raise UsageError where a page cannot be written, before models are loaded."""
    path = Path(page).absolute()
    if not page or path.is_dir():
        raise UsageError(f"--page {page}: is no file; give the name of an HTML file")
    if not path.parent.is_dir():
        raise UsageError(f"--page {page}: its folder does not exist; create it, or give another file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--page {page}: cannot be written; give another file")


def _read(name: str) -> RawImage:
    path = os.fsencode(local_path(name))
    return read_file(Root("/"), ReadLimits(), readable(os.fsencode(name)), path)


def _resolve(model: ModelConfig) -> tuple[ModelRef, str]:
    """Return a model and the device that it is tried on."""
    ref = resolve(model, notify=notify)
    check_columns(ref, ["image_id"], "files given to try have image_id alone; caption a table with --limit instead")
    with phase("importing torch", notify):
        device = "cpu" if model.endpoint else str(pick_device(model.device))
    ref = resolve_dtype(ref, model.dtype, device.partition(":")[0])
    print(f"captioner: {printable(ref.summary)}", file=sys.stderr)
    return ref, device


def _try_model(ref: ModelRef, device: str, model: ModelConfig, images: list[RawImage]) -> list[Trial]:
    """Caption the images with a model; where its weights are to be quantised, first with unquantised ones."""
    refs = [replace(ref, quantize=None), ref] if ref.quantize else [ref]
    return [_try_once(each, device, model, images) for each in refs]


def _share_equal(unquantised: Trial, quantised: Trial) -> str:
    """Return how many captions are the same with quantised weights."""
    name = printable(quantised.model)
    if unquantised.error or quantised.error:
        return f"{name}: not compared with unquantised weights, because one of the two ended in an error"
    captions = [texts for texts in zip(unquantised.texts, quantised.texts, strict=True) if not texts[0].error_code]
    equal = sum(before.caption == after.caption for before, after in captions)
    return f"{name}: {equal} of {counted(len(captions), 'caption')} equal to those of unquantised weights"


def _try_once(ref: ModelRef, device: str, model: ModelConfig, images: list[RawImage]) -> Trial:
    """Caption the images with a model."""
    from captioner.imaging import decode_images

    limits = SourceConfig()
    with GuardedDecoder(ref.spec, limits.max_pixels, limits.decode_timeout) as decoder:
        batch = decode_images(images, ref.spec, limits.max_pixels, decoder)
    codes, messages = (batch.rows[name].to_pylist() for name in ("error_code", "error_message"))
    texts = [ImageText("", code, message) for code, message in zip(codes, messages, strict=True)]
    name = f"{ref.name} {ref.quantize}" if ref.quantize else ref.name
    trial = Trial(name, ref.prompt, f"{ref.dtype} on {device}", texts)
    decoded = [index for index, code in enumerate(codes) if not code]
    if not decoded:
        return trial
    peak_bytes = _measured_memory(ref, device)
    prompts = prompts_of(ref, batch.rows.take(decoded))
    started = time.perf_counter()
    try:
        captioner = load(ref, device, model.batch_size, notify=notify)
        loaded = time.perf_counter()
        captions = caption_or_reasons(captioner, batch.pixels[decoded], prompts=prompts)
    except CaptionerError as error:
        return replace(trial, error=str(error))
    seconds = (loaded - started, time.perf_counter() - loaded)
    memory = peak_bytes()
    for index, caption in zip(decoded, captions, strict=True):
        if isinstance(caption, str):
            texts[index] = ImageText("", "generate_error", caption)
        else:
            sampled = {SAMPLES_FIELD.name: caption.samples} if caption.samples else {}
            texts[index] = ImageText(caption.text, answers={**sampled, **caption.answers})
    return replace(trial, load_seconds=seconds[0], seconds=seconds[1], memory=memory)


def _measured_memory(ref: ModelRef, device: str) -> Callable[[], int | None]:
    """Start to measure the most memory that a model takes, and return a function that returns it in bytes.

    Of a CUDA GPU what torch has reserved for it; on a CPU, where the system can tell, what this process takes beyond
    what it took before.
    """
    if ref.endpoint or not ref.path:
        return lambda: None
    import_family(ref.family)
    gc.collect()  # the model before this one
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_reserved
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps of an earlier model would count as taken before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM is the peak since now (Linux: proc(5))
        before = _bytes_of_process("VmRSS")
    except (OSError, LookupError):
        return lambda: None
    return lambda: max(0, _bytes_of_process("VmHWM") - before)


def _bytes_of_process(name: str) -> int:
    """Return a figure in /proc/self/status, which has kB. Raises LookupError."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields[name].split()[0])


def _print_captions(files: Sequence[str], trial: Trial) -> None:
    for name, text in zip(files, trial.texts, strict=True):
        if not text.error_code:
            print(f"{printable(name)}: {printable(text.caption)}")
            for column, value in text.more:
                print(f"  {column}: {printable(value)}")
    if trial.seconds is not None:
        print(f"captioner: {counted(trial.num_captions, 'image')} in {trial.seconds:.2f} s", file=sys.stderr)
    for name, text in zip(files, trial.texts, strict=True):
        if text.error_code:
            print(f"captioner: {printable(name)}: {text.error_code}: {printable(text.message)}", file=sys.stderr)


def _labelled(label: str, text: str, width: int, columns: int) -> str:
    """Return a text beside a label of `width` columns, or below it where that leaves less than 20 columns."""
    if columns - width - 4 >= MIN_TEXT_WIDTH:
        return textwrap.fill(text, columns, initial_indent=f"  {label:<{width}}  ", subsequent_indent=" " * (width + 4))
    indent = " " * 4
    below = textwrap.fill(text, max(columns, MIN_TEXT_WIDTH), initial_indent=indent, subsequent_indent=indent)
    return f"  {label}\n{below}" if label else below


def _print_comparison(files: Sequence[str], trials: list[Trial]) -> None:
    """Print the captions and other answers of each image below its name, then a table of time and memory."""
    names = [_fitting(trial.model) for trial in trials]
    width = max(map(len, names))
    columns = min(TABLE_WIDTH, shutil.get_terminal_size().columns)
    for index, file in enumerate(files):
        print(printable(file))
        for name, trial in zip(names, trials, strict=True):
            text = trial.texts[index]
            lines = [trial.error or text.shown, *(f"{column}: {value}" for column, value in text.more)]
            for label, line in zip([name, *[""] * len(text.more)], lines, strict=True):
                print(_labelled(label, printable(line) or "(empty)", width, columns))
        print()
    print(f"{'model':<{width}}{'load':>9}{'s/image':>9}{'memory':>10}")
    for name, trial in zip(names, trials, strict=True):
        print(f"{name:<{width}}{trial.load_time:>9}{trial.time_per_image:>9}{trial.peak_memory:>10}")


def _fitting(name: str) -> str:
    """Return the end of a model's name, which tells it from others better than its beginning."""
    name = printable(name)
    return name if len(name) <= MODEL_WIDTH else "…" + shorten(name[::-1], MODEL_WIDTH)[:-1][::-1]


def _thumbnails(images: list[RawImage]) -> list[str]:
    """Return a data URI for each image; "" for one that cannot be decoded."""
    uris = [""] * len(images)
    present = [index for index, image in enumerate(images) if image.data]
    with GuardedDecoder(SIDE, MAX_PIXELS, SourceConfig().decode_timeout) as decoder:
        for index, decoded in zip(present, decoder(images[index].data or b"" for index in present), strict=True):
            if decoded.pixels is not None:
                uris[index] = data_uri(decoded.pixels, decoded.width, decoded.height)
    return uris
