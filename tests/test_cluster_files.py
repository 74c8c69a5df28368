"""The launcher files, by the Ray launcher's own validation (no cloud, no ssh)."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel
from typer.testing import CliRunner

from orchestrator.cli import app

launcher = pytest.importorskip("ray.autoscaler._private.util", reason="Ray moved its private launcher module")

ROOT = Path(__file__).parents[1]
FILES = ("cluster.yaml", "cluster-onprem.yaml")


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text()))


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_it(name: str) -> None:
    launcher.validate_config(launcher.prepare_config(read(name)))


@pytest.mark.parametrize("name", FILES)
def test_ray_would_refuse_a_typo(name: str) -> None:
    with pytest.raises(Exception, match="max_wokers"):
        launcher.validate_config(launcher.prepare_config(read(name) | {"max_wokers": 3}))


@pytest.mark.parametrize("name", FILES)
def test_every_node_asks_for_the_token_and_keeps_the_dashboard_home(name: str) -> None:
    config = read(name)
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any(remote.endswith("auth_token") for remote in config["file_mounts"])


@pytest.mark.parametrize("name", FILES)
def test_what_is_started_on_the_head_runs_on_the_cluster(name: str) -> None:
    """Without an address it would run in a Ray of its own, on the head alone."""
    config = read(name)
    start = next(command for command in config["head_start_ray_commands"] if "ray start" in command)
    port = re.search(r"--port=(\d+)", start)
    assert port
    assert f"echo 'export RAY_ADDRESS=127.0.0.1:{port[1]}' >> ~/.bashrc" in config["head_setup_commands"]


def test_the_cloud_has_spot_gpu_workers_that_scale_to_zero() -> None:
    config = read("cluster.yaml")
    workers = config["available_node_types"]["gpu"]
    assert workers["min_workers"] == 0
    assert workers["max_workers"] > 0
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert config["head_node_type"] in config["available_node_types"]


def test_images_carry_the_pinned_ray() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    assert f":{pins['ray']}-" in read("cluster.yaml")["docker"]["image"]
    assert kubernetes()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    assert f"rayproject/ray:{pins['ray']}-" in (ROOT / "cluster-kuberay.yaml").read_text()


class _Strict(BaseModel):
    """Kubernetes drops fields that it does not know without a word: a typing mistake is no error there, but is here."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class _Variable(_Strict):
    name: str
    value: str


class _Resources(_Strict):
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], str]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], str]


class _Mount(_Strict):
    name: str
    mount_path: str


class _Container(_Strict):
    name: str
    image: str
    env: list[_Variable]
    resources: _Resources
    volume_mounts: list[_Mount]


class _Claim(_Strict):
    claim_name: str


class _Volume(_Strict):
    name: str
    persistent_volume_claim: _Claim


class _Pod(_Strict):
    containers: list[_Container]
    volumes: list[_Volume]


class _Template(_Strict):
    spec: _Pod


class _Head(_Strict):
    ray_start_params: dict[str, str]
    template: _Template


class _Workers(_Head):
    group_name: str
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=0)


class _Auth(_Strict):
    mode: Literal["disabled", "token"]
    secret_name: str


class _Cluster(_Strict):
    ray_version: str
    enable_in_tree_autoscaling: bool
    auth_options: _Auth
    head_group_spec: _Head
    worker_group_specs: list[_Workers]


class _JobSpec(_Strict):
    entrypoint: str
    entrypoint_num_cpus: int | float
    backoff_limit: int = Field(ge=0)
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int = Field(ge=0)
    ray_cluster_spec: _Cluster


class _RayJob(_Strict):
    """The part of KubeRay's RayJob (API ray.io/v1) that the file uses, after the API reference of KubeRay 1.6."""

    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[Literal["name"], str]
    spec: _JobSpec


def test_on_kubernetes_every_field_is_one_of_rayjobs_own() -> None:
    job = kubernetes()["RayJob"]
    _RayJob.model_validate(job)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 2
    with pytest.raises(ValidationError, match="maxReplica"):
        _RayJob.model_validate(job)


def kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "cluster-kuberay.yaml").read_text())
    return {document["kind"]: document for document in documents}


def test_on_kubernetes_all_pods_share_the_results_and_ask_for_the_token() -> None:
    volume, job = (kubernetes()[kind] for kind in ("PersistentVolumeClaim", "RayJob"))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    results = Path(job["spec"]["entrypoint"].partition("--results ")[2])
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        (shared,) = pod["volumes"]
        assert results.is_relative_to(mount["mountPath"])
        assert shared["name"] == mount["name"]
        assert shared["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    asked = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    assert ["nvidia.com/gpu" in limits for limits in asked] == [False, True]  # trainings on GPUs, the rest anywhere
    assert cluster["workerGroupSpecs"][0]["minReplicas"] == 0


def test_on_kubernetes_the_command_is_one() -> None:
    program, *arguments = kubernetes()["RayJob"]["spec"]["entrypoint"].split()
    assert program == "mergedt"
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0, done.output
