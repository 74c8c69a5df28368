"""Training several policies of one shape at once: their parameters stacked, one set of kernels for all.

A step of a small policy takes a GPU less time than the asking for it. Stacked, many policies take little longer than
one. How a run is advanced does not belong to it: between two calls each is a run of its own as ever, which is saved,
resumed, and goes on in this company, in another, or alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import Parameter

from dt.data.windows import Batch, Windows
from dt.errors import UserError
from dt.model.decision_transformer import DecisionTransformer
from dt.model.flat import Shapes, flattened, unflattened
from dt.model.policy import Policy
from dt.training.loop import (
    NotFiniteLossError,
    TrainingState,
    forked_rng,
    in_precision,
    learning_rate,
    rng_state,
    set_rng_state,
)
from dt.training.objective import ActionObjective, action_loss

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names torch gives them


def advance_together(states: Sequence[TrainingState[Policy]], count: int) -> None:
    """Take `count` steps of each run, as `TrainingState.advance` does of one.

    Every policy sees the windows it would see alone; without dropout its parameters are those of the run alone up to
    rounding. Dropout is drawn for all at once, from the random numbers of the first. The seconds among the `metrics`
    are each run's share.

    Raises UserError for runs that differ in more than task, seed, data and numbers, and NotFiniteLossError, naming the
    tasks concerned, when a loss is no number: no run has changed then.
    """
    runs = [_Run.of(state) for state in states]
    _check(runs)
    began, first = time.perf_counter(), states[0]
    optimisation, device, steps = first.optimisation, first.device, range(first.step, first.step + count)
    shapes = _shapes(runs[0].trained)
    idle = {name: torch.stack([run.idle[name] for run in runs]) for name in runs[0].idle}
    matrix = torch.stack([flattened(run.trained, shapes) for run in runs]).detach().requires_grad_()  # (P, E)
    optimiser = torch.optim.AdamW([matrix], lr=0.0, weight_decay=optimisation.weight_decay, fused=True)
    if first.step:
        moments = {key: torch.stack([flattened(run.moments(key), shapes) for run in runs]) for key in MOMENTS}
        optimiser.state[matrix] = {"step": torch.tensor(float(first.step), device=device), **moments}
    samplers = [copy.deepcopy(state.sampler) for state in states]
    windows = _Windows.of([run.windows for run in runs], device)

    def loss_of(parameters: Mapping[str, Tensor], *window: Tensor) -> Tensor:
        batch = Batch(*window)
        predicted: Tensor = functional_call(runs[0].model, runs[0].named(parameters), (runs[0].task, batch))
        return action_loss(predicted, batch)

    losses, norms = list[Tensor](), torch.zeros(len(runs))
    with forked_rng(device):
        set_rng_state(device, first.random)
        for step in steps:
            batch = windows.sample(optimisation.batch_size, samplers)
            with in_precision(optimisation, device):
                each = vmap(loss_of, randomness="different")({**unflattened(matrix, shapes), **idle}, *batch)
            (gradient,) = torch.autograd.grad(each.sum(), matrix)
            norms = gradient.norm(dim=1)
            matrix.grad = gradient * (optimisation.clip_norm / (norms + 1e-6)).clamp(max=1)[:, None]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(optimisation, step)
            optimiser.step()
            losses.append(each.detach())
        random = rng_state(device)

    found = torch.stack(losses, dim=1).tolist()  # P × steps; looked at but once, so that a GPU need not wait for it
    if bad := [run.task for run, own in zip(runs, found, strict=True) if not np.isfinite(own).all()]:
        raise NotFiniteLossError(
            f"the loss of {' and '.join(bad)} became no number between steps {steps.start + 1} and "
            f"{steps.stop}: lower the learning rate (now {optimisation.learning_rate:g}) or lengthen the "
            "warm-up"
        )
    rows = [matrix.detach(), *(optimiser.state[matrix][key] for key in MOMENTS)]
    for index, (run, sampler) in enumerate(zip(runs, samplers, strict=True)):
        run.write(*(unflattened(each[index], shapes) for each in rows), step=steps.stop)
        run.state.sampler, run.state.random = sampler, random
        run.state.measure({"loss": found[index]}, float(norms[index]), (time.perf_counter() - began) / len(runs))


class _Run(NamedTuple):
    """A run of one task, its parameters under names that do not depend on the task: `trunk.…`, `head.…`."""

    state: TrainingState[Policy]
    model: DecisionTransformer
    task: str
    windows: Windows
    trained: Mapping[str, Parameter]
    idle: Mapping[str, Parameter]  # frozen

    @classmethod
    def of(cls, state: TrainingState[Policy]) -> _Run:
        objective = state.objective
        if not isinstance(objective, ActionObjective) or len(objective.windows) != 1 or objective.auxiliaries:
            raise UserError(
                f"{objective.name}: only one task's action error can be trained in company, no other losses"
            )
        ((task, windows),) = objective.windows.items()
        parts = {"trunk": objective.model.trunk, "head": objective.model.head(task)}
        named = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        idle = {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
        return cls(state, objective.model, task, windows, trained, idle)

    def named(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Under the names of the model."""
        return {name.replace("head.", f"heads.{self.task}.", 1): tensor for name, tensor in parameters.items()}

    def moments(self, key: str) -> dict[str, Tensor]:
        """One of AdamW's, by parameter."""
        return {name: self.state.optimiser.state[parameter][key] for name, parameter in self.trained.items()}

    def write(
        self, values: Mapping[str, Tensor], first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, step: int
    ) -> None:
        """Set parameters and optimiser to what `step` updates made of them."""
        self.state.step = step
        for name, parameter in self.trained.items():
            with torch.no_grad():
                parameter.copy_(values[name])
            moments = dict(zip(MOMENTS, (first[name].clone(), second[name].clone()), strict=True))
            self.state.optimiser.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **moments,
            }


