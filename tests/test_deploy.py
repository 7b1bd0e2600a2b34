"""The files in deploy/ are what their readers accept: Ray's launcher, KubeRay, the command line, Prometheus."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
import shlex
import tomllib
from importlib.metadata import requires
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from captioner.errors import UsageError
from ray_jobs import metrics
from ray_jobs.cli import app
from ray_jobs.nodes import PACKAGES
from ray_jobs.submit import resolve_arguments

ROOT = Path(__file__).parents[1]
CLUSTERS = [ROOT / "cluster.yaml", ROOT / "deploy/gcp.yaml", ROOT / "deploy/on-premise.yaml"]
MANIFESTS = sorted((ROOT / "deploy/kuberay").glob("*.yaml"))
SCHEMA = json.loads((ROOT / "tests/rayjob.schema.json").read_text())
RAY_VERSION = re.search(r"^ray(?:\[.*\])?==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def entrypoint(manifest: Path) -> list[str]:
    program, *words = shlex.split(yaml.safe_load(manifest.read_text())["spec"]["entrypoint"])
    assert program == "captioner"
    return words


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda path: path.name)
def test_rays_launcher_accepts_the_cluster_file(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)

    assert config["docker"]["image"] == f"rayproject/ray:{RAY_VERSION}-py311-gpu"
    assert any("ray start --head" in command for command in config["head_start_ray_commands"])


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda path: path.name)
def test_what_the_nodes_install_brings_every_dependency_and_the_doctor_looks_for_it(file: Path) -> None:
    commands = yaml.safe_load(file.read_text())["setup_commands"]
    installed = [word for command in commands for word in shlex.split(command) if "==" in word]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    rays_image = next(line for line in dependencies if line.startswith("ray["))

    assert {canonicalize_name(Requirement(line).name) for line in dependencies} <= required_by([*installed, rays_image])
    assert set(installed) <= set((ROOT / "constraints.txt").read_text().splitlines())
    assert {Requirement(line).name for line in installed} <= set(PACKAGES)


def required_by(lines: list[str]) -> set[str]:
    """Return the distributions that pip installs for these requirements, by the metadata of those installed here."""
    waiting, found_extras = [Requirement(line) for line in lines], {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras} - found_extras.setdefault(name, set())
        found_extras[name] |= extras
        needed = map(Requirement, requires(name) or []) if extras else ()
        waiting += [
            other
            for other in needed
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return set(found_extras)


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda path: path.name)
def test_a_cluster_that_is_started_asks_for_its_token(file: Path, tmp_path: Path, monkeypatch) -> None:
    from ray.autoscaler._private.util import hash_runtime_conf, prepare_config

    config = prepare_config(yaml.safe_load(file.read_text()))

    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    digests = []
    for token in ("one", "other"):  # what the launcher copies: with another token, nodes are set up anew
        (tmp_path / ".ray/auth_token").write_text(token)
        digests.append(hash_runtime_conf(config["file_mounts"], [], token, generate_file_mounts_contents_hash=True)[1])
    assert digests[0] != digests[1]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_a_ray_job(manifest: Path) -> None:
    job = yaml.safe_load(manifest.read_text())
    jsonschema.validate(job, SCHEMA)

    spec = job["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["rayVersion"] == RAY_VERSION
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert container["resources"]["limits"]["nvidia.com/gpu"]
    assert workers["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_the_schema_refuses_a_key_that_kuberay_does_not_know() -> None:
    job = copy.deepcopy(yaml.safe_load(MANIFESTS[0].read_text()))
    job["spec"]["shutdownAfterJobFinish"] = True

    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        jsonschema.validate(job, SCHEMA)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_the_command_of_a_manifest_is_one_that_the_command_line_takes(manifest: Path) -> None:
    words = entrypoint(manifest)
    commands = typer.main.get_command(app).commands
    if words[0] not in commands:
        pytest.skip(f"no command {words[0]} in this version")

    assert resolve_arguments(commands, words)[0] == manifest.stem
    with pytest.raises((UsageError, typer.TyperException)):
        resolve_arguments(commands, [*words, "--no-such-flag"])


def test_the_job_beside_model_servers_asks_them_and_takes_no_gpu() -> None:
    servers, service = yaml.safe_load_all((ROOT / "deploy/model-server.yaml").read_text())
    job = yaml.safe_load((ROOT / "deploy/model-server-job.yaml").read_text())
    jsonschema.validate(job, SCHEMA)
    name, words = servers["metadata"]["name"], shlex.split(job["spec"]["entrypoint"])
    (vllm,) = servers["spec"]["template"]["spec"]["containers"]
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]

    assert resolve_arguments(typer.main.get_command(app).commands, words[1:])[0] == "caption"
    endpoints = [word for flag, word in itertools.pairwise(words) if flag == "--endpoint"]
    assert endpoints == [f"http://{name}-{number}.{name}:8000/v1" for number in range(servers["spec"]["replicas"])]
    assert service["metadata"]["name"] == servers["spec"]["serviceName"] == name
    assert f"--model={words[words.index('--model') + 1]}" in vllm["args"]
    assert "nvidia.com/gpu" in vllm["resources"]["limits"]
    assert "nvidia.com/gpu" not in str(job)
    assert head["env"][0]["name"] == "CAPTIONER_API_KEY"
    assert head["env"][0]["valueFrom"] == vllm["env"][0]["valueFrom"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION


def test_the_image_is_built_from_files_that_are_there() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]]

    assert f"FROM rayproject/ray:{RAY_VERSION}-py311-gpu" in lines
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert "RUN pip install --no-cache-dir -c constraints.txt ." in lines


@pytest.mark.parametrize("file", ["deploy/grafana.json", "docs/aws.md"])
def test_dashboard_and_documents_name_every_metric_and_no_other(file: str) -> None:
    named = re.findall(r"ray_(captioner_\w+)", (ROOT / file).read_text())
    defined = set(re.findall(r'"(captioner_\w+)"', inspect.getsource(metrics)))

    assert len(defined) >= 8
    assert {re.sub(r"_(total|bucket)$", "", name) for name in named} == defined


def test_the_dashboard_has_panels_side_by_side() -> None:
    panels = json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]
    positions = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]

    assert len(panels) >= 10
    assert len(set(positions)) == len({panel["id"] for panel in panels}) == len(panels)
