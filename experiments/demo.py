"""The demo: two robots, their attention interpolated both ways."""

from collections.abc import Iterator

from orchestrator.experiment import Experiment, Figure, Point, Setting, merged

ROBOTS = ("halfcheetah", "walker2d")


def points(setting: Setting) -> Iterator[Point]:
    """Both directions over the profile's grid of α."""
    for seed in setting.profile.sweep_seeds:
        for target, source in (ROBOTS, ROBOTS[::-1]):
            to, other = setting.expert(target, seed), setting.expert(source, seed)
            for alpha in setting.profile.alphas:
                yield Point(
                    labels={"target": target, "source": source, "alpha": alpha, "seed": seed},
                    evaluation=setting.evaluate(merged(to, other, "attention", alpha), target),
                )


EXPERIMENT = Experiment(
    name="demo",
    title="Two robots share their attention",
    paper="",
    question="What does a robot keep of its score as its attention becomes that of another robot?",
    points=points,
    show=Figure(x="alpha", series="target"),
)
