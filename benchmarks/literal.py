"""The field's way, as the original code does it: windows assembled one by one, float32, one environment at batch 1.

Written anew from its description, not copied; the trunk is `transformers`' GPT-2.
"""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from dt.data.trajectories import Trajectories
from dt.files import under
from dt.model.architecture import Architecture
from dt.model.policy import STATISTICS, Policy
from dt.tasks import Task

SCALE, CONTEXT, HORIZON = 1000.0, 20, 1000


class LiteralModel(nn.Module):
    """A Decision Transformer around Hugging Face's GPT-2."""

    def __init__(self, task: Task, architecture: Architecture) -> None:
        super().__init__()
        d = architecture.width
        config = GPT2Config(
            vocab_size=1, n_embd=d, n_layer=architecture.layers, n_head=architecture.heads,
            activation_function=architecture.activation, n_positions=1024,
        )  # fmt: skip
        self.trunk = GPT2Model(config)
        nn.init.zeros_(self.trunk.wpe.weight)  # the original never adds it
        self.embed_timestep = nn.Embedding(HORIZON, d)
        self.embed_return, self.embed_state = nn.Linear(1, d), nn.Linear(task.state_dim, d)
        self.embed_action, self.embed_ln = nn.Linear(task.action_dim, d), nn.LayerNorm(d)
        self.predict_action = nn.Sequential(nn.Linear(d, task.action_dim), nn.Tanh())

    @classmethod
    def of(cls, policy: Policy, task: Task) -> LiteralModel:
        """One with the weights of one of our policies: the names are GPT-2's and our head's."""
        model = cls(task, policy.architecture)
        head = {name: tensor for name, tensor in policy.heads[task.name].items() if name not in STATISTICS}
        state = {f"trunk.{name}": tensor for name, tensor in policy.trunk.items()} | head
        named = {name.replace("predict_action.", "predict_action.0."): tensor for name, tensor in state.items()}
        unused = {"trunk.wte.weight", "trunk.wpe.weight"}
        assert set(model.load_state_dict(named, strict=False).missing_keys) == unused
        return model

    def forward(self, states: Tensor, actions: Tensor, rtg: Tensor, timesteps: Tensor, mask: Tensor) -> Tensor:
        """(B, K, ·) → (B, K, A)."""
        batch, steps = states.shape[:2]
        parts = (self.embed_return(rtg), self.embed_state(states), self.embed_action(actions))
        tokens = self.embed_ln(torch.stack(parts, dim=1).permute(0, 2, 1, 3).reshape(batch, 3 * steps, -1))
        times = self.embed_timestep(timesteps).repeat_interleave(3, dim=1)
        attention = mask.repeat_interleave(3, dim=1)
        out = self.trunk(inputs_embeds=tokens + times, attention_mask=attention).last_hidden_state
        predicted: Tensor = self.predict_action(out.reshape(batch, steps, 3, -1)[:, :, 1])
        return predicted


