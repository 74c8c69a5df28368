"""Our own: how much training does one policy for three robots need to be as good as three, with masks and without?"""

from collections.abc import Iterator, Mapping
from itertools import product

from dt.training.harmony import Importance
from experiments._pairs import TASKS
from experiments.budget import BUDGETS, of_budget
from experiments.table_3 import HARMONIES, WITHIN
from orchestrator.experiment import Claim, Experiment, Label, Point, Setting, Table, Where
from orchestrator.recipes import Quality

QUALITY: Quality = "medium-expert"
SINGLE, JOINT, MASKED, DRAWN = "single-task", "multi-task", "HarmoDT", "HarmoDT, random masks"
MASKS: Mapping[str, Importance | None] = {JOINT: None, MASKED: HARMONIES[MASKED], DRAWN: HARMONIES[DRAWN]}
LEAST, MOST = BUDGETS[0], BUDGETS[-1]


def points(setting: Setting) -> Iterator[Point]:
    """One policy for three robots at three budgets, beside those of single robots at the usual one."""
    for seed, task in product(setting.profile.sweep_seeds, TASKS):
        instance = setting.profile.instances_at(seed)[0]
        for (column, masks), budget in product(MASKS.items(), BUDGETS):
            policy = of_budget(setting.together(TASKS, instance, QUALITY, masks=masks), budget)
            yield setting.point(policy, task, policy=column, budget=budget, seed=seed, instance=instance)
        own = setting.expert(task, seed, QUALITY)
        yield setting.point(own, task, policy=SINGLE, budget=1.0, seed=seed, instance=instance)


def _at(policy: str, budget: float) -> dict[str, Label | tuple[Label, ...]]:
    return {"policy": policy, "budget": budget}


def _better(statement: str, better: Where, than: Where, share: float = 1.0) -> Claim:
    return Claim(statement, terms=((1, better), (-share, than)), expected="at least", bound=0.0, value="score")


EXPERIMENT = Experiment(
    name="multitask",
    title="One policy for three robots, trained for longer",
    paper="",
    question="How many steps does one policy for three robots need to be as good as three policies (medium-expert), "
    "and are masks a help?",
    points=points,
    show=Table(rows=("policy", "task"), column="budget", average="task"),
    claims=(
        *(
            _better(f"{policy}: the longer, the better (on average)", _at(policy, MOST), _at(policy, LEAST))
            for policy in (JOINT, MASKED)
        ),
        *(
            _better(
                f"in {MOST:g} times the steps {JOINT} reaches {WITHIN:.0%} of single-task ({task})",
                _at(JOINT, MOST) | {"task": task},
                _at(SINGLE, 1.0) | {"task": task},
                WITHIN,
            )
            for task in TASKS
        ),
        *(
            _better(f"in {MOST:g} times the steps {MASKED} is better than {than}", _at(MASKED, MOST), _at(than, MOST))
            for than in (JOINT, DRAWN)
        ),
    ),
)
