"""The nine single-task policies that everything else is made of, against the data they were trained on."""

from collections.abc import Iterator

from experiments._pairs import TASKS
from experiments.table_1 import QUALITIES
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table

BAR = 0.9  # of the dataset's mean return, on expert data


def points(setting: Setting) -> Iterator[Point]:
    """Three robots × three datasets × the profile's training seeds."""
    for quality in QUALITIES:
        for task in TASKS:
            for seed in setting.profile.training_seeds:
                yield Point(
                    labels={"quality": quality, "task": task, "seed": seed},
                    evaluation=setting.evaluate(setting.expert(task, seed, quality), task),
                )


EXPERIMENT = Experiment(
    name="experts",
    title="Single-task policies",
    paper="",
    question="Do the single-task policies reach the return of the data they were trained on?",
    points=points,
    show=Table(rows=("quality", "task"), value="of_data"),
    claims=tuple(
        Claim(
            statement=f"our bar: the {task} policy reaches {BAR:.0%} of its expert data's mean return",
            terms=((1, {"task": task, "quality": "expert"}),),
            expected="at least",
            bound=BAR,
            value="of_data",
        )
        for task in TASKS
    ),
)
