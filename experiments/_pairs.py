"""The robots of the paper and their pairs."""

from itertools import combinations, permutations

TASKS = ("halfcheetah", "hopper", "walker2d")
PAIRS = tuple(combinations(TASKS, 2))
ORDERED_PAIRS = tuple(permutations(TASKS, 2))  # (target, source)

LITTLE_DECREASE = 0.95  # "little to no decrease": at least this much of the score is left

DIFFERENCES = (  # of every experiment of the paper
    "Data: recorded from this project's behaviour policies unless another source was named; D4RL's in the paper.",
    "Budget: as the profile says, with its learning rate, schedule and dropout; 100,000 steps a policy in the paper.",
    "The last checkpoint is evaluated; the original keeps the best by the episodes that it reports.",
)

LIKELY = (  # why numbers are others than the paper's
    "the data, unless it is D4RL's: other behaviour, which sets the scores before merging; and the budget, where it is "
    "less than 100,000 steps."
)
