"""A clock that jumps an hour on and back every three seconds, for every Python process that has this folder on its
PYTHONPATH. (Not `datetime`'s, whose type cannot be replaced beneath pandas; with that we only write down when.)"""

import time

HOUR, PERIOD = 3600.0, 3.0
_true_time = time.time


def _jumping() -> float:
    return _true_time() + HOUR * (int(time.monotonic() / PERIOD) % 2)


time.time = _jumping
