"""Our own: what do the bits cost that bfloat16 leaves out, in training and when the policy acts?"""

from collections.abc import Iterator

from dt.training.optimisation import Precision
from experiments._pairs import TASKS
from orchestrator.experiment import Claim, Experiment, Point, Setting, Table, Where

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
MORE = 8  # times the usual episodes: 200 at the paper's number, for what is looked for is small
BAR = 2.0  # points of the normalised score


def in_precision(setting: Setting, trained: Precision, acting: Precision) -> Setting:
    """The same setting with its policies trained and evaluated in these, over more episodes."""
    profile = setting.profile
    changed = {
        "optimisation": profile.optimisation.model_copy(update={"precision": trained}),
        "evaluation_precision": acting,
        "evaluation_episodes": MORE * profile.evaluation_episodes,
    }
    return Setting(profile.model_copy(update=changed), setting.data)


def points(setting: Setting) -> Iterator[Point]:
    """Three robots × the profile's training seeds, trained in either precision and evaluated in either."""
    for task in TASKS:
        for seed in setting.profile.training_seeds:
            for trained in PRECISIONS:
                for acting in PRECISIONS:
                    varied = in_precision(setting, trained, acting)
                    policy = varied.expert(task, seed)
                    yield varied.point(policy, task, trained=trained, acting=acting, seed=seed)


def _bfloat16_costs_little(statement: str, in_float32: Where, in_bfloat16: Where) -> Claim:
    terms = ((1, in_bfloat16), (-1, in_float32))
    return Claim(statement=statement, terms=terms, expected="at least", bound=-BAR, value="score")


EXPERIMENT = Experiment(
    name="precision",
    title="Half the bits",
    paper="",
    question="Do policies lose return when trained in bfloat16, or acting in it? (Each in 8 times the usual episodes.)",
    points=points,
    show=Table(rows=("task", "trained"), column="acting"),
    claims=(
        *(
            _bfloat16_costs_little(
                f"{task}: a policy that acts in bfloat16 loses less than {BAR:g} points",
                {"task": task, "acting": "float32"},
                {"task": task, "acting": "bfloat16"},
            )
            for task in TASKS
        ),
        *(
            _bfloat16_costs_little(
                f"{task}: one trained in bfloat16 loses less than {BAR:g} points, acting in float32",
                {"task": task, "acting": "float32", "trained": "float32"},
                {"task": task, "acting": "float32", "trained": "bfloat16"},
            )
            for task in TASKS
        ),
    ),
)
