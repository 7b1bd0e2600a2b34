"""One local Ray for all the tests of this folder: starting one costs seconds. It has two GPUs that it only counts: a
worker that asks for one gets it and finds no device behind it."""

import os

import pytest


@pytest.fixture(scope="session")
def ray_instance():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=300 * 2**20,
    )
    yield ray
    ray.shutdown()
