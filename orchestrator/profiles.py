"""Budgets: how much data, model, training and evaluation. To tune a profile, edit its entry here."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pydantic import Field, field_validator

from dt.errors import UserError, unknown
from dt.frozen import Frozen
from dt.merging.groups import Granularity
from dt.model.architecture import BASE, Architecture
from dt.training.optimisation import Optimisation, Precision


class Profile(Frozen):
    """A budget by name. Two runs at one profile with the same data source compute the same recipes."""

    name: str
    purpose: str  # one line for `mergedt list`
    recorded_episodes: int = Field(gt=0)  # per behaviour policy; medium-expert is this many of each
    recording_seed: int = Field(0, ge=0)
    architecture: Architecture = BASE
    optimisation: Optimisation = Optimisation()
    training_seeds: tuple[int, ...] = Field((0,), min_length=1)  # of the experts, and of every merge between them
    sweep_seeds: tuple[int, ...] = Field((0,), min_length=1)  # the training seeds that the wide sweeps use
    alphas: tuple[float, ...] = Field(tuple(i / 10 for i in range(11)), min_length=1)  # the grid of Figure 3
    granularity: Granularity = "coarse"  # of the units of Figures 2a and 2b; the paper speaks of the coarse ones
    evaluation_episodes: int = Field(25, gt=0)  # the paper's number (§V)
    evaluation_seed: int = Field(1_000_000, ge=0)  # episode i starts from this + i; far from the seeds of recordings
    evaluation_precision: Precision = "float32"

    @field_validator("training_seeds", "sweep_seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError("training seeds must be different and not negative")
        return seeds

    @field_validator("alphas")
    @classmethod
    def _within(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if min(alphas) < 0 or max(alphas) > 1:
            raise ValueError("alpha must lie in [0, 1]")
        return alphas

    def with_seeds(self, seeds: Sequence[int]) -> "Profile":
        """The same budget over other training seeds."""
        if not seeds:
            raise UserError("no training seed given: name at least one, as in --seeds 0,1,2")
        return Profile.model_validate(
            {**self.model_dump(), "training_seeds": tuple(seeds), "sweep_seeds": tuple(seeds)}
        )


# Without dropout: few passes over many episodes underfit rather than overfit, and noise costs precision. On 200 Hopper
# episodes 1,500 steps reached 99.8 % of the data's return; with dropout 0.1 on 60-80 episodes a prototype reached 69 %.
_FAST = Optimisation(
    steps=1_500,
    learning_rate=1e-3,
    warmup_steps=100,
    schedule="cosine",
    dropout=0.0,
    precision="bfloat16",
)

_ALL = (
    Profile(
        name="smoke",
        purpose="tests: seconds, numbers mean nothing",
        recorded_episodes=2,
        architecture=Architecture(width=32, layers=2, heads=1),
        optimisation=Optimisation(steps=20, batch_size=16, learning_rate=1e-3, warmup_steps=5, schedule="cosine"),
        alphas=(0.0, 0.5, 1.0),
        evaluation_episodes=2,
    ),
    Profile(
        name="demo",
        purpose="`mergedt demo`: two robots in minutes on two cores",
        recorded_episodes=50,
        optimisation=_FAST.model_copy(update={"steps": 1_000}),
        alphas=(0.0, 0.25, 0.5, 0.75, 1.0),
        evaluation_episodes=10,
        evaluation_precision="bfloat16",
    ),
    Profile(
        name="laptop",
        purpose="every figure on a CPU, in hours",
        recorded_episodes=200,
        optimisation=_FAST,
        training_seeds=(0, 1, 2),
        evaluation_precision="bfloat16",
    ),
    Profile(
        name="paper",
        purpose="the paper's budget: 100k steps an expert, for GPUs",
        recorded_episodes=1_000,
        training_seeds=(0, 1, 2),
        sweep_seeds=(0, 1, 2),
        granularity="fine",
    ),
)

PROFILES: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in _ALL})


def get_profile(name: str) -> Profile:
    """The profile of that name. Raises UserError naming the nearest valid ones."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]
