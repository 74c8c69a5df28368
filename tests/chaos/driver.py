"""The run that is attacked: what `mergedt run` does, on recipes of seconds. Usage: driver.py RESULTS [ADDRESS]"""

import signal
import sys
from pathlib import Path

import typer
from toy import everything

from orchestrator.cli_options import Courteous
from orchestrator.engine import Settings, run

app = typer.Typer(cls=Courteous, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def group() -> None:
    """Makes `compute` a command of a group, so that its errors are told as those of `mergedt` are."""


@app.command()
def compute(results: Path, address: str = typer.Argument("local")) -> None:
    """All toy recipes, with a checkpoint at every log."""
    cpus = 2 if address == "local" else None
    run(everything(), Settings(results=results, address=address, cpus=cpus, threads=1, checkpoint_seconds=0.0))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    app(["compute", *sys.argv[1:]])
