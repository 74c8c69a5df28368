"""The Decision Transformer (Chen et al. 2021) as the paper uses it: one trunk, one head per task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dt.data.trajectories import Trajectories
from dt.data.windows import Batch
from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.policy import Policy
from dt.model.trunk import LAYER_NORM_EPS, Trunk
from dt.tasks import Task, get_task

STATE_TOKENS = slice(
    1, None, 3
)  # tokens run (return-to-go, state, action) per time step; actions are read at the states


class Prediction(NamedTuple):
    """What the model made of a batch of windows."""

    actions: Tensor  # (B, K, A) in (−1, 1)
    embedded: Tensor  # (B, K, 3, d) the tokens after their layer norm, before the time step is added


class Head(nn.Module):
    """All whose shape belongs to a task: embeddings, their layer norm, the time-step table, the action predictor.

    Differs from the original: `predict_state` and `predict_return`, which no loss ever trains, are left out; the state
    statistics and the data's best return live here as buffers, so that a policy carries all that acting needs.
    """

    state_mean: Tensor
    state_std: Tensor
    best_return: Tensor

    def __init__(self, task: Task, width: int) -> None:
        super().__init__()
        self.embed_return = nn.Linear(1, width)
        self.embed_state = nn.Linear(task.state_dim, width)
        self.embed_action = nn.Linear(task.action_dim, width)
        self.embed_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.embed_timestep = nn.Embedding(task.horizon, width)
        self.predict_action = nn.Linear(width, task.action_dim)
        self.register_buffer("state_mean", torch.zeros(task.state_dim))
        self.register_buffer("state_std", torch.ones(task.state_dim))
        self.register_buffer("best_return", torch.tensor(task.target_return))

    def look_at(self, trajectories: Trajectories) -> None:
        """Take the state statistics and the best return of the data that is to be trained on."""
        self.state_mean.copy_(torch.from_numpy(np.array(trajectories.state_mean)))
        self.state_std.copy_(torch.from_numpy(np.array(trajectories.state_std)))
        self.aim_at(trajectories)

    def aim_at(self, trajectories: Trajectories) -> None:
        """Take the best return of the data alone: what is asked of the policy when it acts."""
        self.best_return.fill_(float(trajectories.returns.max()))

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and deviation (S,) by which states are normalised."""
        return self.state_mean.cpu().numpy(), self.state_std.cpu().numpy()

    def embed(self, batch: Batch) -> Tensor:
        """A batch of windows → normalised tokens (B, K, 3, d)."""
        modalities = (
            self.embed_return(batch.returns_to_go),
            self.embed_state(batch.states),
            self.embed_action(batch.actions),
        )
        embedded: Tensor = self.embed_ln(torch.stack(modalities, dim=2))
        return embedded

    def place(self, embedded: Tensor, timesteps: Tensor) -> Tensor:
        """Add the time steps (B, K): after the LayerNorm, unlike Chen et al. (B, K, 3, d) → tokens (B, 3K, d)."""
        placed: Tensor = embedded + self.embed_timestep(timesteps)[:, :, None]
        return placed.flatten(1, 2)

    def act(self, features: Tensor) -> Tensor:
        """Trunk output at state tokens (…, d) → actions (…, A) in (−1, 1)."""
        actions: Tensor = torch.tanh(self.predict_action(features))
        return actions


class DecisionTransformer(nn.Module):
    """A trunk and the heads of the tasks it serves. All heads are registered, so all of them train."""

    def __init__(self, architecture: Architecture, tasks: Iterable[Task], dropout: float = 0.0) -> None:
        super().__init__()
        self.architecture, self.dropout = architecture, dropout
        self.trunk = Trunk(architecture, dropout)
        self.heads = nn.ModuleDict({task.name: Head(task, architecture.width) for task in tasks})

    def head(self, task: str) -> Head:
        """The head of one task."""
        head = self.heads[task]
        assert isinstance(head, Head)
        return head

    def forward(self, task: str, batch: Batch) -> Tensor:
        """Windows of one task → the action predicted at each time step, (B, K, A)."""
        return self.predict(task, batch).actions

    def predict(self, task: str, batch: Batch) -> Prediction:
        """The same, with the embedded tokens."""
        head = self.head(task)
        embedded = head.embed(batch)
        tokens = F.dropout(head.place(embedded, batch.timesteps), self.dropout, self.training)
        features = self.trunk(tokens, batch.mask.repeat_interleave(3, dim=1), STATE_TOKENS)
        return Prediction(head.act(features), embedded)

    def policy(self) -> Policy:
        """A snapshot of the parameters, detached from further training."""

        def snapshot(module: nn.Module) -> dict[str, Tensor]:
            return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}

        return Policy(
            self.architecture, snapshot(self.trunk), {name: snapshot(head) for name, head in self.heads.items()}
        )

    @classmethod
    def from_policy(cls, policy: Policy, dropout: float = 0.0) -> DecisionTransformer:
        """A trainable model with the policy's parameters (copied). Its tasks must share one trunk."""
        if not policy.plain:
            raise UserError("tasks with trunk parameters or masks of their own do not train together: take one task")
        model = cls(policy.architecture, map(get_task, policy.heads), dropout)
        model.trunk.load_state_dict(dict(policy.trunk))
        for name, head in policy.heads.items():
            model.heads[name].load_state_dict(dict(head))
        return model
