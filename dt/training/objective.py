"""The Decision Transformer's own objective: the action error of one task or several, and losses added to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dt.data.trajectories import Trajectories
from dt.data.windows import Batch, Windows
from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer, Prediction
from dt.model.policy import Policy
from dt.model.shapes import trunk_shapes
from dt.tasks import Task, get_task
from dt.training.loop import Objective, TrainingState, in_precision, initialised
from dt.training.optimisation import Optimisation


class Auxiliary(Protocol):
    """A loss added to the action error (eq. 5). Must be an `nn.Module`: what it learns or keeps is saved with it."""

    name: str  # of its column among the metrics

    def weight(self, step: int) -> float:
        """λ at update number `step`; at 0 the loss is not computed."""
        ...

    def loss(
        self, model: DecisionTransformer, seen: Mapping[str, tuple[Batch, Prediction]], rng: np.random.Generator
    ) -> Tensor:
        """A scalar, from the tasks' batches and what the model made of them; what more it needs it draws with `rng`."""
        ...


def action_loss(predicted: Tensor, batch: Batch) -> Tensor:
    """Mean squared error over real time steps and action dimensions; padding counts for nothing. (B, K, A) → ()."""
    squared = F.mse_loss(predicted, batch.actions, reduction="none").sum(dim=-1)
    return (squared * batch.mask).sum() / (batch.mask.sum() * batch.actions.shape[-1])


class ActionObjective:
    """Sum over the tasks of the action error on a batch each, plus weighted auxiliary losses, in one backward pass."""

    def __init__(
        self,
        model: DecisionTransformer,
        windows: Mapping[str, Windows],
        optimisation: Optimisation,
        auxiliaries: Sequence[Auxiliary] = (),
    ) -> None:
        self.model, self.windows, self.auxiliaries = model, windows, tuple(auxiliaries)
        self._optimisation = optimisation
        self._module = nn.ModuleDict(
            {"model": model, "auxiliaries": nn.ModuleList(cast(nn.Module, each) for each in auxiliaries)}
        )

    @property
    def name(self) -> str:
        """The tasks."""
        return " and ".join(self.windows)

    @property
    def module(self) -> nn.Module:
        """The model, and what auxiliary losses learn."""
        return self._module

    def backward(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """One batch of each task."""
        device = next(self.model.parameters()).device
        with in_precision(self._optimisation, device):
            seen: dict[str, tuple[Batch, Prediction]] = {}
            for task, windows in self.windows.items():
                batch = windows.sample(self._optimisation.batch_size, rng, device)
                seen[task] = batch, self.model.predict(task, batch)
            actions = {task: action_loss(prediction.actions, batch) for task, (batch, prediction) in seen.items()}
            loss = _sum(actions.values())
            parts = {f"loss_{task}": part for task, part in actions.items()} if len(actions) > 1 else {}
            for auxiliary in self.auxiliaries:
                weight = auxiliary.weight(step)
                if weight:
                    parts[auxiliary.name] = auxiliary.loss(self.model, seen, rng)
                    loss = loss + weight * parts[auxiliary.name]
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}}

    def updated(self, step: int, rng: np.random.Generator) -> None:
        """Nothing."""

    def diagnostics(self) -> Mapping[str, float]:
        """None."""
        return {}

    def result(self) -> Policy:
        """The policy as it stands."""
        return self.model.policy()


