"""Budgets: how much data, model, training and evaluation. To tune a profile, edit its entry here."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pydantic import Field, field_validator

from dt.errors import UserError, unknown
from dt.frozen import Frozen
from dt.language.corpus import DOCSTRINGS
from dt.merging.groups import Granularity
from dt.model.architecture import BASE, GPT2_SMALL, WIDE, Architecture
from dt.training.optimisation import Optimisation, Precision

WIKITEXT = "hf:Salesforce/wikitext/wikitext-103-raw-v1"  # the paper's


class LanguageBudget(Frozen):
    """How a language model is pre-trained, and from what shape on policies begin as one (§VI)."""

    architecture: Architecture
    characters: int = Field(5_000_000, gt=0)  # of text, at most
    vocabulary: int = Field(8_192, gt=0)
    block: int = Field(256, gt=0)  # tokens a sequence
    clusters: int = Field(1_000, gt=0)
    optimisation: Optimisation
    text: str = DOCSTRINGS  # or a folder of text, or hf:<dataset>/<configuration>
    model: str | None = None  # Hugging Face folder or hub id of a model that is taken as it is: none is trained on text


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
    instances: int = Field(2, gt=0)  # of what is fine-tuned or trained together (Tables III to V), at a training seed
    language: LanguageBudget  # of the small trunk (ChibiT's part)
    large_language: LanguageBudget  # of the larger one (GPT-2's part, Table IV)
    wide: Architecture = WIDE  # of Table V
    harmony_interval: int = Field(500, gt=0)  # updates between two swaps of HarmoDT's masks
    fisher_batches: int = Field(750, gt=0)

    def instances_at(self, seed: int) -> range:
        """The seeds of the instances that are made at a training seed: others at every one."""
        return range(seed * self.instances, (seed + 1) * self.instances)

    def in_turn(self, tasks: int) -> Optimisation:
        """Of HarmoDT, whose steps are one task's each: as many windows of every task as a single-task policy sees."""
        steps, warmup = tasks * self.optimisation.steps, tasks * self.optimisation.warmup_steps
        return self.optimisation.model_copy(update={"steps": steps, "warmup_steps": warmup})

    @field_validator("training_seeds", "sweep_seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
            raise ValueError("training seeds must be different and not negative, and below 2**32")
        return seeds

    @field_validator("alphas")
    @classmethod
    def _within(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if min(alphas) < 0 or max(alphas) > 1:
            raise ValueError("alpha must lie in [0, 1]")
        return alphas

    def begun_as(self, init: str | None = None, init_large: str | None = None, text: str | None = None) -> "Profile":
        """The same budget with other language models to begin from.

        init, init_large: Hugging Face folders or hub ids whose weights take the small and the larger one's place
        unchanged; text: what is read instead, a folder of text or hf:<dataset>/<configuration>, by the models that are
        pre-trained here and in co-training. The name says so.
        """
        small, large, name = self.language, self.large_language, self.name
        if text is not None:
            small, large = (budget.model_copy(update={"text": text}) for budget in (small, large))
            name += f"-text-{_word(text)}"
        if init is not None:
            small = small.model_copy(update={"model": init})
            name += f"-init-{_word(init)}"
        if init_large is not None:
            large = large.model_copy(update={"model": init_large})
            name += f"-large-{_word(init_large)}"
        return self.model_copy(update={"language": small, "large_language": large, "name": name})

    def with_seeds(self, seeds: Sequence[int]) -> "Profile":
        """The same budget over other training seeds. The name says so."""
        if not seeds:
            raise UserError("no training seed given: name at least one, as in --seeds 0,1,2")
        return Profile.model_validate(
            {
                **self.model_dump(),
                "training_seeds": tuple(seeds),
                "sweep_seeds": tuple(seeds),
                "name": f"{self.name}-seeds-{'-'.join(map(str, seeds))}",
            }
        )


# Without dropout: few passes over many episodes underfit rather than overfit, and noise costs precision. With a quiet
# time-step table: from PyTorch's loud one, HalfCheetah reached half of its data's return in these steps.
_FAST = Optimisation(
    steps=1_500,
    learning_rate=2e-3,
    timestep_std=0.02,
    warmup_steps=100,
    schedule="cosine",
    dropout=0.0,
    precision="bfloat16",
)
# In steps of 16 windows instead of 64 an expert learns the same from a quarter of them: enough for the demo. On
# medium-expert data the attention that Table I is about does not form in a third of the windows: Hopper loses nothing
# without it, where it loses half after the steps above.
_BRISK = _FAST.model_copy(update={"batch_size": 16})

_SMALL = Architecture(activation="gelu_new")  # ChibiT's shape
_LANGUAGE = LanguageBudget(
    architecture=_SMALL,
    optimisation=Optimisation(
        steps=3_000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=200,
        schedule="cosine",
        clip_norm=1.0,
        weight_decay=0.01,
        dropout=0.0,
        precision="bfloat16",
    ),
)
_LAPTOP = {
    "language": _LANGUAGE,
    # At the paper's budget the larger one is GPT-2 small; here it is pre-trained, too, in a size that two cores bear.
    "large_language": _LANGUAGE.model_copy(
        update={"architecture": Architecture(width=256, layers=6, heads=4, activation="gelu_new")}
    ),
    "wide": Architecture(width=256, layers=3, heads=4, activation="gelu_new"),
    "harmony_interval": 225,
    "fisher_batches": 100,
}
_TINY_LANGUAGE = LanguageBudget(
    architecture=Architecture(width=32, layers=2, heads=1, activation="gelu_new"),
    characters=200_000,
    vocabulary=400,
    block=32,
    clusters=20,
    optimisation=Optimisation(steps=10, batch_size=4, learning_rate=1e-3, warmup_steps=2),
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
        language=_TINY_LANGUAGE,
        large_language=_TINY_LANGUAGE.model_copy(
            update={"architecture": Architecture(width=48, layers=2, heads=2, activation="gelu_new")}
        ),
        wide=Architecture(width=48, layers=2, heads=2, activation="gelu_new"),
        harmony_interval=20,
        fisher_batches=2,
    ),
    Profile(
        name="demo",
        purpose="`mergedt demo`: two robots in minutes on two cores",
        recorded_episodes=50,
        optimisation=_BRISK,
        alphas=(0.0, 0.25, 0.5, 0.75, 1.0),
        evaluation_episodes=10,
        evaluation_precision="bfloat16",
        **_LAPTOP,
    ),
    Profile(
        name="laptop",
        purpose="every figure on a CPU, in hours",
        recorded_episodes=200,
        optimisation=_FAST,
        training_seeds=(0, 1, 2),
        evaluation_precision="bfloat16",
        **_LAPTOP,
    ),
    Profile(
        name="paper",
        purpose="the paper's budget: 100k steps an expert, for GPUs",
        recorded_episodes=1_000,
        training_seeds=(0, 1, 2),
        sweep_seeds=(0, 1, 2),
        granularity="fine",
        language=_LANGUAGE.model_copy(
            update={
                "text": WIKITEXT,
                "characters": 600_000_000,
                "vocabulary": 50_257,
                "block": 1_000,
                "optimisation": _LANGUAGE.optimisation.model_copy(update={"steps": 100_000}),
            }
        ),
        large_language=LanguageBudget(
            architecture=GPT2_SMALL, text=WIKITEXT, model="gpt2", optimisation=_LANGUAGE.optimisation
        ),
    ),
)

PROFILES: Mapping[str, Profile] = MappingProxyType({profile.name: profile for profile in _ALL})


def _word(source: str) -> str:
    """The last part of a path or id, as part of a name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", source.rstrip("/").rsplit("/", 1)[-1]).strip("-")


def get_profile(name: str) -> Profile:
    """The profile of that name. Raises UserError naming the nearest valid ones."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    return PROFILES[name]
