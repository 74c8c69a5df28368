"""Training one single-task Decision Transformer; all that decides the next step is in the state that is saved."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dt.data.trajectories import Trajectories
from dt.data.windows import Batch, Windows
from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy, write_atomically
from dt.tasks import Task
from dt.training.optimisation import Optimisation


class NotFiniteLossError(UserError):
    """The loss became NaN or infinite."""


def action_loss(predicted: Tensor, batch: Batch) -> Tensor:
    """Mean squared error over real time steps and action dimensions; padding counts for nothing. (B, K, A) → ()."""
    squared = F.mse_loss(predicted, batch.actions, reduction="none").sum(dim=-1)
    return (squared * batch.mask).sum() / (batch.mask.sum() * batch.actions.shape[-1])


def learning_rate(optimisation: Optimisation, step: int) -> float:
    """Of update number `step`, counted from 0: linear warm-up min((step+1)/warmup, 1), then constant or cosine to 0."""
    peak, warmup = optimisation.learning_rate, optimisation.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if optimisation.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, optimisation.steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    task: Task,
    trajectories: Trajectories,
    architecture: Architecture,
    optimisation: Optimisation,
    seed: int,
    *,
    resume: Path | None = None,
    log_every: int = 50,
    device: str = "cpu",
) -> Iterator[TrainingState]:
    """Train from a random initialisation or a saved state; yields the state every `log_every` steps and at the end.

    A resumed run is bit for bit the uninterrupted one (same device, library versions and thread count).
    Raises UserError for data of another shape, NotFiniteLossError when the loss is no number.
    """
    trajectories.validate(task)
    state = TrainingState(task, trajectories, architecture, optimisation, seed, device)
    if resume is not None:
        state.load(resume)
    while not state.done:
        stop = min(optimisation.steps, (state.step // log_every + 1) * log_every)
        state.advance(stop - state.step)
        yield state


class TrainingState:
    """A training run at one step: model, optimiser, sampler and random numbers."""

    def __init__(
        self,
        task: Task,
        trajectories: Trajectories,
        architecture: Architecture,
        optimisation: Optimisation,
        seed: int,
        device: str,
    ) -> None:
        self.task, self.optimisation, self.device = task, optimisation, torch.device(device)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self._windows = Windows.of(trajectories, task, architecture.context)
        self._identity = {
            "task": task.name,
            "data": trajectories.content_hash,
            "architecture": architecture.model_dump_json(),
            "optimisation": optimisation.model_dump_json(),
            "seed": str(seed),
        }
        init_seed, dropout_seed, sampler_seed = np.random.SeedSequence(seed).generate_state(3, np.uint64).tolist()
        self._sampler = np.random.Generator(np.random.PCG64(sampler_seed))
        with _forked_rng(self.device):
            torch.manual_seed(init_seed)
            self._model = DecisionTransformer(architecture, [task], optimisation.dropout)
            torch.manual_seed(dropout_seed)
            self._random = _rng_state(self.device)
        head = self._model.head(task.name)
        head.state_mean.copy_(torch.from_numpy(np.array(trajectories.state_mean)))
        head.state_std.copy_(torch.from_numpy(np.array(trajectories.state_std)))
        head.best_return.fill_(float(trajectories.returns.max()))
        self._model.to(self.device).train()
        self._optimiser = torch.optim.AdamW(
            self._model.parameters(), lr=0.0, weight_decay=optimisation.weight_decay, fused=True
        )

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.step >= self.optimisation.steps

    def policy(self) -> Policy:
        """The policy as it stands."""
        return self._model.policy()

    def advance(self, steps: int) -> None:
        """Take that many steps; `metrics` then holds their mean loss, the last gradient norm and rate, seconds."""
        began, losses = time.perf_counter(), 0.0
        with _forked_rng(self.device):
            _set_rng_state(self.device, self._random)
            for _ in range(steps):
                losses += self._update()
            self._random = _rng_state(self.device)
        self.metrics = {
            "step": self.step,
            "loss": losses / steps,
            "gradient_norm": self._gradient_norm,
            "learning_rate": learning_rate(self.optimisation, self.step - 1),
            "seconds": time.perf_counter() - began,
        }

    def _update(self) -> float:
        batch = Batch(
            *(part.to(self.device) for part in self._windows.sample(self.optimisation.batch_size, self._sampler))
        )
        low_precision = self.optimisation.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low_precision):
            loss = action_loss(self._model(self.task.name, batch), batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NotFiniteLossError(
                f"the loss of {self.task.name} became {value} at step {self.step + 1}: lower the learning rate "
                f"(now {self.optimisation.learning_rate:g}) or lengthen the warm-up; the last good checkpoint is kept"
            )
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(self.optimisation, self.step)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self.optimisation.clip_norm)
        self._optimiser.step()
        self._gradient_norm = norm.item()
        self.step += 1
        return value

    def save(self, path: Path) -> None:
        """Write all that the next step depends on, atomically, as safetensors."""
        tensors = {f"model.{name}": tensor.detach().cpu() for name, tensor in self._model.state_dict().items()}
        tensors |= {f"random.{index}": state for index, state in enumerate(self._random)}
        for name, parameter in self._model.named_parameters():
            for key, moment in self._optimiser.state[parameter].items():
                tensors[f"optimiser.{name}.{key}"] = moment.detach().cpu()
        progress = {"step": self.step, "sampler": self._sampler.bit_generator.state}
        write_atomically(path, save(tensors, self._identity | {"progress": json.dumps(progress)}))

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
        progress: dict[str, Any] = json.loads(header["progress"])
        self.step = progress["step"]
        self._sampler.bit_generator.state = progress["sampler"]
        self._random = [tensors[name] for name in sorted(tensors) if name.startswith("random.")]
        self._model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, parameter in self._model.named_parameters():
            prefix = f"optimiser.{name}."
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            self._optimiser.state[parameter] = {key: moment.to(self.device) for key, moment in moments.items()}


def _forked_rng(device: torch.device) -> Any:
    """Leaves the process's random numbers as they were."""
    return torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else [])


def _rng_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_rng_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
