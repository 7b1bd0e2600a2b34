"""Run a command of this package as a Ray job: `captioner submit -- caption SOURCE OUT ...`.

The submission id is derived from the command, so that submitting twice follows the job that runs instead of starting a
second. What is uploaded is the installed packages `captioner` and `ray_jobs`; never the current directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.config import Settings, command_line, settings_of
from captioner.console.stopping import notify
from captioner.errors import OK, ClusterError, UsageError
from captioner.files import is_uri, local_path
from ray_jobs.address import check_dashboard
from ray_jobs.follow import ENDED, Follower, reaching
from ray_jobs.options import settings_of_call

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = ("caption", "train", "check", "doctor", "estimate")  # commands that may run as a job, where they are there
PATHS = ("--model", "--out", "--against", "--references", "--terms", "--eval-data", "--test-data")


@dataclass(frozen=True, slots=True)
class Submission:
    """What is to run on the cluster. `arguments`: the command's name, then its own arguments, resolved."""

    arguments: list[str]
    submission_id: str
    working_dir: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    num_cpus: float = 0.0
    num_gpus: float = 0.0

    @property
    def entrypoint(self) -> str:
        return shlex.join(["python", "-m", "ray_jobs.cli", *self.arguments])

    @property
    def waits_for(self) -> str:
        """What the job cannot start without, in words."""
        wanted = {"CPUs (--entrypoint-num-cpus)": self.num_cpus, "GPUs (--entrypoint-num-gpus)": self.num_gpus}
        asked = [f"{number:g} {name}" for name, number in wanted.items() if number]
        return " and ".join(asked) or "the head node to set up its runtime environment"


def make_submission(
    commands: Mapping[str, Any],
    words: list[str],
    submission_id: str | None = None,
    working_dir: str | None = None,
    env: list[str] | None = None,
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
) -> Submission:
    """Check a command line as the command itself would, here, before anything is uploaded. Raises UsageError.

    `commands`: of the command line by name, as typer made them.
    """
    if working_dir is not None and not Path(working_dir).is_dir():
        raise UsageError(f"--working-dir {working_dir}: no such directory")
    arguments = resolve_arguments(commands, words, working_dir)
    name = submission_id or f"captioner-{arguments[0]}-{_digest(arguments)}"
    return Submission(arguments, name, working_dir, _environment(env or []), num_cpus, num_gpus)


def resolve_arguments(commands: Mapping[str, Any], words: list[str], working_dir: str | None = None) -> list[str]:
    """Return the command with its settings resolved.

    A --config file is read here, and local paths become absolute, because a job runs in another directory. A path that
    is in `working_dir` goes with it and stays relative.
    """
    jobs = [name for name in JOBS if name in commands]
    if not words or words[0] not in jobs:
        raise UsageError(
            f"{' '.join(words[:1]) or 'nothing'}: cannot run as a job; commands that can: {', '.join(jobs)}"
        )
    command = commands[words[0]]
    call = settings_of_call(command.callback, command.make_context(words[0], words[1:]).params)
    if call is None:
        return words
    settings, own = call
    cluster = getattr(settings, "cluster", None)
    if cluster is not None and (cluster.address or getattr(cluster, "local", False)):
        raise UsageError(
            "--address belongs to submit: `captioner submit --address URL -- ...`; --local runs without Ray"
        )
    given = {one: own[one.name] for one in command.params if own.get(one.name) not in (None, False, [])}
    places = [_absolute(value, working_dir, True) for one, value in given.items() if one.param_type_name == "argument"]
    options = [word for one, value in given.items() if one.param_type_name == "option" for word in _words(one, value)]
    wanted = [
        word for word in command_line(_with_absolute_paths(settings, working_dir)) if word
    ]  # "": it has no SOURCE
    return [words[0], *places, *wanted, *options]


def _words(option: Any, value: Any) -> list[str]:
    path = option.opts[0] in PATHS
    return [option.opts[0]] if value is True else [option.opts[0], _absolute(value, None, True) if path else str(value)]


