"""cluster.yaml is what `ray up` accepts."""

from pathlib import Path

import pytest
import yaml

CLUSTER_YAML = Path(__file__).parents[1] / "cluster.yaml"


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(CLUSTER_YAML.read_text()))
    validate_config(config)

    assert config["head_node_type"] in config["available_node_types"]


def test_ray_refuses_a_key_it_does_not_know() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(CLUSTER_YAML.read_text()) | {"initial_workers": 1}

    with pytest.raises(Exception, match="initial_workers"):
        validate_config(prepare_config(config))


def test_the_image_is_an_exact_release_that_ray_still_builds() -> None:
    image = yaml.safe_load(CLUSTER_YAML.read_text())["docker"]["image"]

    assert image.startswith("rayproject/ray:")
    version = image.split(":")[1].split("-")[0]
    constraints = (CLUSTER_YAML.parent / "constraints.txt").read_text()
    assert f"ray=={version}\n" in constraints.replace("ray[data,default,train]", "ray")
