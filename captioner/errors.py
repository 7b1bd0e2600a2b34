"""What can go wrong with a run, and the exit code of each.

    CaptionerError                 exit 1
    +-- UsageError                 a flag, YAML key or value that makes no sense
    +-- SourceError                the archive: missing, empty, unreadable as a whole
    +-- ModelError                 the model: not there, no weights, a missing tensor, an unknown kind
    +-- OutputError                OUT: unreadable, another run's, damaged
    |   +-- FingerprintError       OUT holds captions made with other weights or settings
    |   +-- DamagedFileError       a file in OUT is damaged or missing
    |   +-- VerificationError      rows lost or doubled: the promise of the table does not hold
    +-- ClusterError               Ray: not reachable, or without the resources asked for
    +-- TrainingError              training cannot go on: a loss that is no number
    +-- TooManyFailedError         exit 2: the table is whole, but too many images failed
    +-- CheckFailedError           exit 2: the table is whole, but its captions are worse than --max-wer or --min-lift
    |   +-- StoppedEarlyError      exit 2: the run was stopped (--stop-early): its captions cannot pass --max-wer
    +-- InterruptedRunError        exit 130: Ctrl-C; committed work stays
        +-- TerminatedRunError     exit 143: SIGTERM; committed work stays

A bad image is a row and never an exception: see `captioner.data.ERROR_CODES`. Every error here is one line that
says what, which value, and the way out; it is made from that line alone, so it survives pickling between processes.
"""

from __future__ import annotations

OK = 0
ERROR = 1
TOO_MANY_FAILED = 2
INTERRUPTED = 130
TERMINATED = 143

EXIT_CODES = {
    OK: "every planned image has its row",
    ERROR: "the run could not start or go on; the message says why; the same command resumes",
    TOO_MANY_FAILED: (
        "more images failed than --max-failed allows, not one is ok, or captions fail --max-wer, --min-lift or "
        "--max-flagged"
    ),
    INTERRUPTED: "stopped by Ctrl-C; the same command resumes",
    TERMINATED: "stopped by SIGTERM; the same command resumes",
}


class CaptionerError(Exception):
    """Base of every error this package raises on purpose. `str(error)` is the line to show a person."""

    exit_code = ERROR


class UsageError(CaptionerError):
    """A setting is unknown or out of range."""


class SourceError(CaptionerError):
    """The archive as a whole cannot be listed or read. Never a single image."""


class ModelError(CaptionerError):
    """The model cannot be used: absent, without weights, with missing tensors, of an unknown kind."""


class OutputError(CaptionerError):
    """OUT cannot be used."""


class FingerprintError(OutputError):
    """OUT was made with other weights or settings."""


class DamagedFileError(OutputError):
    """A file in OUT is missing, or its bytes are not those that were written."""


class VerificationError(OutputError):
    """The table does not hold exactly one current row for each planned image."""


class ClusterError(CaptionerError):
    """Ray cannot be reached or lacks what the run asks for."""


class TrainingError(CaptionerError):
    """Training cannot go on with these settings."""


class TooManyFailedError(CaptionerError):
    """The table is complete, but its share of failed images is above the limit."""

    exit_code = TOO_MANY_FAILED


class CheckFailedError(CaptionerError):
    """The captions are worse than was asked for. The table is complete."""

    exit_code = TOO_MANY_FAILED


class StoppedEarlyError(CheckFailedError):
    """The captions so far are so much worse than was asked for that the run was not finished."""


class InterruptedRunError(CaptionerError):
    """The run was stopped from outside."""

    exit_code = INTERRUPTED


class TerminatedRunError(InterruptedRunError):
    """The run was stopped by SIGTERM."""

    exit_code = TERMINATED
