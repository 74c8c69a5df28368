"""Table IV: do a larger trunk and Fisher-weighted means make merging cheaper?"""

from collections.abc import Iterator

from experiments._pairs import DIFFERENCES, TASKS
from experiments.table_3 import GROUP, NEAR, started
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table
from orchestrator.recipes import Quality

QUALITY: Quality = "medium-expert"
TRUNKS = {"ChibiT_R": False, "GPT2_R": True}  # name → whether it is the larger one
METHODS = {"mean": False, "Fisher": True}


def points(setting: Setting) -> Iterator[Point]:
    """Two trunks: before merging, and after merge-freeze-finetune by mean and by Fisher; single-task beside them."""
    seed = setting.profile.sweep_seeds[0]
    for trunk, large in TRUNKS.items():
        sources = tuple(started(setting, task, QUALITY, "ChibiT_R", large=large, seed=seed) for task in TASKS)
        for source in sources:
            yield setting.point(source, source.task, policy=f"{trunk}, before merging", seed=seed)
        for method, fisher in METHODS.items():
            for instance in range(setting.profile.instances):
                policy = setting.merge_freeze_finetune(sources, GROUP, instance, fisher=fisher)
                for task in TASKS:
                    yield setting.point(policy, task, policy=f"{trunk}, {method}", seed=instance)
    for task in TASKS:
        yield setting.point(setting.expert(task, seed, QUALITY), task, policy="single-task", seed=seed)


EXPERIMENT = Experiment(
    name="table_4",
    title="A larger trunk, and Fisher",
    paper="Table IV",
    question="How much do three robots keep on a shared larger trunk, merged by mean or by Fisher?",
    points=points,
    show=Table(rows=("task",), column="policy"),
    differences=(
        *DIFFERENCES,
        "The larger trunk is GPT-2 small at the profile `paper` only; elsewhere a language model trained here.",
        NEAR,
        "Fisher is estimated without dropout, and an entry that no policy's Fisher weighs takes the plain mean.",
        "As shipped, the original's Fisher script estimates the Fisher but then averages directly.",
    ),
    claims=(
        *(
            Claim(
                statement=f"{trunk}: Fisher keeps more than the mean (on average)",
                terms=((1, {"policy": f"{trunk}, Fisher"}), (-1, {"policy": f"{trunk}, mean"})),
                expected="at least",
                bound=0.0,
                value="score",
            )
            for trunk in TRUNKS
        ),
        *(
            Claim(
                statement=f"the larger trunk keeps more than the smaller one (by {method}, retention)",
                terms=((1, {"policy": f"GPT2_R, {method}"}), (-1, {"policy": f"ChibiT_R, {method}"})),
                expected="at least",
                bound=0.0,
            )
            for method in METHODS
        ),
    ),
)
