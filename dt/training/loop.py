"""The training loop. All that decides the next step is in the state that is saved, so a resumed run is the same run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dt.bfloat16 import products_in
from dt.errors import UserError
from dt.files import under, write_atomically
from dt.training.optimisation import Optimisation

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")
M = TypeVar("M")


class NotFiniteLossError(UserError):
    """The loss, or its gradient, became NaN or infinite."""


class Objective(Protocol[R_co]):
    """What is trained and by which gradients; the loop knows nothing else of it."""

    @property
    def name(self) -> str:
        """For messages: the tasks, say."""
        ...

    @property
    def module(self) -> nn.Module:
        """All parameters, and as buffers all else that changes. What requires no gradient stays as it is."""
        ...

    def backward(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """Sample a batch with `rng` and leave the gradients of its loss in the parameters.

        `step` counts updates from 0. Returns scalars by name: the `loss`, and the parts it is made of, if any.
        """
        ...

    def updated(self, step: int, rng: np.random.Generator) -> None:
        """Called after update number `step`."""
        ...

    def diagnostics(self) -> Mapping[str, float]:
        """What else there is to log of it as it stands, by name."""
        ...

    def result(self) -> R_co:
        """A snapshot of what has been trained so far."""
        ...


class Seeds(NamedTuple):
    """What one seed decides, independently of each other."""

    initialisation: int
    dropout: int
    sampler: int

    @classmethod
    def of(cls, seed: int) -> Seeds:
        """Three streams of one seed."""
        return cls(*np.random.SeedSequence(seed).generate_state(3, np.uint64).tolist())


def initialised(seed: int, make: Callable[[], M]) -> M:
    """What `make` builds when torch's random numbers begin at the seed's initialisation; leaves them as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(Seeds.of(seed).initialisation)  # not the GPUs'
        return make()


