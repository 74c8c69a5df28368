"""One Ray session and one finished toy run, shared by the tests that need them."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from toy import sweep

from orchestrator.session import Session, connect


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Session]:
    """An embedded Ray on two CPUs, for all tests of this process."""
    with connect("local", cpus=2) as session:
        yield session


@pytest.fixture(scope="session")
def finished(ray_session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder in which the toy sweep was computed without a disturbance."""
    from orchestrator.engine import Settings, run

    assert ray_session.cpus == 2
    results = tmp_path_factory.mktemp("finished")
    run(sweep(), Settings(results=results, threads=1), Console(file=io.StringIO()))
    return results
