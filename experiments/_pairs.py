"""The robots of the paper and their pairs."""

from itertools import combinations, permutations

TASKS = ("halfcheetah", "hopper", "walker2d")
PAIRS = tuple(combinations(TASKS, 2))
ORDERED_PAIRS = tuple(permutations(TASKS, 2))  # (target, source)

LITTLE_DECREASE = 0.95  # "little to no decrease": at least this much of the score is left
