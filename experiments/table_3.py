"""Table III: does a common start, from a language model, make policies easier to merge? And training together?"""

from collections.abc import Iterator
from typing import Literal

from dt.training.harmony import Harmony
from experiments._pairs import DIFFERENCES, TASKS
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table, Where
from orchestrator.recipes import AnyPolicy, Quality, Train, Vote

QUALITIES: tuple[Quality, ...] = ("medium", "medium-expert")
GROUP = "attention+mlp"
DISTANCE = 1e-4  # λ3 of the original code's sum of norms; the paper's "λ3 = 1" means that the term is on
NEAR = (
    f"The distance to the start has the weight λ3 = {DISTANCE:g}, as in the original's code; the paper's text says 1."
)
CO_TRAINING = 1.0  # λ2
VOTES = 2  # of three tasks
WITHIN = 0.9

Start = Literal["ChibiT", "ChibiT_CO", "ChibiT_R", "random"]
STARTS: tuple[Start, ...] = ("ChibiT", "ChibiT_CO", "ChibiT_R", "random")


def started(
    setting: Setting, task: str, quality: Quality, start: Start, *, large: bool = False, seed: int = 0
) -> Train:
    """A single-task policy of one of the initialisations."""
    if start == "random":
        return setting.expert(task, seed, quality)
    return setting.language_expert(
        task,
        seed,
        quality,
        regularised=DISTANCE if start == "ChibiT_R" else 0.0,
        co_trained=CO_TRAINING if start == "ChibiT_CO" else 0.0,
        large=large,
    )


def columns(setting: Setting, quality: Quality) -> Iterator[tuple[str, AnyPolicy, int]]:
    """(column, a policy for all three robots, instance)."""
    seed = setting.profile.sweep_seeds[0]
    for instance in range(setting.profile.instances):
        for start in STARTS:
            sources = tuple(started(setting, task, quality, start, seed=seed) for task in TASKS)
            yield start, setting.merge_freeze_finetune(sources, GROUP, instance), instance
        yield "multi-task", setting.together(TASKS, instance, quality), instance
    interval = setting.profile.harmony_interval
    harmo = setting.together(TASKS, seed, quality, harmony=Harmony(interval=interval))
    yield "HarmoDT", harmo, 0
    yield "HarmoDT, one trunk", Vote(policy=harmo, threshold=VOTES), 0
    random = Harmony(interval=interval, importance="random")
    yield "HarmoDT, random masks", setting.together(TASKS, seed, quality, harmony=random), 0


def points(setting: Setting) -> Iterator[Point]:
    """Two datasets, three robots, the paper's six columns and HarmoDT."""
    for quality in QUALITIES:
        for column, policy, instance in columns(setting, quality):
            for task in TASKS:
                yield setting.point(policy, task, quality=quality, policy=column, seed=instance)
        seed = setting.profile.sweep_seeds[0]
        for task in TASKS:
            for start in STARTS:
                column = "single-task" if start == "random" else f"{start}, before merging"
                own = started(setting, task, quality, start, seed=seed)
                yield setting.point(own, task, quality=quality, policy=column, seed=seed)


def _better(better: str, than: str, quality: Quality) -> Claim:
    mine, others = _where(better, quality), _where(than, quality)
    return Claim(
        statement=f"{better} is better than {than} on average ({quality})",
        terms=((1, mine), (-1, others)),
        expected="at least",
        bound=0.0,
        value="score",
    )


def _where(column: str, quality: Quality) -> Where:
    return {"policy": column, "quality": quality}


EXPERIMENT = Experiment(
    name="table_3",
    title="One start for all: language initialisation",
    paper="Table III",
    question="Which start lets three robots share attention and MLP best, and how far is that from training together?",
    points=points,
    show=Table(rows=("quality", "task"), column="policy"),
    differences=(
        *DIFFERENCES,
        "ChibiT cannot be fetched here: a language model of its shape takes its part, trained on the documentation of "
        "installed Python packages unless --text or --init named another (WikiText-103 in the paper).",
        NEAR,
        "The paper's single-task numbers are those of the Decision Transformer's paper (Chen et al. 2021); ours are of "
        "the policies that are merged here.",
        "In the original multi-task code the heads of two of three robots are never trained; here all are.",
        "The cosine loss is the paper's; the original's code takes a maximum per coordinate and counts padding.",
    ),
    claims=(
        *(_better("ChibiT", "random", quality) for quality in QUALITIES),
        *(_better("ChibiT_R", "random", quality) for quality in QUALITIES),
        _better("ChibiT_R", "ChibiT", "medium-expert"),
        *(_better("ChibiT", "ChibiT_CO", quality) for quality in QUALITIES),
        *(_better(start, "multi-task", "medium") for start in ("ChibiT", "ChibiT_R")),
        _better("multi-task", "ChibiT_R", "medium-expert"),
        Claim(
            statement=f"our bar: multi-task reaches {WITHIN:.0%} of single-task on average (medium)",
            terms=((1, _where("multi-task", "medium")), (-WITHIN, _where("single-task", "medium"))),
            expected="at least",
            bound=0.0,
            value="score",
        ),
    ),
)
