"""Run a command of this package as a Ray job: `captioner submit -- caption SOURCE OUT ...`.

The submission id is derived from the command, so that submitting the same command again follows the running job instead
of starting a second one. Only the installed packages `captioner` and `ray_jobs` are uploaded, never the current
directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import time
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
from ray_jobs.options import is_given, settings_of_call

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

JOBS = ("caption", "train", "check", "judge", "doctor", "estimate")  # commands that may run as a job
NO_AGENT = "No available agent"  # what a head says, after 10 s, while it starts or where the port of its agent is taken
AGENT_S = 120.0  # the longest start of a head that is waited for
PATHS = (
    "--model",
    "--out",
    "--against",
    "--references",
    "--terms",
    "--questions",
    "--eval-data",
    "--test-data",
    "--caption-image",
)


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
        """What the job needs before it starts, for a message."""
        resources = {"CPUs (--entrypoint-num-cpus)": self.num_cpus, "GPUs (--entrypoint-num-gpus)": self.num_gpus}
        requests = [f"{number:g} {name}" for name, number in resources.items() if number]
        return " and ".join(requests) or "the head node to set up its runtime environment"


def make_submission(
    commands: Mapping[str, Any],
    words: list[str],
    submission_id: str | None = None,
    working_dir: str | None = None,
    env: list[str] | None = None,
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
) -> Submission:
    """Check a command line as the command itself does, before anything is uploaded. Raises UsageError.

    `commands`: the commands of the command line by name, as typer has made them.
    """
    if working_dir is not None and not Path(working_dir).is_dir():
        raise UsageError(f"--working-dir {working_dir}: no such directory")
    arguments = resolve_arguments(commands, words, working_dir)
    name = submission_id or f"captioner-{arguments[0]}-{_digest(arguments)}"
    return Submission(arguments, name, working_dir, _environment(env or []), num_cpus, num_gpus)


def resolve_arguments(commands: Mapping[str, Any], words: list[str], working_dir: str | None = None) -> list[str]:
    """Return the command with its settings resolved.

    A --config file is read here, and local paths become absolute, since a job runs in another directory. A path in
    `working_dir` is uploaded with it and stays relative.
    """
    jobs = [name for name in JOBS if name in commands]
    if not words or words[0] not in jobs:
        raise UsageError(
            f"{' '.join(words[:1]) or 'nothing'}: cannot run as a job; commands that can: {', '.join(jobs)}"
        )
    command = commands[words[0]]
    given = command.make_context(f"captioner {words[0]}", words[1:]).params
    if given.get("print_config"):
        raise UsageError("--print-config starts nothing, so it is no job; run the command without submit to see it")
    call = settings_of_call(command.callback, given)
    if call is None:
        return words
    settings, values = call
    cluster = getattr(settings, "cluster", None)
    if cluster is not None and (cluster.address or getattr(cluster, "local", False)):
        raise UsageError(
            "--address belongs to submit: `captioner submit --address URL -- ...`; --local runs without Ray"
        )
    own = [(param, values[param.name]) for param in command.params if is_given(values.get(param.name))]
    arguments = [_absolute(value, working_dir, True) for param, value in own if param.param_type_name == "argument"]
    options = [word for param, value in own if param.param_type_name == "option" for word in _words(param, value)]
    return [words[0], *arguments, *_settings_words(_with_absolute_paths(settings, working_dir)), *options]


def _settings_words(settings: Settings) -> list[str]:
    """Return the command line of the settings without arguments that are not given. Raises UsageError."""
    names = [setting.argument for setting in settings_of(type(settings)) if setting.argument]
    words = command_line(settings)
    arguments, flags = words[: len(names)], words[len(names) :]
    while arguments and not arguments[-1]:
        arguments.pop()
    if "" in arguments:
        missing, given = names[arguments.index("")], names[len(arguments) - 1]
        raise UsageError(f"no {missing} given, only {given} ({arguments[-1]}); name both")
    return arguments + flags


def _words(option: Any, value: Any) -> list[str]:
    flag = option.opts[0]
    return [flag] if value is True else [flag, _absolute(value, None, True) if flag in PATHS else str(value)]


def _with_absolute_paths(settings: Settings, working_dir: str | None) -> Settings:
    for setting in settings_of(type(settings)):
        group = getattr(settings, setting.group)
        if setting.flag == "--model" and getattr(group, "endpoint", None):
            continue  # the name of a model on servers
        value = getattr(group, setting.field)
        if isinstance(value, str) and value and (setting.argument or setting.flag in PATHS):
            path = _absolute(value, working_dir, is_output=setting.argument == "OUT")
            group = group.model_copy(update={setting.field: path})
            settings = settings.model_copy(update={setting.group: group})
    return settings


def _absolute(location: str, working_dir: str | None, is_output: bool) -> str:
    """Return a path for the command line of the job.

    An output always becomes absolute: files in the job's own directory are lost when it ends. An input that does not
    exist here is kept: it is a hub id, a glob, or a path that only the cluster has.
    """
    if is_uri(location) or (working_dir and not is_output and (Path(working_dir) / location).exists()):
        return location
    return local_path(location) if is_output or os.path.exists(local_path(location)) else location


def submit(submission: Submission, address: str | None, follow: bool, pending_timeout: float) -> int:
    """Start the job or attach to it, then follow it; return the exit code of its command. Raises ClusterError."""
    client = connect_client(address)
    job_id, is_new = start_or_attach(client, submission, pending_timeout)
    announcement = f"{'submitted' if is_new else 'already submitted'}: {job_id}"
    if not is_new and (submission.env or submission.working_dir):
        notify(f"{job_id} keeps the --env and --working-dir that it was started with; stop it first to change them")
    if not follow:
        notify(announcement)
        return OK
    return Follower(client, job_id, submission.waits_for, pending_timeout).run(announcement)


def start_or_attach(client: JobSubmissionClient, submission: Submission, pending_timeout: float) -> tuple[str, bool]:
    """Return the submission id, and whether the job was started now.

    A running job of this id is attached to; after its end the next suffix is used: ID, ID-2, ID-3, ... A head that
    takes no jobs yet is asked again for `pending_timeout` seconds, 120 at most. Raises ClusterError.
    """
    timeout = min(pending_timeout, AGENT_S)
    deadline, is_waiting = time.monotonic() + timeout, False
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
            if "already exists" in str(error):  # another submit was faster: attach to its job
                continue
            if NO_AGENT not in str(error):
                raise
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{client.get_address()} has taken no job for {timeout:g} s: the agent of its head node does "
                    "not answer; dashboard_agent.log of the head says why; where another Ray runs on that machine, "
                    "start the head with --dashboard-agent-listen-port=0"
                ) from error
            if not is_waiting:
                notify(f"{client.get_address()} takes no jobs yet; waiting up to {timeout:g} s for its agent")
            is_waiting = True


def _current_id(base: str, jobs: Mapping[str, Any]) -> str:
    job_id, number = base, 1
    while job_id in jobs and str(jobs[job_id].status) in ENDED:
        number += 1
        job_id = f"{base}-{number}"
    return job_id


def runtime_env(submission: Submission) -> dict[str, Any]:
    """Return Ray's runtime environment of the job: the two installed packages, and what the user asks for."""
    quiet = {"RAY_BACKEND_LOG_LEVEL": "fatal"}  # else each start logs a needless error about actor arguments
    environment: dict[str, Any] = {"py_modules": package_directories(), "env_vars": quiet | submission.env}
    if submission.working_dir:
        environment["working_dir"] = submission.working_dir
    return environment


def package_directories() -> list[str]:
    """Return the directories where `captioner` and `ray_jobs` are installed."""
    import captioner
    import ray_jobs

    return [str(Path(package.__path__[0]).resolve()) for package in (captioner, ray_jobs)]


def connect_client(address: str | None) -> JobSubmissionClient:
    """Return a client of the cluster's dashboard. A token in RAY_AUTH_TOKEN turns token authentication on."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_AUTH_TOKEN"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # else a line for each upload and connection
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"--address {address}: must be the dashboard's, http://HEAD:8265")
    check_dashboard(address)
    with reaching(address):
        return JobSubmissionClient(address)


def _environment(pairs: list[str]) -> dict[str, str]:
    """Parse `K=V`, or `K` for the value of K in this environment."""
    environment = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals and name not in os.environ:
            raise UsageError(f"--env {name}: is not set in this environment; give {name}=VALUE")
        environment[name] = value if equals else os.environ[name]
    return environment


def _digest(arguments: list[str]) -> str:
    return hashlib.sha256("\0".join(arguments).encode()).hexdigest()[:12]