def train(
    data: Mapping[str, Trajectories],
    architecture: Architecture,
    optimisation: Optimisation,
    seed: int,
    *,
    trunk: Mapping[str, Tensor] | None = None,
    timesteps: Tensor | None = None,
    auxiliaries: Sequence[Auxiliary] = (),
    identity: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> TrainingState[Policy]:
    """Training from scratch, for `loop.run`: one task's policy, or that of several tasks jointly (a head for each).

    data: task → trajectories. trunk, timesteps (at least horizon, d): begin with a language model's blocks and
    position table instead of random ones. Raises UserError for data of another shape than its task's.
    """
    tasks = [get_task(name) for name in data]
    for task in tasks:
        data[task.name].validate(task)
    model = fresh_model(tasks, architecture, optimisation, seed)
    if trunk is not None:
        for name, shape in trunk_shapes(architecture).items():
            if name not in trunk or tuple(trunk[name].shape) != shape:
                raise UserError(f"the trunk to begin with does not fit {architecture}: {name!r} is missing or differs")
        model.trunk.load_state_dict(dict(trunk))
    for task in tasks:
        head = model.head(task.name)
        if timesteps is not None:
            if tuple(timesteps[: task.horizon].shape) != head.embed_timestep.weight.shape:
                raise UserError(
                    f"the time steps to begin with are {tuple(timesteps.shape)}: {task.name} wants {task.horizon} of "
                    f"{architecture.width}"
                )
            with torch.no_grad():
                head.embed_timestep.weight.copy_(timesteps[: task.horizon])
        head.look_at(data[task.name])
    objective = partial(ActionObjective, model, optimisation=optimisation, auxiliaries=auxiliaries)
    return begun(model, data, optimisation, seed, objective, identity or {}, device)


def fresh_model(
    tasks: Sequence[Task], architecture: Architecture, optimisation: Optimisation, seed: int
) -> DecisionTransformer:
    """A model as training begins it from a seed."""
    model = initialised(seed, lambda: DecisionTransformer(architecture, tasks, optimisation.dropout))
    if optimisation.timestep_std is not None:
        with torch.no_grad():
            for task in tasks:
                model.head(task.name).embed_timestep.weight.mul_(optimisation.timestep_std)
    return model


def fine_tune(
    policy: Policy,
    data: Mapping[str, Trajectories],
    optimisation: Optimisation,
    seed: int,
    *,
    frozen: Collection[str] = (),
    auxiliaries: Sequence[Auxiliary] = (),
    identity: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> TrainingState[Policy]:
    """Further training of a policy on some of its tasks, for `loop.run`; all else of it stays bit for bit.

    frozen: flat names of parameters (`trunk.h.0.ln_1.weight`, `heads.hopper.embed_timestep.weight`) that stay, too.
    identity: what else must be the same for a saved state to continue this run: where it starts, say, and by which
    auxiliary losses.
    Optimiser state and schedule begin afresh, as in the original. Differs from it: state statistics stay the policy's
    own, whatever it is tuned on (as the original does in effect for Table V, by a file of older statistics), while the
    return asked for becomes the new data's.
    """
    for name in data:
        policy.check_head(name)
        data[name].validate(get_task(name))
    model = DecisionTransformer.from_policy(policy, optimisation.dropout)
    for name in data:
        model.head(name).aim_at(data[name])
    parameters = dict(model.named_parameters())
    unknown = sorted(set(frozen) - set(parameters))
    if unknown:
        raise UserError(f"cannot freeze {unknown[0]!r}: the policy has no such parameter")
    idle = {name for name in parameters if name.startswith("heads.") and name.split(".")[1] not in data}
    for name in idle.union(frozen):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("nothing is left to fine-tune: all parameters are frozen")
    objective = partial(ActionObjective, model, optimisation=optimisation, auxiliaries=auxiliaries)
    return begun(model, data, optimisation, seed, objective, identity or {}, device)


def begun(
    model: DecisionTransformer,
    data: Mapping[str, Trajectories],
    optimisation: Optimisation,
    seed: int,
    objective_of: Callable[[Mapping[str, Windows]], Objective[Policy]],
    identity: Mapping[str, str],
    device: str,
) -> TrainingState[Policy]:
    """A model's training at its first step. objective_of: what to train it by, given the windows of its data.

    Raises UserError for no data.
    """
    if not data:
        raise UserError("training takes the data of at least one task")
    windows = {
        name: Windows.of(trajectories, get_task(name), model.architecture.context, model.head(name).statistics())
        for name, trajectories in data.items()
    }
    objective = objective_of(windows)
    objective.module.to(device)
    described = {
        "tasks": "+".join(data),
        "data": "+".join(trajectories.content_hash for trajectories in data.values()),
        "architecture": model.architecture.model_dump_json(),
        **identity,
    }
    return TrainingState(objective, optimisation, seed, described, device)


def _sum(losses: Collection[Tensor]) -> Tensor:
    first, *others = losses
    for other in others:
        first = first + other
    return first


def windows_of(task: Task, trajectories: Trajectories, policy: Policy) -> Windows:
    """The trajectories as that policy sees them: its context, its state statistics."""
    head = policy.heads[task.name]
    statistics = head["state_mean"].numpy(), head["state_std"].numpy()
    return Windows.of(trajectories, task, policy.architecture.context, statistics)
