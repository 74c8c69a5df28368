"""Our own: which findings depend on how long policies are trained? Where the paper's trends are missing, is it that?"""

from collections.abc import Iterator
from itertools import product
from typing import Literal, TypeVar

from experiments._pairs import TASKS
from experiments.table_2 import ROBOTS
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table
from orchestrator.recipes import Assemble, FineTune, Perturb, Train, TrainTogether

T = TypeVar("T", Train, FineTune, TrainTogether)
BUDGETS = (0.25, 1.0, 4.0)  # of the profile's steps
GROUP = "attention+mlp"
UNNEEDED = "data. Expert data holds one behaviour, whose next action the present state tells, once it is learned well."
AS_TRAINED, WITHOUT_ATTENTION, FINE_TUNED = "as trained", "without attention", f"{GROUP}, merge-freeze-finetune"


def of_budget(usual: T, budget: float) -> T:
    """The same training in so many times the steps."""
    optimisation = usual.optimisation
    steps = max(1, round(optimisation.steps * budget))
    changed = {"steps": steps, "warmup_steps": min(optimisation.warmup_steps, steps)}
    return usual.model_copy(update={"optimisation": optimisation.model_copy(update=changed)})


def fine_tuned(setting: Setting, seed: int, budget: float) -> Assemble:
    """Experts of the usual budget on one trunk, as in Table II, but fine-tuned for that budget."""
    usual = setting.merge_freeze_finetune([setting.expert(task, seed) for task in ROBOTS], GROUP)
    parts = tuple(of_budget(part, budget) for part in usual.policies if isinstance(part, FineTune))
    return usual.model_copy(update={"policies": parts})


def points(setting: Setting) -> Iterator[Point]:
    """Experts of three robots with and without attention, and one policy for two robots; three budgets each."""
    for seed, budget in product(setting.profile.sweep_seeds, BUDGETS):
        for task in TASKS:
            own = of_budget(setting.expert(task, seed), budget)
            removed = Perturb(policy=own, group="attention", how="removed")
            yield setting.point(own, task, policy=AS_TRAINED, budget=budget, seed=seed)
            yield setting.point(removed, task, policy=WITHOUT_ATTENTION, budget=budget, seed=seed)
        both = fine_tuned(setting, seed, budget)
        for task in ROBOTS:
            yield setting.point(both, task, policy=FINE_TUNED, budget=budget, seed=seed)


def _with_training(
    statement: str, policy: str, task: str, expected: Literal["at least", "at most"], likely: str = ""
) -> Claim:
    """From the least to the most training, retention rises (`at least` 0) or falls."""

    def at(budget: float) -> dict[str, str | float]:
        return {"policy": policy, "task": task, "budget": budget}

    terms = ((1, at(BUDGETS[-1])), (-1, at(BUDGETS[0])))
    return Claim(statement=statement, terms=terms, expected=expected, bound=0.0, likely=likely)


EXPERIMENT = Experiment(
    name="budget",
    title="More and less training",
    paper="",
    question="Do policies come to rely on their attention, and do shared trunks keep more, as training goes on?",
    points=points,
    show=Table(rows=("policy", "task"), column="budget", value="retention"),
    claims=(
        *(
            _with_training(
                f"the longer {task} is trained, the less is left of it without attention",
                WITHOUT_ATTENTION,
                task,
                "at most",
                UNNEEDED,
            )
            for task in TASKS
        ),
        *(
            _with_training(
                f"the longer the fine-tuning, the more {task} keeps on a shared trunk", FINE_TUNED, task, "at least"
            )
            for task in ROBOTS
        ),
    ),
)
