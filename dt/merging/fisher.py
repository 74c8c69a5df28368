"""Fisher information of a policy's trunk (eq. 3): how much each parameter matters to the actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dt.data.trajectories import Trajectories
from dt.data.windows import Batch, Windows
from dt.errors import UserError, unknown
from dt.files import opened, write_atomically
from dt.merging.merge import Fisher
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy
from dt.tasks import get_task
from dt.training.objective import action_loss, windows_of

FORMAT = "mergedt-fisher-1"
AT_ONCE = 2**26  # entries of the samples' gradients that are in memory at a time (256 MiB)

Variant = Literal["batch", "empirical", "exact"]


def estimate(
    policy: Policy,
    data: Mapping[str, Trajectories],
    *,
    variant: Variant,
    batches: int,
    batch_size: int,
    seed: int,
    device: str = "cpu",
) -> Fisher:
    """Diagonal Fisher information of every trunk parameter, float32, ≥ 0, in the parameter's shape.

    data: task → trajectories of which `batches` times `batch_size` windows are drawn; of several tasks the mean of
    their Fishers (Table V). The policy counts as a Gaussian of variance 1 around the action μ that it predicts at each
    real time step of a window, given the data's states, returns and earlier actions. Three readings of eq. 3:

    batch: the original's. Σ over batches of (∇ mean squared error of the batch)², by the number of real time steps in
    all batches. Signs cancel within a batch before they are squared, so it shrinks as batches grow.
    empirical: mean over windows of (∇ log p(a))² at the data's actions a.
    exact: the same in expectation over actions that the policy draws itself, which is the sum over time steps and
    action dimensions of (∇ μ)². Without bias from one draw a window: μ ± 1 in each dimension has mean and variance of
    N(μ, 1), so the same expectation of the square, with less noise. The sum itself would take K·A times as long.

    Differs from the original: no dropout, seeded, and the final layer norm has a Fisher, too. Raises UserError for no
    data, no batches or windows, data of another shape than its task's, a task without a head, or tasks that do not
    share one trunk.
    """
    if variant not in get_args(Variant):
        raise unknown("Fisher variant", variant, get_args(Variant))
    if not data:
        raise UserError("a Fisher is estimated on data: name at least one task's")
    if batches < 1 or batch_size < 1:
        raise UserError(f"a Fisher is estimated on windows: {batches} batches of {batch_size} windows are none")
    model = DecisionTransformer.from_policy(policy).eval().requires_grad_(False).to(device)
    fishers = []
    for name, trajectories in data.items():
        task = get_task(name)
        windows = windows_of(task, trajectories.validate(task), policy.alone(name))
        rng = np.random.Generator(np.random.PCG64(seed))  # afresh, so that a task's Fisher depends on no other task
        fishers.append(_of_task(model, name, windows, variant, batches, batch_size, rng))
    return {name: torch.stack([fisher[name] for fisher in fishers]).mean(dim=0).float().cpu() for name in policy.trunk}


def _of_task(
    model: DecisionTransformer,
    task: str,
    windows: Windows,
    variant: Variant,
    batches: int,
    batch_size: int,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    parameters = {f"trunk.{name}": parameter for name, parameter in model.trunk.named_parameters()}
    device = next(model.parameters()).device

    def loss(parameters: Mapping[str, Tensor], targets: Tensor, *window: Tensor) -> Tensor:
        batch = Batch(*window)
        predicted: Tensor = functional_call(model, dict(parameters), (task, batch))
        if variant == "batch":
            return action_loss(predicted, batch)
        return ((predicted - targets).square() * batch.mask[..., None]).sum() / 2  # −log p but for a constant

    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    count = 0
    for _ in range(batches):
        batch = windows.sample(batch_size, rng, device)
        targets = _drawn(model(task, batch), rng) if variant == "exact" else batch.actions
        together = batch_size if variant == "batch" else 1
        samples = [part.reshape(-1, together, *part.shape[1:]) for part in (targets, *batch)]
        for name, squares in squared_gradients(loss, parameters, samples).items():
            total[name] += squares
        count += int(batch.mask.sum()) if variant == "batch" else batch_size
    return {name.removeprefix("trunk."): squares / count for name, squares in total.items()}


def _drawn(mean: Tensor, rng: np.random.Generator) -> Tensor:
    """Actions of variance 1 around `mean`: one above or below it, at even odds."""
    return mean + torch.from_numpy(rng.choice(np.array([-1, 1], np.float32), size=mean.shape)).to(mean.device)


def squared_gradients(
    function: Callable[..., Tensor], parameters: Mapping[str, Tensor], samples: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Σ over samples of (∂ function(parameters, *sample) / ∂ parameters)², entry by entry, summed in float64.

    samples: tensors whose first axis runs over the samples; `function` gets a sample without that axis, returns ().
    """
    gradients = vmap(grad(function), in_dims=(None, *(0 for _ in samples)))
    at_once = max(1, AT_ONCE // sum(parameter.numel() for parameter in parameters.values()))
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    for part in zip(*(torch.split(sample, at_once) for sample in samples), strict=True):
        for name, each in gradients(dict(parameters), *part).items():
            total[name] += each.square().sum(dim=0, dtype=torch.float64)
    return total


def trace_normalised(fisher: Fisher) -> Fisher:
    """Divided by its sum over the blocks (`h.…`), so that policies with large gradients do not outvote others (§III-A).

    A Fisher that is 0 in all blocks comes back as it is.
    """
    trace = sum(float(tensor.sum(dtype=torch.float64)) for name, tensor in fisher.items() if name.startswith("h."))
    return {name: (tensor.double() / trace).float() for name, tensor in fisher.items()} if trace else fisher


def save_fisher(fisher: Fisher, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write as safetensors with `metadata` in the header, atomically."""
    tensors = {name: tensor.contiguous() for name, tensor in fisher.items()}
    write_atomically(path, save(tensors, {"format": FORMAT, **(metadata or {})}))


def load_fisher(path: Path) -> Fisher:
    """Read what `save_fisher` wrote. Raises UserError on a missing, truncated or foreign file."""
    with opened(path, "Fisher", FORMAT) as (_, tensors):
        return tensors
