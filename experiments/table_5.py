"""Table V: one multi-task policy, fine-tuned for each robot apart, then merged again without any further training."""

from collections.abc import Iterator, Mapping

from experiments._pairs import DIFFERENCES, LIKELY, TASKS
from experiments.table_3 import DISTANCE, NEAR
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table, mean_of
from orchestrator.recipes import AnyPolicy, Assemble, Auxiliaries, FineTune, TrainTogether

FROZEN, FROZEN_HEAD = "ln_f", ("embed_timestep",)
GROUP = "trunk"
NARROW = (
    "width and budget: below the profile `paper`, a narrower trunk leaves three experts less room beside each other."
)
LOW_BASE = (
    "the base: other `medium` data, unless it is D4RL's, made one that scores less, so there is less to fall below."
)


def fine_tuned(setting: Setting, base: TrainTogether, task: str) -> FineTune:
    """The base made an expert for one robot, on its expert data, kept near the base."""
    return FineTune(
        policy=base,
        dataset=setting.data.dataset(task, "expert", setting.profile),
        optimisation=setting.profile.optimisation,
        seed=base.seed,
        frozen=FROZEN,
        frozen_head=FROZEN_HEAD,
        auxiliaries=Auxiliaries(distance=DISTANCE),
    )


def configurations(setting: Setting, seed: int) -> Iterator[tuple[str, Mapping[str, AnyPolicy]]]:
    """The rows of the table: a policy for each robot, the same one in all rows but that of the experts."""
    wide = setting.profile.wide
    base = setting.together(TASKS, seed, "medium", architecture=wide)
    experts = tuple(fine_tuned(setting, base, task) for task in TASKS)
    yield "multi-task on medium", dict.fromkeys(TASKS, base)
    masked = setting.together(TASKS, seed, "medium", architecture=wide, masks="fisher")
    yield "HarmoDT on medium", dict.fromkeys(TASKS, masked)
    yield "finetuned experts", {expert.task: expert for expert in experts}
    for method, fisher in (("mean", None), ("Fisher", setting.fisher)):
        merges = tuple(mean_of(expert, experts, GROUP, fisher) for expert in experts)
        yield method, dict.fromkeys(TASKS, Assemble(policies=merges, shared=GROUP))


def points(setting: Setting) -> Iterator[Point]:
    """Five configurations, three robots, as many bases as the profile has instances."""
    for seed in setting.profile.sweep_seeds:
        for instance in setting.profile.instances_at(seed):
            for configuration, policies in configurations(setting, instance):
                for task, policy in policies.items():
                    yield setting.point(policy, task, configuration=configuration, seed=seed, instance=instance)


def _against_the_base(method: str, task: str, *, better: bool) -> Claim:
    of_task = {"task": task}
    return Claim(
        statement=f"merged by {method}, {task} is {'better' if better else 'worse'} than the base",
        terms=((1, {"configuration": method} | of_task), (-1, {"configuration": "multi-task on medium"} | of_task)),
        expected="at least" if better else "at most",
        bound=0.0,
        value="score",
        likely=NARROW if better else LOW_BASE,
    )


EXPERIMENT = Experiment(
    name="table_5",
    title="Fine-tuned from one base, merged without further training",
    paper="Table V",
    question="What is left of three experts with a common ancestor when their trunks become one?",
    points=points,
    show=Table(rows=("configuration",), column="task"),
    differences=(
        *DIFFERENCES,
        "In the original the heads of two of three robots stay at their random start, in the base and in the experts.",
        "Each expert's Fisher is estimated on its own expert data; the original's on all robots' medium data.",
        NEAR,
        "The trunk is narrower at the profile `laptop`: 256 wide, 3 blocks, 4 heads (512 wide in the paper).",
        "A head has a time-step table of its own; the original's share one.",
        "Ours is ± over bases (`instances`); the paper's over evaluations of two bases.",
        "Fine-tuning decays the trunk's weights as the first training does; the original's does not.",
    ),
    likely=LIKELY,
    claims=(
        Claim(
            statement="fine-tuning on expert data improves on the base",
            terms=((1, {"configuration": "finetuned experts"}), (-1, {"configuration": "multi-task on medium"})),
            expected="at least",
            bound=0.0,
            value="score",
            likely=NARROW,
        ),
        Claim(
            statement="Fisher merging is better than the mean",
            terms=((1, {"configuration": "Fisher"}), (-1, {"configuration": "mean"})),
            expected="at least",
            bound=0.0,
            value="score",
            likely=NARROW,
        ),
        *(_against_the_base("Fisher", task, better=True) for task in TASKS),
        *(_against_the_base("mean", task, better=task == "halfcheetah") for task in TASKS),
        Claim(
            statement="the fine-tuned experts stay ahead of their merge",
            terms=((1, {"configuration": "finetuned experts"}), (-1, {"configuration": "Fisher"})),
            expected="at least",
            bound=0.0,
            value="score",
            likely=NARROW,
        ),
    ),
)
