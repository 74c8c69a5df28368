"""Our own: how much training does one policy for three robots need to be as good as three? For Table III's column."""

from collections.abc import Iterator
from itertools import product

from experiments._pairs import TASKS
from experiments.budget import BUDGETS, of_budget
from experiments.table_3 import WITHIN
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table, Where
from orchestrator.recipes import Quality

QUALITY: Quality = "medium-expert"
SINGLE = "single-task"


def trained_for(budget: float) -> str:
    """The column of a multi-task policy of so many times the usual steps."""
    return "multi-task" if budget == 1 else f"multi-task, {budget:g} × the steps"


def points(setting: Setting) -> Iterator[Point]:
    """One policy for three robots at three budgets, beside those of single robots at the usual one."""
    for seed, task in product(setting.profile.sweep_seeds, TASKS):
        instance = setting.profile.instances_at(seed)[0]
        for budget in BUDGETS:
            joint = of_budget(setting.together(TASKS, instance, QUALITY), budget)
            yield setting.point(joint, task, policy=trained_for(budget), seed=seed, instance=instance)
        yield setting.point(setting.expert(task, seed, QUALITY), task, policy=SINGLE, seed=seed, instance=instance)


def _at_least(statement: str, terms: tuple[tuple[float, Where], ...]) -> Claim:
    return Claim(statement=statement, terms=terms, expected="at least", bound=0.0, value="score")


EXPERIMENT = Experiment(
    name="multitask",
    title="One policy for three robots, trained for longer",
    paper="",
    question="How many steps does one policy for three robots need to be as good as three policies (medium-expert)?",
    points=points,
    show=Table(rows=("task",), column="policy", average="task"),
    claims=(
        _at_least(
            "the longer it is trained, the better (on average)",
            ((1, {"policy": trained_for(BUDGETS[-1])}), (-1, {"policy": trained_for(BUDGETS[0])})),
        ),
        *(
            _at_least(
                f"in {BUDGETS[-1]:g} times the steps it reaches {WITHIN:.0%} of single-task ({task})",
                (
                    (1, {"policy": trained_for(BUDGETS[-1]), "task": task}),
                    (-WITHIN, {"policy": SINGLE, "task": task}),
                ),
            )
            for task in TASKS
        ),
    ),
)
