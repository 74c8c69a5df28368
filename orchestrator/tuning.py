"""Running trials on Ray Tune: silently, many at once, with one writer for what they report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune import Callback

# A trial only waits for work that runs elsewhere: with Tune's default of 1 CPU the trials would leave none for it. 0 is
# refused.
TRIAL_RESOURCES = {"CPU": 0.01}


class _Writer(Callback):
    """Passes on what trials report, in the driver. Tune's log line for an error in here would hide it: it is kept."""

    def __init__(self, on_report: Callable[[dict[str, Any]], None]) -> None:
        self._on_report = on_report
        self.error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore, which we never do; this one holds files and a screen."""
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        del iteration, trials, trial, info
        try:
            self._on_report(result)
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
) -> list[BaseException]:
    """Run one trial for each value; `on_report` gets every report, one after another, in this process.

    reuse: run the next trial in the process of the last, which saves a second a trial. What `on_report` takes out of a
    report does not stay in Tune's memory; its exceptions end the run and are raised here.
    Returns the errors of trials that died, which a trial made only of waiting does not by itself.
    """
    writer = _Writer(on_report)
    with tempfile.TemporaryDirectory(prefix="mergedt-tune-") as scratch:  # Tune's snapshots: resume never reads them
        tuner = tune.Tuner(
            tune.with_resources(trainable, TRIAL_RESOURCES),
            param_space={parameter: tune.grid_search(values)},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=reuse),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                callbacks=[writer],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        try:
            results = tuner.fit()
        except BaseException:
            if writer.error is not None:
                raise writer.error from None
            raise
    return list(results.errors)
