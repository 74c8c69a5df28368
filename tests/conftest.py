"""One Ray session and one finished toy run, shared by the tests that need them."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from toy import everything

from orchestrator.place import VARIABLE
from orchestrator.session import Session, connect

# Policies of 16 numbers a token: on a busy machine two threads that wait for each other take forty times as long.
torch.set_num_threads(1)


FEW = 5  # processes that the tests kill; `make chaos` kills more, and runs the tests marked `chaos`


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long `tests/chaos` goes on."""
    parser.addoption("--kills", type=int, default=FEW, help="processes that tests/chaos kills (at least one of each)")
    parser.addoption("--chaos-seed", type=int, default=0, help="of the moments they are killed at")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what takes many minutes to `make chaos`."""
    if config.getoption("kills") <= FEW:
        for item in items:
            if item.get_closest_marker("chaos"):
                item.add_marker(pytest.mark.skip(reason="part of `make chaos`"))


@pytest.fixture(scope="session")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the object store of `test_place.py`; Ray's processes inherit them, and a folder for mirrors."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("mirrors")))
        yield


@pytest.fixture(scope="session")
def ray_session(credentials: None) -> Iterator[Session]:  # noqa: ARG001
    """An embedded Ray on two CPUs, for all tests of this process."""
    with connect("local", cpus=2) as session:
        yield session


@pytest.fixture(scope="session")
def finished(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder in which all toy recipes were computed without a disturbance."""
    from orchestrator.engine import Settings, run

    assert ray_session.cpus == 2
    results = tmp_path_factory.mktemp("finished")
    run(everything(), Settings(results=results, threads=1), Console(file=io.StringIO()))
    return results
