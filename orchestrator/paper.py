"""The numbers the paper prints, so that a comparison is a join (Lawson & Qureshi, arXiv 2303.07551 v3, Tables I to V).

Figures 2 and 3 have no printed numbers; what the text says of them is in the claims of `experiments/`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ALL_TASKS = "both"  # in the place of a task, of what belongs to a configuration


@dataclass(frozen=True)
class PaperNumber:
    """One printed value. Fields are the columns of the table `paper`."""

    experiment: str
    task: str
    dataset: str | None
    configuration: str
    metric: str
    value: float
    standard_error: float | None = None


_ATTENTION = ("original", "random", "identity", "removed")
_TABLE_1: Mapping[tuple[str, str], tuple[float, ...]] = {
    ("medium-expert", "halfcheetah"): (88.6, 41.0, 41.2, 41.5),
    ("medium-expert", "hopper"): (108.3, 77.2, 66.8, 74.1),
    ("medium-expert", "walker2d"): (109.4, 84.6, 82.6, 86.9),
    ("medium", "halfcheetah"): (40.4, 40.3, 39.7, 40.8),
    ("medium", "hopper"): (76.4, 52.2, 52.6, 52.2),
    ("medium", "walker2d"): (75.3, 74.1, 76.2, 74.3),
    ("expert", "halfcheetah"): (89.9, 90.1, 89.9, 90.1),
    ("expert", "hopper"): (108.8, 67.1, 67.9, 68.8),
    ("expert", "walker2d"): (109.4, 109.7, 109.8, 109.8),
}

# Percent of the original return of hopper and of halfcheetah; size of the trunk in percent.
_TABLE_2: Mapping[str, tuple[float, float, float]] = {
    "original": (100, 100, 200),
    "frozen from hopper": (100, 3, 100),
    "frozen from halfcheetah": (48, 100, 100),
    "trunk, merge-freeze-finetune": (61, 86, 100),
    "attention+mlp, merge-freeze-finetune": (90, 98, 100.26),
    "attention, merge-freeze-finetune": (101, 101, 166.82),
    "attention, merged": (79, 98, 166.82),
}

_INITIALISATION = ("ChibiT", "ChibiT_CO", "ChibiT_R", "random", "multi-task", "single-task")
_TABLE_3: Mapping[tuple[str, str], tuple[tuple[float, float | None], ...]] = {
    ("medium", "halfcheetah"): ((39.9, 0.3), (39.9, 0.3), (41.2, 0.2), (33.8, 0.5), (38.7, 0.4), (42.6, None)),
    ("medium", "hopper"): ((59.4, 0.9), (55.4, 0.4), (56.8, 0.4), (58.0, 0.8), (61.1, 4.1), (67.6, None)),
    ("medium", "walker2d"): ((81.3, 0.3), (77.6, 0.9), (79.2, 0.6), (82.2, 0.0), (75.4, 1.0), (74.0, None)),
    ("medium-expert", "halfcheetah"): ((47.4, 0.5), (40.1, 1.0), (39.3, 0.1), (35.4, 1.0), (36.4, 0.2), (82.2, None)),
    ("medium-expert", "hopper"): ((49.4, 3.1), (41.0, 1.2), (71.5, 3.3), (47.7, 1.8), (91.5, 1.7), (109.1, None)),
    ("medium-expert", "walker2d"): ((101.9, 0.0), (94.9, 2.2), (98.6, 5.5), (83.6, 2.2), (106.9, 1.0), (107.9, None)),
}

_TABLE_4: Mapping[str, tuple[tuple[float, float], ...]] = {  # after merge-freeze-finetune, before
    "halfcheetah": ((39.3, 89.5), (42.6, 89.5), (84.0, 89.9), (87.2, 89.9)),
    "hopper": ((71.5, 106.9), (77.2, 106.9), (84.1, 106.6), (88.3, 106.6)),
    "walker2d": ((98.6, 109.3), (103.3, 109.3), (109.0, 107.8), (109.4, 107.8)),
}
_TABLE_4_SINGLE = {"halfcheetah": 82.2, "hopper": 109.1, "walker2d": 107.9}
_MERGES = ("ChibiT_R, mean", "ChibiT_R, Fisher", "GPT2_R, mean", "GPT2_R, Fisher")

_TABLE_5: Mapping[str, tuple[tuple[float, float], ...]] = {  # hopper, halfcheetah, walker2d
    "multi-task on medium": ((72.0, 1.9), (39.9, 0.1), (74.9, 0.9)),
    "finetuned experts": ((108.3, 1.4), (70.5, 0.3), (108.8, 0.2)),
    "mean": ((60.2, 3.2), (43.7, 0.9), (70.4, 7.8)),
    "Fisher": ((84.3, 2.8), (45.5, 0.6), (99.0, 1.2)),
}


def _numbers() -> Iterator[PaperNumber]:
    for (dataset, task), scores in _TABLE_1.items():
        for attention, score in zip(_ATTENTION, scores, strict=True):
            yield PaperNumber("table_1", task, dataset, attention, "score", score)
    for configuration, (hopper, halfcheetah, size) in _TABLE_2.items():
        yield PaperNumber("table_2", "hopper", "expert", configuration, "retention", hopper / 100)
        yield PaperNumber("table_2", "halfcheetah", "expert", configuration, "retention", halfcheetah / 100)
        yield PaperNumber("table_2", ALL_TASKS, "expert", configuration, "trunk size", size / 100)
    for (dataset, task), cells in _TABLE_3.items():
        for initialisation, (score, error) in zip(_INITIALISATION, cells, strict=True):
            yield PaperNumber("table_3", task, dataset, initialisation, "score", score, error)
    for task, pairs in _TABLE_4.items():
        for merge, (after, _) in zip(_MERGES, pairs, strict=True):
            yield PaperNumber("table_4", task, "medium-expert", merge, "score", after)
        for trunk, (_, before) in zip(("ChibiT_R", "GPT2_R"), pairs[::2], strict=True):
            yield PaperNumber("table_4", task, "medium-expert", f"{trunk}, before merging", "score", before)
        yield PaperNumber("table_4", task, "medium-expert", "single-task", "score", _TABLE_4_SINGLE[task])
    for configuration, row in _TABLE_5.items():
        for task, (score, error) in zip(("hopper", "halfcheetah", "walker2d"), row, strict=True):
            yield PaperNumber("table_5", task, None, configuration, "score", score, error)


NUMBERS: tuple[PaperNumber, ...] = tuple(_numbers())
