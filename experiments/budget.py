"""Our own: which findings depend on how long policies are trained? Where the paper's trends are missing, is it that?"""

from collections.abc import Iterator

from dt.training.optimisation import Optimisation
from experiments._pairs import TASKS
from experiments.table_2 import ROBOTS
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table, mean_of
from orchestrator.recipes import Assemble, FineTune, Perturb, Train

BUDGETS = (0.25, 1.0, 4.0)  # of the profile's steps
GROUP = "attention+mlp"
AS_TRAINED, WITHOUT_ATTENTION, FINE_TUNED = "as trained", "without attention", f"{GROUP}, merge-freeze-finetune"


def of_budget(optimisation: Optimisation, budget: float) -> Optimisation:
    """The same training in so many times the steps."""
    steps = max(1, round(optimisation.steps * budget))
    return optimisation.model_copy(update={"steps": steps, "warmup_steps": min(optimisation.warmup_steps, steps)})


def expert(setting: Setting, task: str, seed: int, budget: float) -> Train:
    """An expert of that budget."""
    usual = setting.expert(task, seed)
    return usual.model_copy(update={"optimisation": of_budget(usual.optimisation, budget)})


def fine_tuned(setting: Setting, seed: int, budget: float) -> Assemble:
    """Experts of the usual budget on one trunk, as in Table II, but fine-tuned for that budget."""
    experts = tuple(setting.expert(task, seed) for task in ROBOTS)

    def tuned(own: Train) -> FineTune:
        usual = setting.fine_tuned(mean_of(own, experts, GROUP), own, frozen=GROUP)
        return usual.model_copy(update={"optimisation": of_budget(usual.optimisation, budget)})

    return Assemble(policies=tuple(tuned(own) for own in experts), shared=GROUP)


def points(setting: Setting) -> Iterator[Point]:
    """Experts of three robots with and without attention, and one policy for two robots; three budgets each."""
    seed = setting.profile.sweep_seeds[0]
    for budget in BUDGETS:
        for task in TASKS:
            own = expert(setting, task, seed, budget)
            removed = Perturb(policy=own, group="attention", how="removed")
            yield setting.point(own, task, policy=AS_TRAINED, budget=budget, seed=seed)
            yield setting.point(removed, task, policy=WITHOUT_ATTENTION, budget=budget, seed=seed)
        both = fine_tuned(setting, seed, budget)
        for task in ROBOTS:
            yield setting.point(both, task, policy=FINE_TUNED, budget=budget, seed=seed)


def _from_least_to_most(policy: str, task: str) -> tuple[tuple[float, dict[str, str | float]], ...]:
    def at(budget: float) -> dict[str, str | float]:
        return {"policy": policy, "task": task, "budget": budget}

    return (1, at(BUDGETS[-1])), (-1, at(BUDGETS[0]))


EXPERIMENT = Experiment(
    name="budget",
    title="More and less training",
    paper="",
    question="Do policies come to rely on their attention, and do shared trunks keep more, as training goes on?",
    points=points,
    show=Table(rows=("policy", "task"), column="budget", value="retention"),
    claims=(
        *(
            Claim(
                statement=f"the longer {task} is trained, the less is left of it without attention",
                terms=_from_least_to_most(WITHOUT_ATTENTION, task),
                expected="at most",
                bound=0.0,
            )
            for task in TASKS
        ),
        *(
            Claim(
                statement=f"the longer the fine-tuning, the more {task} keeps on a shared trunk",
                terms=_from_least_to_most(FINE_TUNED, task),
                expected="at least",
                bound=0.0,
            )
            for task in ROBOTS
        ),
    ),
)
