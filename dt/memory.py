"""Memory of processes that compute for long."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT = 1 << 29  # bytes; a training step of a base-size model frees and takes again far less
_OLD_LIMIT = 1 << 25  # the highest threshold for mmap that older versions of the library take


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for what is taken next, in this process from now on; False where it cannot or
    cannot fully.

    A training step frees buffers of megabytes and takes the same again, and so does a step of a rollout. The GNU C
    library gives them back to the kernel in between, so that every step touches thousands of pages for the first time:
    a third of a training step's time on a virtual machine where a page fault takes 50 µs, a tenth of a rollout's.
    Changes no result.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)
    return all(mallopt(what, _KEPT) for what in (_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD))
