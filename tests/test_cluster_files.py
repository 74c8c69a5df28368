"""The launcher files, by the Ray launcher's own validation (no cloud, no ssh)."""

from pathlib import Path
from typing import Any

import pytest
import yaml

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