class LiteralTraining:
    """One update at a time: a batch of 64 windows built sample by sample."""

    def __init__(self, task: Task, data: Trajectories, architecture: Architecture, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = LiteralModel(task, architecture)
        self._task, self._architecture = task, architecture
        self._rng, self._data, self.steps = np.random.default_rng(seed), data, 0
        self._optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-4)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, lambda step: min((step + 1) / 10_000, 1))
        self._episodes = [slice(a, b) for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)]
        self._mean, self._std = data.state_mean, data.state_std

    def step(self) -> None:
        """Sample, forward, backward, clip, update."""
        self.model.train()
        states, actions, rtg, timesteps, mask = self._batch(64)
        predicted = self.model(states, actions, rtg, timesteps, mask)
        loss = ((predicted[mask > 0] - actions[mask > 0]) ** 2).mean()
        self._optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.25)
        self._optimiser.step()
        self._schedule.step()
        loss.item()
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for dropout's random numbers."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return parts | {"steps": self.steps, "sampler": json.dumps(self._rng.bit_generator.state)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.steps, self._rng.bit_generator.state = state["steps"], json.loads(state["sampler"])

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimiser": self._optimiser, "schedule": self._schedule}

    def policy(self) -> Policy:
        """What has been trained so far as one of our policies."""
        state = {name.replace("predict_action.0.", "predict_action."): t for name, t in self.model.state_dict().items()}
        trunk = {name: tensor.clone() for name, tensor in under("trunk.", state).items() if name != "wpe.weight"}
        head = {name: tensor.clone() for name, tensor in state.items() if not name.startswith("trunk.")}
        statistics = {"state_mean": torch.from_numpy(self._mean), "state_std": torch.from_numpy(self._std)}
        best = torch.tensor(float(self._data.returns.max()))
        trunk.pop("wte.weight")  # nor does the original use it
        return Policy(self._architecture, trunk, {self._task.name: {**head, **statistics, "best_return": best}})

    def _batch(self, size: int) -> tuple[Tensor, ...]:
        lengths = np.array([episode.stop - episode.start for episode in self._episodes])
        chosen = self._rng.choice(len(lengths), size=size, replace=True, p=lengths / lengths.sum())
        columns: tuple[list[NDArray[np.float32]], ...] = ([], [], [], [], [])
        for index in chosen:
            episode = self._episodes[index]
            start = self._rng.integers(lengths[index])
            stop = min(start + CONTEXT, lengths[index])
            count, here = stop - start, slice(episode.start + start, episode.start + stop)
            states = (self._data.observations[here] - self._mean) / self._std
            rewards = self._data.rewards[episode.start + start : episode.stop]
            rtg = np.array([rewards[i:].sum() for i in range(count)], dtype=np.float32)[:, None] / SCALE
            parts = (states, self._data.actions[here], rtg, np.arange(start, stop)[:, None], np.ones((count, 1)))
            for column, part in zip(columns, parts, strict=True):
                padding = np.zeros((CONTEXT - count, part.shape[1]))
                column.append(np.concatenate([padding, part]).astype(np.float32)[None])
        batch = [torch.from_numpy(np.concatenate(column)) for column in columns]
        return batch[0], batch[1], batch[2], batch[3][..., 0].long().clamp(max=HORIZON - 1), batch[4][..., 0]


class LiteralEvaluation:
    """One environment, one action at a time."""

    def __init__(self, task: Task, policy: Policy) -> None:
        """With the weights, the state statistics and the best return of one of our policies."""
        head = policy.heads[task.name]
        self._task, self._model = task, LiteralModel.of(policy, task).eval()
        self._mean, self._std = head["state_mean"].numpy(), head["state_std"].numpy()
        self._wanted = float(head["best_return"])
        self._environment = gymnasium.make(task.environment)

    @torch.no_grad()
    def episode(self, seed: int, steps: int = HORIZON) -> float:
        """The undiscounted return of one episode, or of its first steps."""
        observation, _ = self._environment.reset(seed=seed)
        history: deque[tuple[Tensor, Tensor, Tensor, int]] = deque(maxlen=CONTEXT)
        wanted = self._wanted
        for time in range(steps):
            state = torch.from_numpy((observation - self._mean) / self._std).float()
            history.append((state, torch.zeros(self._task.action_dim), torch.tensor([wanted / SCALE]), time))
            states, actions, rtg, times = zip(*history, strict=True)
            predicted = self._model(
                torch.stack(states)[None], torch.stack(actions)[None], torch.stack(rtg)[None].float(),
                torch.tensor(times)[None].clamp(max=HORIZON - 1), torch.ones(1, len(times)),
            )  # fmt: skip
            action = predicted[0, -1]
            history[-1] = (history[-1][0], action, *history[-1][2:])
            observation, reward, terminated, truncated, _ = self._environment.step(action.numpy())
            wanted -= float(reward)
            if terminated or truncated:
                break
        return self._wanted - wanted
