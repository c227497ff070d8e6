"""How the host's allocator treats memory that a training on the CPU frees."""

import ctypes

# Options of mallopt, from glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
TRIM_THRESHOLD = 2**31 - 1  # bytes at the top of the heap that are kept; the largest value of mallopt
MMAP_THRESHOLD = 2**30  # bytes; larger allocations still have pages of their own


def keep_freed_memory() -> bool:
    """Keeps freed memory for later allocations instead of returning it to the system; True where that is possible.

    On a CPU every step allocates its buffers anew. By default glibc returns large buffers to the system when they are
    freed, and the system must zero every page of them again for the next step. There is only one arena, because only
    the first one may grow that large.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, MMAP_THRESHOLD), (M_TRIM_THRESHOLD, TRIM_THRESHOLD))
    return all([mallopt(*setting) == 1 for setting in settings])