def _with_absolute_paths(settings: Settings, working_dir: str | None) -> Settings:
    for one in settings_of(type(settings)):
        group = getattr(settings, one.group)
        value = getattr(group, one.field)
        if isinstance(value, str) and value and (one.argument or one.flag in PATHS):
            changed = group.model_copy(update={one.field: _absolute(value, working_dir, one.group == "output")})
            settings = settings.model_copy(update={one.group: changed})
    return settings


def _absolute(location: str, working_dir: str | None, is_output: bool) -> str:
    """Return the path as the job has to be given it.

    An output is made absolute always: what a job writes beside itself is lost with it. What is not here is a hub id, a
    glob, or a path that only the cluster has.
    """
    if is_uri(location) or (working_dir and not is_output and (Path(working_dir) / location).exists()):
        return location
    return local_path(location) if is_output or Path(location).exists() else location


def submit(submission: Submission, address: str | None, follow: bool, pending_timeout: float) -> int:
    """Start or attach, then follow; returns the exit code of the job's own command. Raises ClusterError."""
    client = connect_client(address)
    job_id, is_new = start_or_attach(client, submission)
    announcement = f"{'submitted' if is_new else 'already submitted'}: {job_id}"
    if not follow:
        notify(announcement)
        return OK
    return Follower(client, job_id, submission.waits_for, pending_timeout).run(announcement)


def start_or_attach(client: JobSubmissionClient, submission: Submission) -> tuple[str, bool]:
    """Return the submission id and whether it was started now.

    A job of this id that has not ended is attached to; an ended one gives way to the next suffix: ID, ID-2, ID-3, ...
    """
    while True:
        with reaching(client.get_address()):
            jobs = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
        job_id = _current_id(submission.submission_id, jobs)
        if job_id in jobs:
            if jobs[job_id].entrypoint != submission.entrypoint:
                raise ClusterError(f"{job_id} is running another command: {jobs[job_id].entrypoint}; give another id")
            return job_id, False
        try:
            with reaching(client.get_address()):
                client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=job_id,
                    runtime_env=runtime_env(submission),
                    entrypoint_num_cpus=submission.num_cpus or None,
                    entrypoint_num_gpus=submission.num_gpus or None,
                )
            return job_id, True
        except ClusterError as error:
            if "already exists" not in str(error):  # two submitted at once: look again, and attach
                raise


def _current_id(base: str, jobs: Mapping[str, Any]) -> str:
    job_id, number = base, 1
    while job_id in jobs and str(jobs[job_id].status) in ENDED:
        number += 1
        job_id = f"{base}-{number}"
    return job_id


def runtime_env(submission: Submission) -> dict[str, Any]:
    """What goes with the job: the two installed packages, and what was asked for."""
    quiet = {"RAY_BACKEND_LOG_LEVEL": "fatal"}  # else each start logs an error about actor arguments that is none
    made: dict[str, Any] = {"py_modules": package_directories(), "env_vars": quiet | submission.env}
    if submission.working_dir:
        made["working_dir"] = submission.working_dir
    return made


def package_directories() -> list[str]:
    """Where `captioner` and `ray_jobs` are installed."""
    import captioner
    import ray_jobs

    return [str(Path(package.__path__[0]).resolve()) for package in (captioner, ray_jobs)]


def connect_client(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's dashboard. A token in RAY_AUTH_TOKEN turns token authentication on."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # a line for each upload and each connection
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--address {address}: must be the dashboard's, http://HEAD:8265")
    check_dashboard(address)
    with reaching(address):
        return JobSubmissionClient(address)


def _environment(pairs: list[str]) -> dict[str, str]:
    """`K=V`, or `K` for the value that K has here."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals and name not in os.environ:
            raise UsageError(f"--env {name}: is not set here; give {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _digest(arguments: list[str]) -> str:
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:12]