def learning_rate(optimisation: Optimisation, step: int) -> float:
    """Of update number `step`, counted from 0: linear warm-up min((step+1)/warmup, 1), then constant or cosine to 0."""
    peak, warmup = optimisation.learning_rate, optimisation.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if optimisation.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, optimisation.steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def run(state: TrainingState[R], *, resume: Path | None = None, log_every: int = 50) -> Iterator[TrainingState[R]]:
    """Train to the last step, from a saved state if one is given; yields every `log_every` steps and at the end.

    A resumed run is bit for bit the uninterrupted one (same device, library versions and thread count).
    Raises NotFiniteLossError when the loss or its gradient is no number.
    """
    if resume is not None:
        state.load(resume)
    while not state.done:
        stop = min(state.optimisation.steps, (state.step // log_every + 1) * log_every)
        state.advance(stop - state.step)
        yield state


class TrainingState(Generic[R]):
    """A training run at one step.

    step: updates taken; sampler: draws the windows; random: torch's random numbers, for dropout; optimiser: AdamW over
    all that is trained. Whoever advances a run by other means (`together`) brings all four on.
    """

    def __init__(
        self,
        objective: Objective[R],
        optimisation: Optimisation,
        seed: int,
        identity: Mapping[str, str],
        device: str = "cpu",
    ) -> None:
        """`identity` is what a saved state must share with this run to be continued by it. The module must lie on
        `device` already."""
        self.objective, self.optimisation, self.device = objective, optimisation, torch.device(device)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self._identity = {**identity, "optimisation": optimisation.model_dump_json(), "seed": str(seed)}
        seeds = Seeds.of(seed)
        self.sampler = np.random.Generator(np.random.PCG64(seeds.sampler))
        with forked_rng(self.device):
            torch.manual_seed(seeds.dropout)
            self.random = rng_state(self.device)
        self._module = objective.module.train()
        self._trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.AdamW(
            self._trained.values(), lr=0.0, weight_decay=optimisation.weight_decay, fused=True
        )

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step >= self.optimisation.steps

    def result(self) -> R:
        """What has been trained, as it stands."""
        return self.objective.result()

    def advance(self, steps: int) -> None:
        """Take that many steps, but none after the last; `metrics` then holds their mean losses, the last gradient norm
        and rate, seconds, and the objective's diagnostics."""
        steps = min(steps, self.optimisation.steps - self.step)
        if steps <= 0:
            return
        began, found = time.perf_counter(), dict[str, list[float]]()
        with forked_rng(self.device), products_in(self.optimisation.precision, self.device):
            set_rng_state(self.device, self.random)
            for _ in range(steps):
                for name, value in self._update().items():
                    found.setdefault(name, []).append(value)
            self.random = rng_state(self.device)
        self.measure(found, self._gradient_norm, time.perf_counter() - began)

    def measure(self, losses: Mapping[str, Sequence[float]], gradient_norm: float, seconds: float) -> None:
        """Set `metrics` to those of the steps just taken. losses: by name, one each step; seconds: of them all."""
        self.metrics = {
            "step": self.step,
            **{name: sum(values) / len(values) for name, values in losses.items()},
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate(self.optimisation, self.step - 1),
            "seconds": seconds,
            **self.objective.diagnostics(),
        }

    def _update(self) -> dict[str, float]:
        self.optimiser.zero_grad(set_to_none=True)
        losses = {name: loss.item() for name, loss in self.objective.backward(self.step, self.sampler).items()}
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), self.optimisation.clip_norm).item()
        for what, value in (("loss", losses["loss"]), ("gradient", norm)):  # before it spoils the parameters
            if not math.isfinite(value):
                raise not_finite(f"the {what} of {self.objective.name} became {value} at step {self.step + 1}", self)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.optimisation, self.step)
        self.optimiser.step()
        self.objective.updated(self.step, self.sampler)
        self._gradient_norm = norm
        self.step += 1
        return losses

    def save(self, path: Path) -> None:
        """Write all that the next step depends on, atomically, as safetensors."""
        tensors = {f"module.{name}": tensor.detach().cpu() for name, tensor in self._module.state_dict().items()}
        tensors |= {f"random.{index}": state for index, state in enumerate(self.random)}
        for name, parameter in self._trained.items():
            for key, moment in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{name}.{key}"] = moment.detach().cpu()
        progress = {"step": self.step, "sampler": self.sampler.bit_generator.state}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(path, save(contiguous, self._identity | {"progress": json.dumps(progress)}))

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises UserError when it belongs to another run or is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                for key, value in self._identity.items():
                    if header.get(key) != value:
                        raise UserError(
                            f"{path} is a checkpoint of another {key}: {header.get(key)} instead of {value}"
                        )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"the checkpoint {path} cannot be read ({error}): delete it to start over") from error
        module, mine = under("module.", tensors), self._module.state_dict()
        if {name: tensor.shape for name, tensor in module.items()} != {name: part.shape for name, part in mine.items()}:
            raise UserError(f"the checkpoint {path} is of another version of mergedt: delete it to start over")
        progress: dict[str, Any] = json.loads(header["progress"])
        self.step = progress["step"]
        self.sampler.bit_generator.state = progress["sampler"]
        random = [tensors[name] for name in sorted(tensors) if name.startswith("random.")]
        self.random = [*random, *self.random[len(random) :]]  # begun on a CPU, it has none for the GPU
        self._module.load_state_dict(module)
        for name, parameter in self._trained.items():
            moments = under(f"optimiser.{name}.", tensors)
            self.optimiser.state[parameter] = {key: moment.to(self.device) for key, moment in moments.items()}


def not_finite(what: str, state: TrainingState[Any]) -> NotFiniteLossError:
    """The error, with what to do about it."""
    return NotFiniteLossError(
        f"{what}: lower the learning rate (now {state.optimisation.learning_rate:g}) or lengthen the warm-up; "
        "no parameter took it in, and what was saved before is good"
    )


def in_precision(optimisation: Optimisation, device: torch.device) -> torch.autocast:
    """For the forward pass: matrix products in the precision of the recipe. (A whole step is within `products_in`.)"""
    return torch.autocast(device.type, torch.bfloat16, enabled=optimisation.precision == "bfloat16")


def forked_rng(device: torch.device) -> Any:
    """Leaves the process's random numbers as they were."""
    return torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else [])


def rng_state(device: torch.device) -> list[Tensor]:
    """The process's random numbers as they stand: the CPU's, and the device's own."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_rng_state(device: torch.device, state: list[Tensor]) -> None:
    """Go on from what `rng_state` gave."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
