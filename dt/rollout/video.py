"""A policy on film: one episode, rendered by MuJoCo, as an animated WebP that a browser or a README shows."""

from __future__ import annotations

import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
from PIL import Image

from dt.errors import UserError
from dt.files import write_atomically
from dt.model.policy import Policy
from dt.rollout.actor import Actor, Weights
from dt.rollout.evaluate import wanted_return
from dt.rollout.physics import make_environment
from dt.tasks import Task


def record_video(
    policy: Policy,
    task: Task,
    path: Path,
    *,
    seed: int = 0,
    steps: int = 300,
    every: int = 4,
    size: tuple[int, int] = (320, 240),
    target_return: float | Literal["best"] = "best",
) -> None:
    """Roll one episode out and write one frame in `every`, `size` (width, height) large, to `path` (.webp).

    Raises UserError where MuJoCo can make no OpenGL context (on Linux without a display it needs EGL or OSMesa).
    """
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # Gymnasium reads it when it first renders
    actor = Actor(Weights.of(policy, task, "float32"), 1)
    goal = wanted_return(policy, task, target_return)
    collected, frames = 0.0, []
    environment = make_environment(task.environment, render_mode="rgb_array", width=size[0], height=size[1])
    try:
        observation, _ = environment.reset(seed=seed)
        for step in range(min(steps, task.horizon)):
            if step % every == 0:
                frames.append(_render(environment))
            action = actor.act(
                torch.from_numpy(observation.astype(np.float32))[None],
                torch.tensor([(goal - collected) / task.return_scale]),
            )
            observation, reward, terminated, _, _ = environment.step(action[0].numpy())
            collected += float(reward)
            if terminated:
                break
        milliseconds = round(1000 * every * environment.unwrapped.dt)  # type: ignore[attr-defined]
    finally:
        environment.close()
    _write_webp(frames, path, milliseconds)


def _render(environment: gymnasium.Env[object, object]) -> Image.Image:
    try:
        return Image.fromarray(np.asarray(environment.render()))
    except Exception as error:  # MuJoCo's GL back-ends raise whatever they like
        raise UserError(
            f"MuJoCo cannot render here ({error}): install EGL (Debian: libegl1) or set MUJOCO_GL=osmesa or glfw"
        ) from error


def _write_webp(frames: list[Image.Image], path: Path, milliseconds: int) -> None:
    buffer = BytesIO()
    frames[0].save(
        buffer, format="WEBP", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, quality=70
    )
    write_atomically(path, buffer.getvalue())
