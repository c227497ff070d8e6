"""What the host does with memory that a training on a CPU frees."""

import ctypes

# of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
KEPT = 2**31 - 1  # bytes; the most that mallopt takes
MAPPED = 2**30  # bytes; what is larger has pages of its own still


def keep_freed_memory() -> bool:
    """Keeps freed memory for the next allocation instead of giving it back to the system; True where that is possible.

    On a CPU every step allocates its buffers anew. By default glibc returns large ones to the system when they are
    freed, and the system zeroes every page of them again for the next step. One arena, because only the first may grow
    this large.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    settings = ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, MAPPED), (M_TRIM_THRESHOLD, KEPT))
    return all([mallopt(*setting) == 1 for setting in settings])
