"""Our own: does keeping policies near their common start (λ3) make them easier to merge, and in which parameters?"""

from collections.abc import Iterator, Mapping
from itertools import product

from orchestrator.experiment import Claim, Experiment, Figure, Label, Point, Search, Setting, merged
from orchestrator.recipes import Quality

ROBOTS = ("halfcheetah", "walker2d")
DISTANCES = (0.0, 1e-5, 1e-4, 1e-3)
GROUPS = ("attention", "mlp", "attention+mlp")
ALPHAS = (0.25, 0.5, 0.75, 1.0)
QUALITY: Quality = "expert"


def line(setting: Setting, chosen: Mapping[str, Label]) -> Iterator[Point]:
    """One choice of λ3, group and α, both ways."""
    distance, group, alpha = float(chosen["distance"]), str(chosen["group"]), float(chosen["alpha"])
    for seed in setting.profile.sweep_seeds:
        policies = {task: setting.language_expert(task, seed, QUALITY, regularised=distance) for task in ROBOTS}
        for target, source in (ROBOTS, ROBOTS[::-1]):
            yield Point(
                labels={**chosen, "target": target, "source": source, "seed": seed},
                evaluation=setting.evaluate(merged(policies[target], policies[source], group, alpha), target),
            )


def points(setting: Setting) -> Iterator[Point]:
    """The whole grid, with α = 0, the policies as they were trained."""
    for distance, group, alpha in product(DISTANCES, GROUPS, (0.0, *ALPHAS)):
        yield from line(setting, {"distance": distance, "group": group, "alpha": alpha})


EXPERIMENT = Experiment(
    name="regularisation",
    title="Keeping near the common start",
    paper="",
    question="Does a penalty on the distance to a common language model make policies easier to merge directly?",
    points=points,
    show=Figure(x="alpha", series="distance", panel="group"),
    claims=(
        Claim(
            statement="at α = 0.5 of attention and MLP, λ3 = 0.001 keeps more than none",
            terms=(
                (1, {"distance": 1e-3, "group": "attention+mlp", "alpha": 0.5}),
                (-1, {"distance": 0.0, "group": "attention+mlp", "alpha": 0.5}),
            ),
            expected="at least",
            bound=0.0,
        ),
    ),
    search=Search(space={"distance": DISTANCES, "group": GROUPS, "alpha": ALPHAS}, points=line, targets=ROBOTS),
)
