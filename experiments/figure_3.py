"""Figure 3: all attention parameters, interpolated from one's own (α = 0) to another policy's (α = 1)."""

from collections.abc import Iterator

from experiments._pairs import DIFFERENCES, LIKELY, LITTLE_DECREASE, PAIRS
from orchestrator.experiment import Claim, Experiment, Figure, Point, Setting, Where, merged

STILL_GOOD = 0.5  # "but we still see good results": at least half of the score
IDLE = (
    "data. Hopper's attention does little here, so it can be done without: compare what is kept without any in Table I "
    "(`expert`), where the paper's Hopper loses a third."
)
BUSY = (
    "data. Walker2d's attention does something here and nothing in the paper (Table I, `expert`): so it is missed "
    "where it is replaced, and does harm elsewhere."
)


def points(setting: Setting) -> Iterator[Point]:
    """Three pairs, both directions, the profile's grid of α."""
    for seed in setting.profile.training_seeds:
        for pair in PAIRS:
            for target, source in (pair, pair[::-1]):
                to, other = setting.expert(target, seed), setting.expert(source, seed)
                for alpha in setting.profile.alphas:
                    yield Point(
                        labels={
                            "pair": " / ".join(pair),
                            "target": target,
                            "source": source,
                            "alpha": alpha,
                            "seed": seed,
                        },
                        evaluation=setting.evaluate(merged(to, other, "attention", alpha), target),
                    )


_WITHOUT_HOPPER: Where = {"pair": "halfcheetah / walker2d", "alpha": 1.0}
_WITH_HOPPER: Where = {"pair": ("halfcheetah / hopper", "hopper / walker2d"), "alpha": 1.0}

EXPERIMENT = Experiment(
    name="figure_3",
    title="Merging all attention parameters",
    paper="Figure 3",
    question="How much of its return does a policy keep as its attention becomes that of a policy for another robot?",
    points=points,
    show=Figure(x="alpha", series="target", panel="pair"),
    differences=DIFFERENCES,
    likely=LIKELY,
    claims=(
        *(
            Claim(
                statement=f"{source}'s attention can be swapped into the {target} policy with no decrease (α = 1)",
                terms=((1, {"target": target, "source": source, "alpha": 1.0}),),
                expected="at least",
                bound=LITTLE_DECREASE,
                likely=BUSY,
            )
            for target, source in (("walker2d", "halfcheetah"), ("halfcheetah", "walker2d"))
        ),
        Claim(
            statement="this holds less strongly for the pairs with hopper (α = 1; without − with hopper)",
            terms=((1, _WITHOUT_HOPPER), (-1, _WITH_HOPPER)),
            expected="at least",
            bound=0.0,
            likely=BUSY,
        ),
        Claim(
            statement="the pairs with hopper still give good results (α = 1)",
            terms=((1, _WITH_HOPPER),),
            expected="at least",
            bound=STILL_GOOD,
        ),
        Claim(
            statement="hopper keeps 79 % at α = 0.5 with halfcheetah's attention (Table II, Attention (M))",
            terms=((1, {"target": "hopper", "source": "halfcheetah", "alpha": 0.5}),),
            expected="about",
            bound=0.79,
            likely=IDLE,
        ),
        Claim(
            statement="halfcheetah keeps 98 % at α = 0.5 with hopper's attention (Table II, Attention (M))",
            terms=((1, {"target": "halfcheetah", "source": "hopper", "alpha": 0.5}),),
            expected="about",
            bound=0.98,
        ),
    ),
)
