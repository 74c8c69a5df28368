"""Table III: does a common start, from a language model, make policies easier to merge? And training together?"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Literal

from dt.training.harmony import Importance
from experiments._pairs import DIFFERENCES, LIKELY, TASKS
from orchestrator.experiment import Claim, Experiment, Label, Point, Setting, Table
from orchestrator.recipes import AnyPolicy, Quality, Train, Vote

QUALITIES: tuple[Quality, ...] = ("medium", "medium-expert")
GROUP = "attention+mlp"
DISTANCE = 1e-4  # λ3 of the original code's sum of norms; the paper's "λ3 = 1" means that the term is on
NEAR = (
    f"The distance to the start has the weight λ3 = {DISTANCE:g}, as in the original's code; the paper's text says 1."
)
CO_TRAINING = 1.0  # λ2
VOTES = 2  # of three tasks
HARMONIES: Mapping[str, Importance] = {
    "HarmoDT": "fisher",
    "HarmoDT, by magnitude": "magnitude",
    "HarmoDT, random masks": "random",
}
WITHIN = 0.9
TOGETHER_AS_GOOD = (  # where the paper's multi-task policy comes within a tenth of the single-task one
    *(("medium", task) for task in TASKS),
    ("medium-expert", "walker2d"),
)
OTHER_TEXT = (
    "the language model, which has read less and other text than ChibiT, and the budget: in the paper 100,000 steps of "
    "training and as many of fine-tuning."
)
HEADS = "a mistake of the original: the heads of two of its three robots stay as they began; here all learn."
SMALL_TRUNK = (
    "the budget: a trunk of the same size learns three robots in the steps that are enough for one; `multitask` tells "
    "what more steps do."
)
MASKS = (
    "the tasks: what is published of HarmoDT is of 5 to 50 tasks of one robot, and three robots with heads of their "
    "own may have little to disagree about in a trunk. In four times the steps (`multitask`) masks of either kind and "
    "none cannot be told apart."
)

Start = Literal["ChibiT", "ChibiT_CO", "ChibiT_R", "random"]
STARTS: tuple[Start, ...] = ("ChibiT", "ChibiT_CO", "ChibiT_R", "random")


def started(setting: Setting, task: str, quality: Quality, start: Start, *, seed: int, large: bool = False) -> Train:
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


def columns(setting: Setting, quality: Quality, seed: int) -> Iterator[tuple[str, AnyPolicy, int]]:
    """(column, a policy for all three robots, instance)."""
    for instance in setting.profile.instances_at(seed):
        for start in STARTS:
            sources = tuple(started(setting, task, quality, start, seed=seed) for task in TASKS)
            yield start, setting.merge_freeze_finetune(sources, GROUP, instance), instance
        yield "multi-task", setting.together(TASKS, instance, quality), instance
        for column, importance in HARMONIES.items():
            masked = setting.together(TASKS, instance, quality, masks=importance)
            yield column, masked, instance
            if importance == "fisher":
                yield f"{column}, one trunk", Vote(policy=masked, threshold=VOTES), instance


def points(setting: Setting) -> Iterator[Point]:
    """Two datasets, three robots, the paper's six columns and HarmoDT."""
    for quality, seed in product(QUALITIES, setting.profile.sweep_seeds):
        for column, policy, instance in columns(setting, quality, seed):
            for task in TASKS:
                yield setting.point(policy, task, quality=quality, policy=column, seed=seed, instance=instance)
        first = setting.profile.instances_at(seed)[0]
        for task, start in product(TASKS, STARTS):
            column = "single-task" if start == "random" else f"{start}, before merging"
            own = started(setting, task, quality, start, seed=seed)
            yield setting.point(own, task, quality=quality, policy=column, seed=seed, instance=first)


def _better(better: str, than: str, quality: Quality, likely: str, *, ours: bool = False) -> Claim:
    mine, others = _where(better, quality), _where(than, quality)
    return Claim(
        statement=f"{better} is better than {than} on average ({quality})",
        terms=((1, mine), (-1, others)),
        expected="at least",
        bound=0.0,
        value="score",
        likely=likely,
        ours=ours,
    )


def _where(column: str, quality: str) -> dict[str, Label | tuple[Label, ...]]:
    return {"policy": column, "quality": quality}


EXPERIMENT = Experiment(
    name="table_3",
    title="One start for all: language initialisation",
    paper="Table III",
    question="Which start lets three robots share attention and MLP best, and how far is that from training together?",
    points=points,
    show=Table(rows=("quality", "task"), column="policy", average="task"),
    differences=(
        *DIFFERENCES,
        "ChibiT cannot be fetched here: a language model of its shape takes its part, trained on the documentation of "
        "installed Python packages unless --text or --init named another (WikiText-103 in the paper).",
        NEAR,
        "The paper's single-task numbers are, as it says, those of the Decision Transformer's paper (Chen et al. "
        "2021); ours are of the policies that are merged here.",
        "In the original multi-task code the heads of two of three robots are never trained; here all are.",
        "Policies that begin as a language model decay their trunk's weights like all others, as in the original, "
        "whose code means to exempt them but does not.",
        "Co-training reads sequences of 256 tokens at `laptop`, the original's are 1,024.",
        "The cosine loss is the paper's; the original's code takes a maximum per coordinate and counts padding.",
    ),
    likely=LIKELY,
    claims=(
        *(_better("ChibiT", "random", quality, OTHER_TEXT) for quality in QUALITIES),
        *(_better("ChibiT_R", "random", quality, OTHER_TEXT) for quality in QUALITIES),
        _better("ChibiT_R", "ChibiT", "medium-expert", OTHER_TEXT),
        *(_better("ChibiT", "ChibiT_CO", quality, OTHER_TEXT) for quality in QUALITIES),
        *(_better(start, "multi-task", "medium", HEADS) for start in ("ChibiT", "ChibiT_R")),
        _better("multi-task", "ChibiT_R", "medium-expert", OTHER_TEXT),
        *(
            Claim(
                statement=f"our bar: multi-task reaches {WITHIN:.0%} of single-task ({quality}, {task})",
                terms=(
                    (1, _where("multi-task", quality) | {"task": task}),
                    (-WITHIN, _where("single-task", quality) | {"task": task}),
                ),
                expected="at least",
                bound=0.0,
                value="score",
                likely=SMALL_TRUNK,
                ours=True,
            )
            for quality, task in TOGETHER_AS_GOOD
        ),
        *(
            _better("HarmoDT", other, quality, MASKS, ours=True)
            for other in ("multi-task", "HarmoDT, random masks")
            for quality in QUALITIES
        ),
    ),
)
