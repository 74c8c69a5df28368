"""Figure 2b: merging more and more of the trunk, in depth order, at α = 0.5."""

from collections.abc import Iterator

from dt.merging.groups import units as units_of
from experiments._pairs import DIFFERENCES, LIKELY
from experiments._units import kind_of
from orchestrator.experiment import Claim, Experiment, Figure, Point, Setting, merged

ALPHA = 0.5
PAIRS = (("hopper", "halfcheetah"), ("halfcheetah", "hopper"))  # (target, source): the paper's left and right panel
CLOSE_TO_ZERO = 0.1
STANDS = (
    "the reward, and chance. Hopper is paid for every step on which it stands, so a policy that falls slowly keeps "
    "some of its score; how slowly a merged one falls differs from seed to seed, and the paper shows one."
)


def points(setting: Setting) -> Iterator[Point]:
    """Prefixes of 0, 1, … all units. `next` is the kind of the unit that the following prefix adds."""
    units = units_of(setting.profile.architecture, setting.profile.granularity)
    names, kinds = ("none", *units), ("none", *map(kind_of, units))
    for seed in setting.profile.training_seeds:
        for target, source in PAIRS:
            to, other = setting.expert(target, seed), setting.expert(source, seed)
            for count in range(len(names)):
                policy = merged(to, other, "+".join(units[:count]), ALPHA if count else 0.0)
                yield Point(
                    labels={
                        "direction": f"{source} → {target}",
                        "target": target,
                        "merged": count,
                        "last": names[count],
                        "kind": kinds[count],
                        "next": (*kinds[1:], "none")[count],
                        "whole": "yes" if count == len(units) else "no",
                        "alpha": ALPHA,
                        "seed": seed,
                    },
                    evaluation=setting.evaluate(policy, target),
                )


def _drop(kind: str, sign: int) -> tuple[tuple[float, dict[str, str]], ...]:
    """Mean retention before minus after the units of a kind are added."""
    return ((sign, {"next": kind}), (-sign, {"kind": kind}))


EXPERIMENT = Experiment(
    name="figure_2b",
    title="Merging more and more sub-layers",
    paper="Figure 2b",
    question="How does the return fall as sub-layers are merged one after another in depth order (α = 0.5)?",
    points=points,
    show=Figure(x="merged", series="target", panel="direction", ticks="last", kind="kind"),
    differences=DIFFERENCES,
    likely=LIKELY,
    claims=(
        *(
            Claim(
                statement=f"merging the entire transformer leaves close to zero performance ({source} → {target})",
                terms=((1, {"whole": "yes", "target": target}),),
                expected="at most",
                bound=CLOSE_TO_ZERO,
                likely=STANDS if target == "hopper" else "",
            )
            for target, source in PAIRS
        ),
        Claim(
            statement="adding an MLP unit costs more than adding an attention unit (mean drop at MLP − at attention)",
            terms=(*_drop("mlp", 1), *_drop("attention", -1)),
            expected="at least",
            bound=0.0,
        ),
    ),
)
