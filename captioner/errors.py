"""The errors of a run, and their exit codes.

    CaptionerError                 exit 1
    +-- UsageError                 an invalid flag, YAML key or value
    |   +-- NoAnswerError          a store did not answer in time, and is still being asked
    +-- SourceError                the source: missing, empty, unreadable as a whole
    +-- ModelError                 the model: missing, without weights or tensors, of an unknown kind
    |   +-- EndpointError          a model server: not reachable, refuses the key, or serves another model than before
    +-- OutputError                OUT: unreadable, damaged, or of another run
    |   +-- FingerprintError       OUT holds captions made with other weights or settings
    |   +-- DamagedFileError       a file in OUT is damaged or missing
    |   +-- VerificationError      the table has lost or doubled rows
    +-- ClusterError               Ray: not reachable, or without the requested resources
    +-- TrainingError              training cannot continue, such as with a loss of NaN
    +-- TooManyFailedError         exit 2: the table is complete, but too many images failed
    +-- CheckFailedError           exit 2: the table is complete, but its captions fail a limit such as --max-wer
    |   +-- StoppedEarlyError      exit 2: the run was stopped (--stop-early), since it would fail --max-wer
    +-- InterruptedRunError        exit 130: Ctrl-C; committed work stays
        +-- TerminatedRunError     exit 143: SIGTERM; committed work stays

A bad image is a row and never an exception: see `captioner.data.ERROR_CODES`. The message of an error is one line that
says what happened, with which value, and what to do. The message is the only argument, so that errors survive pickling.
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
        "more images failed than --max-failed allows, none is ok, or captions fail --max-wer, --min-lift, "
        "--max-flagged or --min-right"
    ),
    INTERRUPTED: "stopped by Ctrl-C; the same command resumes",
    TERMINATED: "stopped by SIGTERM; the same command resumes",
}


class CaptionerError(Exception):
    """Base class of the errors of this package. `str(error)` is the line to show to the user."""

    exit_code = ERROR


class UsageError(CaptionerError):
    """Raised for a setting that is unknown or out of range."""


class NoAnswerError(UsageError):
    """Raised where a store did not answer in time; its client may ask on for a minute, whatever becomes of this."""


class SourceError(CaptionerError):
    """Raised where the source as a whole cannot be listed or read; never for a single image."""


class ModelError(CaptionerError):
    """Raised where the model cannot be used: missing, without weights or tensors, of an unknown kind."""


class EndpointError(ModelError):
    """Raised where a run cannot go on with its model servers; never for a single image."""


class OutputError(CaptionerError):
    """Raised where OUT cannot be used."""


class FingerprintError(OutputError):
    """Raised where OUT was made with other weights or settings."""


class DamagedFileError(OutputError):
    """Raised where a file in OUT is missing or was changed."""


class VerificationError(OutputError):
    """Raised where the table does not have exactly one current row for each planned image."""


class ClusterError(CaptionerError):
    """Raised where Ray cannot be reached or lacks the requested resources."""


class TrainingError(CaptionerError):
    """Raised where training cannot continue with its settings."""


class TooManyFailedError(CaptionerError):
    """Raised where a complete table has a larger share of failed images than --max-failed allows."""

    exit_code = TOO_MANY_FAILED


class CheckFailedError(CaptionerError):
    """Raised where the captions of a complete table fail a limit such as --max-wer."""

    exit_code = TOO_MANY_FAILED


class StoppedEarlyError(CheckFailedError):
    """Raised where a run was stopped because its captions would fail a limit."""


class InterruptedRunError(CaptionerError):
    """Raised where the run was stopped from outside."""

    exit_code = INTERRUPTED


class TerminatedRunError(InterruptedRunError):
    """Raised where the run was stopped by SIGTERM."""

    exit_code = TERMINATED
