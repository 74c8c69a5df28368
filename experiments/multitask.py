"""Our own: how much training does one policy for three robots need to be as good as three, with masks and without? For
the columns of Table III that are trained on all data together."""

from collections.abc import Iterator
from itertools import product

from dt.training.harmony import Harmony
from experiments._pairs import TASKS
from experiments.budget import BUDGETS, of_budget
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table, Where
from orchestrator.recipes import Quality

QUALITY: Quality = "medium-expert"
WITHIN = 0.9
MULTI, HARMODT, SINGLE = "multi-task", "HarmoDT", "single-task"


def trained_for(column: str, budget: float) -> str:
    """The column of a policy of so many times the usual steps."""
    return column if budget == 1 else f"{column}, {budget:g} × the steps"


def points(setting: Setting) -> Iterator[Point]:
    """One policy for three robots at three budgets, beside those of single robots at the usual one."""
    for seed, task in product(setting.profile.sweep_seeds, TASKS):
        instance = setting.profile.instances_at(seed)[0]
        harmony = Harmony(interval=setting.profile.harmony_interval)
        usual = {
            MULTI: setting.together(TASKS, instance, QUALITY),
            HARMODT: setting.together(TASKS, instance, QUALITY, harmony=harmony),
        }
        for (column, joint), budget in product(usual.items(), BUDGETS):
            policy = of_budget(joint, budget)
            yield setting.point(policy, task, policy=trained_for(column, budget), seed=seed, instance=instance)
        yield setting.point(setting.expert(task, seed, QUALITY), task, policy=SINGLE, seed=seed, instance=instance)


def _good(statement: str, terms: tuple[tuple[float, Where], ...]) -> Claim:
    return Claim(statement=statement, terms=terms, expected="at least", bound=0.0, value="score")


EXPERIMENT = Experiment(
    name="multitask",
    title="One policy for three robots, trained for longer",
    paper="",
    question="How many steps does one policy for three robots need to be as good as three policies (medium-expert)?",
    points=points,
    show=Table(rows=("task",), column="policy", average="task"),
    claims=(
        _good(
            "the longer it is trained, the better is multi-task (on average)",
            ((1, {"policy": trained_for(MULTI, BUDGETS[-1])}), (-1, {"policy": trained_for(MULTI, BUDGETS[0])})),
        ),
        *(
            _good(
                f"in {BUDGETS[-1]:g} times the steps multi-task reaches {WITHIN:.0%} of single-task ({task})",
                (
                    (1, {"policy": trained_for(MULTI, BUDGETS[-1]), "task": task}),
                    (-WITHIN, {"policy": SINGLE, "task": task}),
                ),
            )
            for task in TASKS
        ),
        _good(
            f"in {BUDGETS[-1]:g} times the steps HarmoDT is better than multi-task (on average)",
            ((1, {"policy": trained_for(HARMODT, BUDGETS[-1])}), (-1, {"policy": trained_for(MULTI, BUDGETS[-1])})),
        ),
    ),
)
