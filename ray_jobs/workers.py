"""What Ray's workers import, and how a run ends whose workers do not start.

Ray starts an actor again for ever where its process dies, and prints an error each time: a run whose workers cannot
start would never end. `WorkerStarts` ends such a run with the reason.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from site import getsitepackages
from typing import Any

import captioner
from captioner.console.phases import phase
from captioner.console.text import printable
from captioner.errors import ClusterError
from ray_jobs.failures import first_error

START_TIMEOUT_S = 120.0  # for the first worker process of a Ray on this machine
MAX_RESTARTS = 4  # of a worker, before any worker has finished a chunk
POLL_S = 1.0
ADVICE = "fix it, then run the same command again; --local needs no Ray"
CRASHED = "its process crashed or was killed, for lack of memory perhaps; the logs of Ray's workers say more"

_messages: deque[str] = deque(maxlen=100)  # of Ray about workers that died


def job_config() -> Any:
    """Return a JobConfig for `ray.init` that keeps the current folder out of the workers' import path.

    Ray puts that folder first: there a numpy.py of somebody else would be imported for numpy. Workers find this package
    where it is installed, or in the folder that it was imported from.
    """
    from ray.job_config import JobConfig

    class OwnPath(JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True  # Ray then adds no folder of its own

    root = str(Path(captioner.__file__).parents[1])
    return OwnPath(_py_driver_sys_path=[] if root in getsitepackages() else [root])


def keep_messages() -> None:
    """Keep what Ray says about workers that died, instead of printing it."""
    from ray._private import worker

    def keep(data: dict[str, Any], ignore_prefix: bool) -> None:
        _messages.extend(data["lines"])

    worker.print_to_stdstream = keep


def check_own_workers() -> None:
    """Wait until a worker process of this machine's own Ray has run a task; the next task or actor uses that process.

    Raises ClusterError with the reason where none can: Ray starts such a process again and again, for ever.
    """
    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(_do_nothing).remote()
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    deadline = time.monotonic() + START_TIMEOUT_S
    with phase("starting a worker process"):
        while not ray.wait([task], timeout=POLL_S)[0]:
            if reason := _import_error(logs / "raylet.err"):
                raise ClusterError(f"Ray's worker processes cannot start: {reason}; {ADVICE}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no worker process of Ray started within {START_TIMEOUT_S:g} s, for lack of memory perhaps; "
                    f"its logs are in {logs}; {ADVICE}"
                )
    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a worker died while it started: {first_error(str(error)) or CRASHED}; {ADVICE}") from None


def _do_nothing() -> None:
    pass


def _import_error(log: Path) -> str:
    """Return the last error of a worker process that could not import Ray, from the log of the raylet; "" for none."""
    text = log.read_text(errors="replace") if log.exists() else ""
    *_, last = text.split("Traceback (most recent call last):")
    return printable(first_error(last)) if "default_worker.py" in last else ""


def reason_of_death(error: Exception) -> str:
    """Return why an actor's process ended: what it wrote, if it ran on this node. `error`: of Ray about the actor."""
    import ray

    if process := re.search(r"^\s*pid: (\d+)$", str(error), re.MULTILINE):
        logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
        for log in logs.glob(f"worker-*-{process[1]}.err"):
            text = log.read_text(errors="replace")
            if message := first_error(text) or "".join(re.findall(r"^Fatal Python error: .+$", text, re.MULTILINE)[:1]):
                return printable(message)
    return CRASHED


class WorkerStarts:
    """Watches until `has_started` is called whether Ray starts workers again and again; a context manager.

    Then `error` has the reason, and the workers are killed: Ray Data raises an error for that in the thread that waits.
    """

    def __init__(self) -> None:
        self.error: ClusterError | None = None
        self._ended = threading.Event()

    def has_started(self) -> None:
        self._ended.set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        _messages.clear()
        threading.Thread(target=self._watch, name="worker starts", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()

    def _watch(self) -> None:
        import ray.exceptions

        with suppress(ray.exceptions.RayError, OSError, RuntimeError):  # the cluster is gone, which the run notices
            while not self._ended.wait(POLL_S):
                if dying := _restarted_actors():
                    reason = first_error("\n".join(_messages)) or CRASHED
                    self.error = ClusterError(
                        f"a worker died {MAX_RESTARTS} times while it started: {reason}; "
                        "fix it, then run the same command again"
                    )
                    _kill(dying)
                    return


def _restarted_actors() -> list[str]:
    """Return the ids of this job's actors that Ray starts again although they died MAX_RESTARTS times."""
    import ray
    from ray._private.state import state  # the public interface needs a dashboard

    job_id = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = state.actor_table(None, job_id, "RESTARTING")
    return [name for name, actor in actors.items() if actor["NumRestarts"] >= MAX_RESTARTS]


def _kill(actor_ids: list[str]) -> None:
    import ray
    from ray._private.worker import global_worker

    for actor_id in actor_ids:
        with suppress(ValueError, ray.exceptions.RayError):  # it is not this process's actor
            global_worker.core_worker.kill_actor(ray.ActorID.from_hex(actor_id), True)
