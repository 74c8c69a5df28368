"""The options that commands share, what they mean, and how mistakes in them are told."""

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from typer.core import TyperGroup

from dt.errors import EXIT_STATUS, UserError, sentence
from orchestrator.data_choice import RECORDED, choose_data
from orchestrator.experiment import Experiment, Setting, experiments, get_experiment
from orchestrator.lifeline import terminable
from orchestrator.profiles import get_profile
from orchestrator.session import address_of
from orchestrator.store import Store

_LOG_WIDTH = 160  # of a table in a log or a pipe, where there is no terminal whose width to take


def _console(stderr: bool) -> Console:
    there = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    # No markup: what is printed may hold brackets of a user's own.
    return Console(stderr=stderr, width=None if there else _LOG_WIDTH, markup=False, emoji=False)


console = _console(stderr=False)
log = _console(stderr=True)

ProfileOption = Annotated[str, typer.Option("--profile", "-p", help="The budget: see `mergedt list`.")]
ResultsOption = Annotated[
    str,
    typer.Option(
        "--results",
        envvar="MERGEDT_RESULTS",
        help="Artefacts and tables: a folder (on a cluster, one that all nodes share), or s3://bucket/prefix, gs://….",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="`recorded`, or a template such as minari:mujoco/{task}/{quality}-v0 or /data/{task}_{quality}-v2.hdf5",
    ),
]
SeedsOption = Annotated[
    str | None, typer.Option("--seeds", help="Training seeds in place of the profile's, as in 0,1,2.")
]

OnlyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="LABEL=VALUE",
        help="Only points with this label, as in policy=ChibiT; give it again for more.",
    ),
]


def _address(given: str | None) -> str | None:
    address_of(given)  # here, so that a mistake is told before anything is written
    return given


AddressOption = Annotated[
    str | None,
    typer.Option("--address", callback=_address, help="A Ray cluster; else RAY_ADDRESS; else an embedded Ray."),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Rollout actors; default: one a core.")]

InitOption = Annotated[
    str | None,
    typer.Option(
        "--init", help="GPT-2 of others that policies begin as (Tables III, IV): a Hugging Face folder or id."
    ),
]
InitLargeOption = Annotated[
    str | None, typer.Option("--init-large", help="The same for the larger trunk of Table IV, as gpt2.")
]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text",
        help="What language models learn from, co-training too: docstrings, a folder, hf:<dataset>/<configuration>.",
    ),
]

RESULTS = "results"

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXIT_INTERRUPTED = 130


class Courteous(TyperGroup):
    """A command group that tells a user's mistake in one sentence on stderr, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with terminable():
                return super().invoke(ctx)
        except UserError as error:
            _leave(str(error))
        except ValidationError as error:
            _leave(sentence(error))
        except KeyboardInterrupt:
            print("interrupted; the same command resumes", file=sys.stderr)
            raise typer.Exit(_EXIT_INTERRUPTED) from None
        except OSError as error:
            if error.errno in _DISK_FULL:
                _leave(f"no space left to write {error.filename or ''}: make room and run the same command again")
            raise


def _leave(message: str) -> None:
    print(f"mergedt: {message}", file=sys.stderr)
    raise typer.Exit(EXIT_STATUS)


def numbers(text: str, option: str) -> tuple[float, ...]:
    """The numbers in `0,0.5,1`. Raises UserError naming the option."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option} takes numbers separated by commas, as in 0,0.5,1: {text!r} given") from None


def integers(text: str, option: str) -> tuple[int, ...]:
    """The whole numbers in `0,1,2`. Raises UserError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option} takes whole numbers separated by commas, as in 0,1,2: {text!r} given") from None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options that say which setting, and where its results are."""

    profile: str
    results: str = RESULTS
    data: str = RECORDED
    seeds: str | None = None
    init: str | None = None
    init_large: str | None = None
    text: str | None = None

    @property
    def setting(self) -> Setting:
        """The setting that they describe."""
        chosen = get_profile(self.profile).begun_as(self.init, self.init_large, self.text)
        if self.seeds is not None:
            chosen = chosen.with_seeds(integers(self.seeds, "--seeds"))
        return Setting(chosen, choose_data(self.data, Store(self.results).datasets))

    @property
    def again(self) -> str:
        """As they are typed, for sentences that say what to run."""
        named = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        given = {name: value for name, (value, usual) in named.items() if value != usual}
        return " ".join(f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in given.items())


def experiments_of(names: Sequence[str]) -> list[Experiment]:
    """The experiments of those names, each once; `all` is every one but the demo, which `mergedt demo` runs."""
    chosen = [name for given in names for name in (_all() if given == "all" else (given,))]
    return [get_experiment(name) for name in dict.fromkeys(chosen)]


def _all() -> list[str]:
    return [name for name in experiments() if name != "demo"]
