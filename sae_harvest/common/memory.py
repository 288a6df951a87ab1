"""Settings that make a process keep freed memory instead of returning it to the system.

glibc returns every freed array of a megabyte or more, and allocates the next one again page by
page. On a virtual machine this takes a sixth of the time of a forward pass, and of the steps after
encoding in a feature build. Arrow's own allocator does the same.
"""

from __future__ import annotations

import ctypes

# environment of new processes
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # constants of malloc.h
NEVER = -1


def keep_memory() -> None:
    """Make this process keep its freed memory from now on, if the C library is glibc."""
    import pyarrow as pa

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for setting, value in ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, NEVER), (ARENA_MAX, 1)):
        mallopt(setting, value)
    pa.set_memory_pool(pa.system_memory_pool())
