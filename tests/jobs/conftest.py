"""A local Ray for the tests of this folder. It has two GPUs that it only counts: a worker that asks for one gets it and
finds no device behind it."""

import os

import pytest


@pytest.fixture(scope="module")
def ray_instance():
    """One for all modules of this process: starting it costs seconds. Tests of clusters may have ended it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if not ray.is_initialized():
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=300 * 2**20,
        )
    return ray
