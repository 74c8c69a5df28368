"""Figure 2a: what one sub-layer at a time costs, averaged (α = 0.5) or swapped (α = 1)."""

from collections.abc import Iterator

from dt.merging.groups import units
from experiments._pairs import DIFFERENCES, LIKELY, LITTLE_DECREASE, ORDERED_PAIRS, TASKS
from experiments._units import kind_of
from orchestrator.experiment import Claim, Experiment, Figure, Point, Setting, merged

ALPHAS = (0.5, 1.0)


def points(setting: Setting) -> Iterator[Point]:
    """The unmerged experts, then 6 ordered pairs × every unit × α."""
    for seed in setting.profile.training_seeds:
        expert = {task: setting.expert(task, seed) for task in TASKS}
        for task in TASKS:
            yield Point(
                labels={"target": task, "source": task, "unit": "none", "kind": "none", "alpha": 0.0, "seed": seed},
                evaluation=setting.evaluate(expert[task], task),
            )
        for target, source in ORDERED_PAIRS:
            for unit in units(setting.profile.architecture, setting.profile.granularity):
                for alpha in ALPHAS:
                    yield Point(
                        labels={
                            "target": target,
                            "source": source,
                            "unit": unit,
                            "kind": kind_of(unit),
                            "alpha": alpha,
                            "seed": seed,
                        },
                        evaluation=setting.evaluate(merged(expert[target], expert[source], unit, alpha), target),
                    )


EXPERIMENT = Experiment(
    name="figure_2a",
    title="Merging one sub-layer at a time",
    paper="Figure 2a",
    question="Which sub-layers can be averaged with, or replaced by, those of a policy trained on another robot?",
    points=points,
    show=Figure(x="unit", series="alpha", kind="kind"),
    differences=DIFFERENCES,
    likely=LIKELY,
    claims=(
        *(
            Claim(
                statement=f"another policy's attention can be used with little to no decrease (α = {alpha:g})",
                terms=((1, {"kind": "attention", "alpha": alpha}),),
                expected="at least",
                bound=LITTLE_DECREASE,
            )
            for alpha in ALPHAS
        ),
        *(
            Claim(
                statement=f"the drop is larger within MLP layers (α = {alpha:g}; attention − MLP)",
                terms=((1, {"kind": "attention", "alpha": alpha}), (-1, {"kind": "mlp", "alpha": alpha})),
                expected="at least",
                bound=0.0,
            )
            for alpha in ALPHAS
        ),
    ),
)