def _check(runs: Sequence[_Run]) -> None:
    if not runs:
        raise UserError("no runs to advance")
    first = runs[0]
    for run in runs[1:]:
        for what, own, other in (
            ("architecture", first.model.architecture, run.model.architecture),
            ("optimisation", first.state.optimisation, run.state.optimisation),
            ("step", first.state.step, run.state.step),
            ("device", first.state.device, run.state.device),
            ("trained parameters", _shapes(first.trained), _shapes(run.trained)),
        ):
            if own != other:
                raise UserError(f"runs of different {what} cannot be trained together: {own} and {other}")


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class _Windows(NamedTuple):
    """The tables of several runs' windows one below the other on the device: one gather serves all."""

    windows: Sequence[Windows]
    tables: Sequence[Tensor]  # as in `Batch`, the mask apart
    offsets: NDArray[np.int64]  # of the first row of each run's

    @classmethod
    def of(cls, windows: Sequence[Windows], device: torch.device) -> _Windows:
        tables = zip(*((w.returns_to_go, w.states, w.actions, w.timesteps) for w in windows), strict=True)
        offsets = np.cumsum([0, *(len(w.timesteps) for w in windows[:-1])])
        return cls(windows, [torch.from_numpy(np.concatenate(parts)).to(device) for parts in tables], offsets)

    def sample(self, batch_size: int, samplers: Sequence[np.random.Generator]) -> Batch:
        """Each run's own windows, drawn by its own sampler: (P, B, K, …)."""
        drawn = [windows.draw(batch_size, sampler) for windows, sampler in zip(self.windows, samplers, strict=True)]
        rows = np.stack([rows + offset for (rows, _), offset in zip(drawn, self.offsets, strict=True)])
        device = self.tables[0].device
        where, mask = torch.from_numpy(rows).to(device), torch.from_numpy(np.stack([mask for _, mask in drawn]))
        return Batch(*(*(table[where] for table in self.tables), mask.to(device)))
