"""Where the offline data comes from: recorded here, or a template that names one dataset per task and quality."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Literal, Protocol

from dt.errors import UserError
from dt.files import expanded
from dt.tasks import get_task
from orchestrator.profiles import Profile
from orchestrator.recipes import Dataset, Imported, Quality, Recording

RECORDED = "recorded"
MINARI = "minari:"
SUFFIXES = (".hdf5", ".h5", ".pkl", ".pickle")
TargetReturn = float | Literal["best"]


class DataChoice(Protocol):
    """What an experiment asks of its data."""

    @property
    def name(self) -> str: ...

    def dataset(self, task: str, quality: Quality, profile: Profile) -> Dataset: ...

    def target_return(self, task: str) -> TargetReturn: ...

    def describe(self, profile: Profile) -> str: ...


@dataclass(frozen=True)
class Recorded:
    """Recorded here from the shipped behaviour policies; the return target is the data's best episode."""

    name = RECORDED

    def dataset(self, task: str, quality: Quality, profile: Profile) -> Recording:
        return Recording(task=task, quality=quality, episodes=profile.recorded_episodes, seed=profile.recording_seed)

    def target_return(self, task: str) -> TargetReturn:
        get_task(task)
        return "best"

    def describe(self, profile: Profile) -> str:
        return (
            f"recorded here from the shipped behaviour policies, {profile.recorded_episodes} episodes of each "
            "(medium-expert: of both); return target at evaluation: the best episode of the data."
        )


@dataclass(frozen=True)
class FromTemplate:
    """One dataset of others per task and quality, pinned by its content; the return target is the paper's."""

    template: str  # minari:mujoco/{task}/{quality}-v0, /data/{task}_{quality}-v2.hdf5 or .pkl
    root: Path | None = None  # of Minari datasets, before Minari's own

    @property
    def name(self) -> str:
        """The template in letters that a table's key may have."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.template).strip("-")

    def __post_init__(self) -> None:
        try:
            parsed = [parts for _, *parts in Formatter().parse(self.template) if parts[0] is not None]
        except ValueError as error:
            raise UserError(f"data {self.template!r} is not a template: {error}") from error
        fields = {str(name) for name, *_ in parsed}
        if odd := sorted(fields - {"task", "quality"}):
            asked = ", ".join(f"{{{name}}}" for name in odd)
            raise UserError(
                f"data {self.template!r} asks for {asked}: a template may name only {{task}} and {{quality}}"
            )
        if any(form or conversion for _, form, conversion in parsed):
            raise UserError(
                f"data {self.template!r} has ':' or '!' within braces: write {{task}} and {{quality}} as they are"
            )
        known = self.template.startswith(MINARI) or Path(self.template).suffix in SUFFIXES
        if not known:
            raise UserError(
                f"unknown data {self.template!r}: give '{RECORDED}', 'minari:mujoco/{{task}}/{{quality}}-v0' "
                "or a path to .hdf5 or .pkl files such as '/data/{task}_{quality}-v2.hdf5'"
            )
        if "task" not in fields:
            raise UserError(
                f"data {self.template!r} names one file for all tasks: write {{task}} where the task's name stands"
            )

    def dataset(self, task: str, quality: Quality, profile: Profile) -> Imported:
        del profile
        source = self._source(get_task(task).name, quality)
        content_hash = _content_hash(source, task, self.root)
        return Imported(task=task, source=source, quality=quality, content_hash=content_hash)

    def _source(self, task: str, quality: Quality) -> str:
        """What holds that quality. D4RL's files write medium_expert; where there is none, medium and expert make it."""
        from dt.data.sources import AND  # heavy: only where data of others is used

        def named(word: str) -> str:
            return self.template.format(task=task, quality=word)

        parts = quality.split("-")
        if self.template.startswith(MINARI):
            whole = len(parts) == 1 or not self.template.startswith(f"{MINARI}mujoco/")  # the hub has no medium-expert
            return AND.join(map(named, [quality] if whole else parts)).replace(MINARI, "")
        paths = {word: expanded(named(word)).absolute() for word in (quality, "_".join(parts), *parts)}
        if found := [path for word, path in paths.items() if word not in parts and path.is_file()]:
            return str(found[0])
        together = [paths[part] for part in parts]
        return AND.join(map(str, together)) if all(map(Path.is_file, together)) else str(paths[quality])

    def target_return(self, task: str) -> TargetReturn:
        return get_task(task).target_return

    def describe(self, profile: Profile) -> str:
        del profile
        return f"`{self.template}`; return target at evaluation: the paper's."


@cache
def _content_hash(source: str, task: str, root: Path | None) -> str:
    from dt.data.sources import load_imported

    return load_imported(source, task, root).content_hash


def choose_data(option: str, root: Path | None = None) -> DataChoice:
    """The meaning of `--data`. Raises UserError naming the forms that exist."""
    return Recorded() if option == RECORDED else FromTemplate(option, root)
