"""Table II: merge a group of two policies, freeze it, fine-tune the rest for each robot: one policy for both."""

from collections.abc import Iterator

from experiments._pairs import DIFFERENCES, LIKELY
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table, mean_of
from orchestrator.recipes import Assemble, Merge, Train

ROBOTS = ("hopper", "halfcheetah")
GROUPS = ("trunk", "attention+mlp", "attention")
FINE_TUNED = "merge-freeze-finetune"
MOST, HARDLY, SOME = 0.85, 0.1, 0.5
SHORT = (
    "budget. With attention and MLPs frozen, what is left (layer norms, embeddings, head) is fine-tuned for as many "
    "steps as the experts had, and those are 100,000 in the paper. Four times as many make it good (see `budget`)."
)


def configurations(setting: Setting, seed: int) -> Iterator[tuple[str, Assemble]]:
    """The rows of the table but the first, each one policy for both robots."""
    experts = {task: setting.expert(task, seed) for task in ROBOTS}
    both = tuple(experts.values())
    for owner in ROBOTS:
        yield f"frozen from {owner}", frozen_from(setting, experts[owner], both)
    for group in GROUPS:
        yield f"{group}, {FINE_TUNED}", setting.merge_freeze_finetune(both, group)
    merges = tuple(mean_of(expert, both, "attention") for expert in both)
    yield "attention, merged", Assemble(policies=merges, shared="attention")


def frozen_from(setting: Setting, owner: Train, experts: tuple[Train, ...]) -> Assemble:
    """All robots on the owner's trunk: the others learn to feed and to read it."""

    def on_owners_trunk(expert: Train) -> Merge:
        return Merge(sources=(expert, owner), group="trunk", alpha=1.0)

    parts = (e if e == owner else setting.fine_tuned(on_owners_trunk(e), e, frozen="trunk") for e in experts)
    return Assemble(policies=tuple(parts), shared="trunk")


def points(setting: Setting) -> Iterator[Point]:
    """Seven configurations, both robots."""
    for seed in setting.profile.sweep_seeds:
        for task in ROBOTS:
            yield setting.point(setting.expert(task, seed), task, configuration="original", seed=seed)
        for configuration, policy in configurations(setting, seed):
            for task in ROBOTS:
                yield setting.point(policy, task, configuration=configuration, seed=seed)


def _kept(statement: str, configuration: str, task: str, share: float) -> Claim:
    return Claim(
        statement=statement,
        terms=((1, {"configuration": configuration, "task": task}),),
        expected="at least",
        bound=share,
        likely=SHORT,
    )


EXPERIMENT = Experiment(
    name="table_2",
    title="Merge, freeze, fine-tune",
    paper="Table II",
    question="How much of the trunk can two robots share when the rest is fine-tuned for each?",
    points=points,
    show=Table(rows=("configuration",), column="task", value="retention"),
    differences=(
        *DIFFERENCES,
        "The paper's sizes (33.18 %, 596K) fit no trunk of the published code; ours are counted from the weights.",
        "The transformer size is that of one policy; of two originals the paper counts both.",
    ),
    likely=LIKELY,
    claims=(
        *(
            _kept(f"{group}: {task} keeps at least {MOST:.0%}", f"{group}, {FINE_TUNED}", task, MOST)
            for group in ("attention+mlp", "attention")
            for task in ROBOTS
        ),
        Claim(
            statement="merging the layer norms, too, costs more (attention+mlp − trunk)",
            terms=(
                (1, {"configuration": f"attention+mlp, {FINE_TUNED}"}),
                (-1, {"configuration": f"trunk, {FINE_TUNED}"}),
            ),
            expected="at least",
            bound=0.0,
        ),
        Claim(
            statement="halfcheetah learns next to nothing on hopper's frozen trunk",
            terms=((1, {"configuration": "frozen from hopper", "task": "halfcheetah"}),),
            expected="at most",
            bound=HARDLY,
        ),
        Claim(
            statement="hopper keeps half at most, or little more, on halfcheetah's frozen trunk",
            terms=((1, {"configuration": "frozen from halfcheetah", "task": "hopper"}),),
            expected="at most",
            bound=SOME + HARDLY,
        ),
        Claim(
            statement="a merged trunk is better than one robot's frozen trunk is for the other",
            terms=(
                (1, {"configuration": f"trunk, {FINE_TUNED}"}),
                (-0.5, {"configuration": "frozen from hopper", "task": "halfcheetah"}),
                (-0.5, {"configuration": "frozen from halfcheetah", "task": "hopper"}),
            ),
            expected="at least",
            bound=0.0,
        ),
    ),
)
