"""Running trials on Ray Tune: silently, many at once, with one writer for what they report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune import Callback

from dt.errors import UserError
from orchestrator.session import own_folder

# A trial only waits for work that runs elsewhere: with Tune's default of 1 CPU the trials would leave none for it. 0 is
# refused.
TRIAL_RESOURCES = {"CPU": 0.01}


class _Writer(Callback):
    """Passes on what trials report, in the driver. Tune's log line for an error in here would hide it: it is kept."""

    def __init__(self, on_report: Callable[[dict[str, Any]], None], on_step: Callable[[], None]) -> None:
        self._on_report, self._on_step = on_report, on_step
        self.error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore, which we never do; this one holds files and a screen."""
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        del iteration, trials, trial, info
        with self._kept():
            self._on_report(result)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        del iteration, trials, info
        with self._kept():
            self._on_step()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.error = error
            raise


def run_trials(
    trainable: Callable[..., None],
    parameter: str,
    values: list[Any],
    on_report: Callable[[dict[str, Any]], None],
    *,
    concurrent: int,
    reuse: bool,
    on_step: Callable[[], None] = lambda: None,
) -> list[BaseException]:
    """Run one trial for each value; `on_report` gets every report, one after another, in this process.

    reuse: run the next trial in the process of the last, which saves a second a trial. on_step: called in between,
    several times a second. What `on_report` takes out of a report does not stay in Tune's memory; exceptions of both
    end the run and are raised here.
    Returns the errors of trials that died, which a trial made only of waiting does not by itself.
    """
    writer = _Writer(on_report, on_step)
    with own_folder() as scratch:  # Tune's snapshots: resume never reads them
        tuner = tune.Tuner(
            tune.with_resources(trainable, TRIAL_RESOURCES),
            param_space={parameter: tune.grid_search(values)},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=reuse),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=str(scratch),
                verbose=0,
                callbacks=[writer],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            results = tuner.fit()
        except BaseException as error:
            if writer.error is not None:
                raise writer.error from None
            if isinstance(error.__cause__, RayError):  # of those that end a trial Tune knows two
                raise error.__cause__ from None
            raise
    if results.num_terminated + results.num_errors < len(values):  # on SIGUSR1, say, Tune starts no more
        raise UserError("the run was stopped before its end: run the same command again to go on")
    return list(results.errors)
