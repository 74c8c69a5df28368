"""HarmoDT (Hu et al. 2024): one trunk trained jointly, of which every task uses its own part.

A task runs with θ⊙M. Its mask M, of fixed size, begins random; every so often the weights on which the task is at odds
with the others leave it, and masked ones on which they agree enter. θ stays dense: a weight that one task masks is
trained by those that keep it. Differs from the release: no prompts, since every task has a head of its own, which says
all that a prompt would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from dt.data.trajectories import Trajectories
from dt.data.windows import Windows
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.flat import flattened, unflattened
from dt.model.policy import Policy
from dt.tasks import get_task
from dt.training import masks
from dt.training.harmony import Harmony
from dt.training.loop import TrainingState, in_precision
from dt.training.objective import action_loss, begun, fresh_model
from dt.training.optimisation import Optimisation


def swap_count(harmony: Harmony, step: int, steps: int, entries: int) -> int:
    """k_t: entries that each task swaps after `step` of `steps` updates, out of `entries`; mostly none are due.

    The largest k, that of the released code for its trunk and steps (100), follows from the share that the whole run is
    to swap: both schedules average half of it.
    """
    if harmony.importance == "random" or step % harmony.interval:
        return 0
    largest = 2 * harmony.swapped * entries / (steps / harmony.interval)
    if harmony.schedule == "bump":
        return int(largest * (1 - math.cos(2 * math.pi * step / steps)) / 2)
    return int(largest * (1 + math.cos(math.pi * step / steps)) / 2)


def worth(harmony: Harmony, gradients: Tensor, weights: Tensor) -> Tensor:
    """λ·agreement + importance of the weights that tasks keep: masked gradients (N, E), weights (E,) → (N, E)."""
    importance = weights.abs() if harmony.importance == "magnitude" else gradients.square()
    return harmony.agreement_weight * masks.agreement(gradients) + importance


class HarmonyObjective:
    """The action error of one task per update, in turn, on the part of the trunk that the task keeps.

    After the update all entries that the task masks are what they were before it; other tasks' heads get no gradient
    and so do not move. The optimiser's moments are shared, as in the release.
    """

    def __init__(
        self,
        model: DecisionTransformer,
        windows: Mapping[str, Windows],
        optimisation: Optimisation,
        harmony: Harmony,
        kept: Tensor,
    ) -> None:
        """kept: masks (N, E) bool to begin with, tasks in the order of `windows`."""
        self._model, self._windows, self._optimisation, self._harmony = model, windows, optimisation, harmony
        self._tasks = tuple(windows)
        self._shapes = {f"trunk.{name}": shape for name, shape in masks.masked_shapes(model.architecture).items()}
        self._module = _Masked(model, kept)
        self._before: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        """The tasks."""
        return " and ".join(self._tasks)

    @property
    def module(self) -> nn.Module:
        """The model and the masks."""
        return self._module

    def backward(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:
        """One batch of the task whose turn it is. A gradient clipped before the mask passes the loop's clipping."""
        task = self._task(step)
        loss, gradients = self._gradients(task, rng)
        if self._harmony.clip == "dense":
            gradients = _clipped(gradients, self._optimisation.clip_norm)
        kept = self._kept(task)
        gradients |= {name: gradients[name] * mask for name, mask in kept.items()}
        parameters = self._parameters(task)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        self._before = {name: parameters[name].detach().clone() for name in kept}
        return {"loss": loss}

    def updated(self, step: int, rng: np.random.Generator) -> None:
        """Undo what weight decay and momentum did to masked entries; swap entries of the masks if it is time."""
        task = self._task(step)
        parameters = self._parameters(task)
        with torch.no_grad():
            for name, mask in self._kept(task).items():
                parameters[name].copy_(torch.where(mask, parameters[name], self._before[name]))
        kept = self._module.kept
        count = swap_count(self._harmony, step + 1, self._optimisation.steps, kept.shape[1])
        if count and (count := min(count, masks.swappable(kept))):
            self._swap(count, rng)

    def result(self) -> Policy:
        """The policy as it stands: dense trunk, heads and masks."""
        shapes = masks.masked_shapes(self._model.architecture)
        kept = zip(self._tasks, self._module.kept.cpu().clone(), strict=True)
        return replace(self._model.policy(), masks={task: unflattened(flat, shapes) for task, flat in kept})

    def diagnostics(self) -> dict[str, float]:
        """`masks.mask_statistics` and their mean `mask_overlap`; of the last swap, missing before the first one:
        `swapped`, the k_t entries that each task exchanged, and `negative_agreement/<task>`, the share of its kept
        entries at odds with the others, whose mean is `at_odds`.
        """
        found = masks.mask_statistics(self.result())
        overlaps = [value for name, value in found.items() if name.startswith("iou/")]
        found |= {"mask_overlap": fmean(overlaps)} if overlaps else {}
        if not (count := int(self._module.swapped)):
            return found
        negative = self._module.negative.tolist()
        of_tasks = {f"negative_agreement/{task}": share for task, share in zip(self._tasks, negative, strict=True)}
        return found | {"swapped": count, "at_odds": fmean(negative)} | of_tasks

    def _task(self, step: int) -> str:
        return self._tasks[step % len(self._tasks)]

    def _parameters(self, task: str) -> dict[str, Parameter]:
        own = ("trunk.", f"heads.{task}.")
        return {name: parameter for name, parameter in self._model.named_parameters() if name.startswith(own)}

    def _kept(self, task: str) -> dict[str, Tensor]:
        return unflattened(self._module.kept[self._tasks.index(task)], self._shapes)

    def _gradients(self, task: str, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on a fresh batch, and by parameter its gradient at what the task sees: not zero where that is masked."""
        parameters = self._parameters(task)
        seen: dict[str, Tensor] = {**parameters}
        for name, mask in self._kept(task).items():
            seen[name] = (parameters[name].detach() * mask).requires_grad_()
        device = self._module.kept.device
        batch = self._windows[task].sample(self._optimisation.batch_size, rng, device)
        with in_precision(self._optimisation, device):
            loss = action_loss(functional_call(self._model, seen, (task, batch)), batch)
        return loss.detach(), dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))

    def _swap(self, count: int, rng: np.random.Generator) -> None:
        kept = self._module.kept
        self._model.train(self._harmony.scoring == "training")
        dense = torch.stack([self._mean_gradient(task, rng) for task in self._tasks])
        self._model.train()
        masked = dense * kept  # what moves a weight; to take one up, what would move it counts instead
        weights = flattened({name: p.detach() for name, p in self._model.named_parameters()}, self._shapes)
        at_odds = (masks.agreement(masked) < 0).sum(dim=1) / kept.sum(dim=1)  # a masked entry's agreement is 0
        self._module.negative.copy_(at_odds)
        self._module.swapped.fill_(count)
        kept.copy_(masks.swapped(kept, worth(self._harmony, masked, weights), masks.agreement(dense), count))

    def _mean_gradient(self, task: str, rng: np.random.Generator) -> Tensor:
        """(E,) over the batches that are scored."""
        total = torch.zeros(self._module.kept.shape[1], device=self._module.kept.device)
        for _ in range(self._harmony.score_batches):
            _, gradients = self._gradients(task, rng)
            if self._harmony.scoring == "training":
                gradients = _clipped(gradients, self._optimisation.clip_norm)
            total += flattened(gradients, self._shapes)
        return total / self._harmony.score_batches


class _Masked(nn.Module):
    """What a training state saves: the model, and as buffers what the swaps leave behind."""

    kept: Tensor  # (N, E) bool
    negative: Tensor  # (N,) share of kept entries at odds with the others at the last swap
    swapped: Tensor  # () entries that each task exchanged then; 0 before the first

    def __init__(self, model: DecisionTransformer, kept: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("kept", kept)
        self.register_buffer("negative", torch.zeros(kept.shape[:1]))
        self.register_buffer("swapped", torch.zeros((), dtype=torch.int64))


def _clipped(gradients: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    scale = (limit / (get_total_norm(list(gradients.values())) + 1e-6)).clamp(max=1)
    return {name: gradient * scale for name, gradient in gradients.items()}


def train_harmodt(
    data: Mapping[str, Trajectories],
    architecture: Architecture,
    optimisation: Optimisation,
    harmony: Harmony,
    seed: int,
    *,
    identity: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> TrainingState[Policy]:
    """Joint training with masks from scratch, for `loop.run`; the result has a dense trunk, all heads and the masks.

    data: task → trajectories, in the order of the tasks' turns. Every step is one task's, so `optimisation.steps` (and
    the warm-up, and the harmony's interval) count all tasks' steps together. The parameters begin as `train` lets them
    begin with the same seed. Raises UserError for data of another shape than its task's.
    """
    tasks = [get_task(name) for name in data]
    for task in tasks:
        data[task.name].validate(task)
    model = fresh_model(tasks, architecture, optimisation, seed)
    for task in tasks:
        model.head(task.name).look_at(data[task.name])
    kept = masks.drawn(masks.masked_shapes(architecture), harmony.sparsity, len(tasks), seed)

    def objective(windows: Mapping[str, Windows]) -> HarmonyObjective:
        return HarmonyObjective(model, windows, optimisation, harmony, kept)

    described = {"harmony": harmony.model_dump_json(), **(identity or {})}
    return begun(model, data, optimisation, seed, objective, described, device)
