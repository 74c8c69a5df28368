"""Training several policies of one shape at once: their parameters stacked, one set of kernels for all.

A step of a small policy takes a GPU less time than the asking for it. Stacked, many policies take little longer than
one. How a run is advanced does not belong to it: between two calls each is a run of its own, which is saved, resumed,
and goes on in this company, in another, or alone. With dropout it depends on the company which masks are drawn.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import Parameter

from dt.bfloat16 import products_in
from dt.data.windows import Batch, Windows
from dt.errors import UserError
from dt.model.decision_transformer import DecisionTransformer
from dt.model.flat import Shapes, flattened, unflattened
from dt.model.policy import Policy
from dt.training.loop import (
    TrainingState,
    forked_rng,
    in_precision,
    learning_rate,
    not_finite,
    rng_state,
    set_rng_state,
)
from dt.training.objective import ActionObjective, action_loss

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by the names torch gives them


class Crowd:
    """Runs of one shape: they may differ in task, seed, data and numbers.

    Raises UserError for runs that differ in more, that train on anything but one task's action error, or that are the
    same run twice.
    """

    def __init__(self, states: Sequence[TrainingState[Policy]]) -> None:
        self._runs = [_Run.of(state) for state in states]
        _check(self._runs)
        self._windows = _Windows.of([run.windows for run in self._runs], states[0].device)

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self._runs[0].state.done

    def advance(self, count: int) -> None:
        """Take `count` steps of each run, but none after the last, as `TrainingState.advance` does of one.

        Every policy sees the windows it would see alone; without dropout its parameters are those of the run alone up
        to rounding. Dropout is drawn for all at once, by a seed that each run's random numbers have a part in. The
        seconds among the `metrics` are each run's share.

        Raises NotFiniteLossError, naming the runs concerned, when a loss is no number: no run has changed then, and the
        others can go on in a crowd of their own.
        """
        _check(self._runs)  # one may have been advanced alone
        began, runs = time.perf_counter(), self._runs
        state = runs[0].state
        optimisation, device = state.optimisation, state.device
        steps = range(state.step, min(state.step + count, optimisation.steps))
        if not steps:
            return
        shapes = _shapes(runs[0].trained)
        idle = {name: torch.stack([run.idle[name] for run in runs]) for name in runs[0].idle}
        matrix = torch.stack([flattened(run.trained, shapes) for run in runs]).detach().requires_grad_()  # (P, E)
        optimiser = torch.optim.AdamW([matrix], lr=0.0, weight_decay=optimisation.weight_decay, fused=True)
        if state.step:
            moments = {key: torch.stack([flattened(run.moments(key), shapes) for run in runs]) for key in MOMENTS}
            optimiser.state[matrix] = {"step": torch.tensor(float(state.step), device=device), **moments}
        samplers = [copy.deepcopy(run.state.sampler) for run in runs]

        def loss_of(parameters: Mapping[str, Tensor], *window: Tensor) -> Tensor:
            batch = Batch(*window)
            predicted: Tensor = functional_call(runs[0].model, runs[0].named(parameters), (runs[0].task, batch))
            return action_loss(predicted, batch)

        losses, norms = list[Tensor](), list[Tensor]()
        with forked_rng(device), products_in(optimisation.precision, device):
            randoms = _seeded(runs, device)
            for step in steps:
                batch = self._windows.sample(optimisation.batch_size, samplers)
                with in_precision(optimisation, device):
                    each = vmap(loss_of, randomness="different")({**unflattened(matrix, shapes), **idle}, *batch)
                (gradient,) = torch.autograd.grad(each.sum(), matrix)
                norms.append(gradient.norm(dim=1))
                matrix.grad = gradient * (optimisation.clip_norm / (norms[-1] + 1e-6)).clamp(max=1)[:, None]
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(optimisation, step)
                optimiser.step()
                losses.append(each.detach())

        # P × steps; looked at but once, so that a GPU need not wait for it
        found, lengths = (torch.stack(each, dim=1).cpu() for each in (losses, norms))
        good = (found.isfinite() & lengths.isfinite()).all(dim=1).tolist()
        if bad := [f"run {i} ({run.task})" for i, run in enumerate(runs) if not good[i]]:
            raise not_finite(
                f"the loss of {' and '.join(bad)} became no number between steps {steps.start + 1} and {steps.stop}",
                state,
            )
        rows = [matrix.detach(), *(optimiser.state[matrix][key] for key in MOMENTS)]
        for i, run in enumerate(runs):
            run.write(*(unflattened(each[i], shapes) for each in rows), step=steps.stop)
            run.state.sampler, run.state.random = samplers[i], randoms[i]
            seconds = (time.perf_counter() - began) / len(runs)
            run.state.measure({"loss": found[i].tolist()}, float(lengths[i, -1]), seconds)


def _seeded(runs: Sequence[_Run], device: torch.device) -> list[list[Tensor]]:
    """Seed torch by one number of each run's; returns the runs' random numbers after it."""
    total, after = 0, []
    for run in runs:
        set_rng_state(device, run.state.random)
        total += int(torch.randint(2**62, ()))
        after.append(rng_state(device))
    torch.manual_seed(total % 2**63)
    return after


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
        raise UserError("no runs to train together")
    if len({id(run.state) for run in runs}) < len(runs):
        raise UserError("the same run twice cannot be trained together with itself")
    first = runs[0]
    for run in runs[1:]:
        for what, own, other in (
            ("architecture", first.model.architecture, run.model.architecture),
            ("optimisation", first.state.optimisation, run.state.optimisation),
            ("step", first.state.step, run.state.step),
            ("device", first.state.device, run.state.device),
            ("trained parameters", _shapes(first.trained), _shapes(run.trained)),
            ("frozen parameters", _shapes(first.idle), _shapes(run.idle)),
        ):
            if own != other:
                raise UserError(f"runs of different {what} cannot be trained together: {own} and {other}")


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class _Windows(NamedTuple):
    """The tables of several runs' windows one below the other on the device: one gather serves all."""

    windows: Sequence[Windows]
    tables: Sequence[Tensor]  # as in `Batch`, the mask apart
    offsets: Sequence[int]  # of the first row of each run's

    @classmethod
    def of(cls, windows: Sequence[Windows], device: torch.device) -> _Windows:
        different: list[Windows] = []  # runs that differ in their seed share one
        for each in windows:
            if not any(_same(each, other) for other in different):
                different.append(each)
        bounds = np.cumsum([0, *(len(each.timesteps) for each in different)]).tolist()
        offsets = [next(bounds[i] for i, other in enumerate(different) if _same(each, other)) for each in windows]
        tables = zip(*map(_tables, different), strict=True)
        return cls(windows, [torch.from_numpy(np.concatenate(parts)).to(device) for parts in tables], offsets)

    def sample(self, batch_size: int, samplers: Sequence[np.random.Generator]) -> Batch:
        """Each run's own windows, drawn by its own sampler: (P, B, K, …)."""
        drawn = [windows.draw(batch_size, sampler) for windows, sampler in zip(self.windows, samplers, strict=True)]
        rows = np.stack([rows + offset for (rows, _), offset in zip(drawn, self.offsets, strict=True)])
        device = self.tables[0].device
        where, mask = torch.from_numpy(rows).to(device), torch.from_numpy(np.stack([mask for _, mask in drawn]))
        return Batch(*(*(table[where] for table in self.tables), mask.to(device)))


def _tables(windows: Windows) -> tuple[NDArray[Any], ...]:
    return windows.returns_to_go, windows.states, windows.actions, windows.timesteps


def _same(a: Windows, b: Windows) -> bool:
    return a is b or all(np.array_equal(one, other) for one, other in zip(_tables(a), _tables(b), strict=True))
