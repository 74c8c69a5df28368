"""Table I: what a trained policy loses when its attention is replaced by noise, by ones, or by nothing."""

from collections.abc import Iterator
from typing import Literal

from experiments._pairs import DIFFERENCES, LIKELY, LITTLE_DECREASE, TASKS
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table
from orchestrator.recipes import Perturb, Quality, Train

QUALITIES: tuple[Quality, ...] = ("medium-expert", "medium", "expert")
PERTURBATIONS: tuple[Literal["random", "identity", "removed"], ...] = ("random", "identity", "removed")
DRAW = 0  # the paper fixes one random draw for all experiments

ONES = (
    "Attention of nothing but ones adds the same number to all features, and the layer norms that read them take it "
    "out again: “identity” is “removed”, and where the paper's columns differ it is noise (and rounding)."
)

ONE_BEHAVIOUR = (
    "the data, perhaps, unless it is D4RL's. It holds one behaviour, whose next action the present state tells, and "
    "the longer a policy is trained, the less it needs attention (see `budget`). But so does the paper's, and that was "
    "trained for longer: its Hopper may forgive less."
)
OTHER_DATA = (
    "data. Which policies lean on their past depends on the behaviours recorded, and these are others, unless D4RL's."
)


def points(setting: Setting) -> Iterator[Point]:
    """Nine single-task policies as trained, then under three perturbations each."""
    for seed in setting.profile.sweep_seeds:
        for quality in QUALITIES:
            for task in TASKS:
                expert = setting.expert(task, seed, quality)
                variants: dict[str, Train | Perturb] = {"original": expert}
                for how in PERTURBATIONS:
                    variants[how] = Perturb(policy=expert, group="attention", how=how, seed=DRAW)
                for attention, policy in variants.items():
                    yield Point(
                        labels={"quality": quality, "task": task, "attention": attention, "seed": seed},
                        evaluation=setting.evaluate(policy, task),
                    )


def _perturbed(task: str, quality: Quality, statement: str, decreases: bool) -> Claim:
    return Claim(
        statement=statement,
        terms=((1, {"task": task, "quality": quality, "attention": PERTURBATIONS}),),
        expected="at most" if decreases else "at least",
        bound=LITTLE_DECREASE,
        likely=ONE_BEHAVIOUR if decreases else OTHER_DATA,
    )


EXPERIMENT = Experiment(
    name="table_1",
    title="Perturbing attention",
    paper="Table I",
    question="How much do trained policies rely on their attention at all?",
    points=points,
    show=Table(rows=("quality", "task"), column="attention"),
    differences=(*DIFFERENCES, ONES),
    likely=LIKELY,
    claims=(
        *(_perturbed("hopper", q, f"hopper decreases when attention is perturbed ({q})", True) for q in QUALITIES),
        *(
            _perturbed(task, q, f"perturbed attention has little impact on {task} ({q})", False)
            for task in ("halfcheetah", "walker2d")
            for q in ("medium", "expert")
        ),
        *(
            _perturbed(task, "medium-expert", f"{task} decreases when attention is perturbed (medium-expert)", True)
            for task in ("halfcheetah", "walker2d")
        ),
    ),
)
