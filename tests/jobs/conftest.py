"""A local Ray for the tests of this folder. It has two GPUs that it only counts: a worker that asks for one gets it and
finds no device behind it. Its decoders obey the markers of `captioner.testing`."""

import os
from pathlib import Path

import pytest
from helpers import started_in_time

from captioner.testing import decoder_faults

# Run by each process of Ray before all else. transformers imports these packages wherever they are installed, which
# takes up to two seconds of CPU in each of some hundred workers.
WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in ("bitsandbytes", "peft", "torchao") else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""


@pytest.fixture(scope="session")
def worker_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PYTHONPATH for Ray's processes: what `pip install captioner` installs, without extras, and decoders that obey."""
    faults, _, rest = decoder_faults()["PYTHONPATH"].partition(os.pathsep)
    folder = tmp_path_factory.mktemp("worker_path")
    (folder / "sitecustomize.py").write_text(WITHOUT_EXTRAS + (Path(faults) / "sitecustomize.py").read_text())
    return os.pathsep.join(filter(None, (str(folder), rest)))


@pytest.fixture(scope="module")
def ray_instance(worker_path: str):
    """One for all modules of this process: starting it costs seconds. Tests of clusters may have ended it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    from ray_jobs.cluster import longer_start_timeout, without_monitors

    settings = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 300 * 2**20, "include_dashboard": False}
    settings["_system_config"] = {
        # How long Ray waits to hear why a worker died, before it only says that it is gone; by default a second.
        "timeout_ms_task_wait_for_death_info": 60_000,
        # By default 15: on a busy CPU the work gets what Ray's other processes leave.
        "worker_niceness": 0,
    }
    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch, without_monitors(), longer_start_timeout():
            patch.setenv("PYTHONPATH", worker_path)
            started_in_time(
                lambda: ray.init(address="local", log_to_driver=False, logging_level="ERROR", **settings), ray.shutdown
            )
    return ray


# The files that take longest, begun first: else one process of `pytest -n 2` ends minutes after the other.
SLOWEST = ["test_train_on_ray", "test_counted_gpus", "test_docs_pages", "test_kills", "test_caption_on_ray"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOWEST)))
