"""Freed memory that a process keeps, instead of giving it back to the system.

glibc gives every array of a megabyte or more back when it is freed, and takes it anew, page by
page, for the next one: on a virtual machine a sixth of the time of a forward pass, and of what
follows encoding in a feature build. Arrow has an allocator of its own, which does likewise.
"""

from __future__ import annotations

import ctypes

# for processes to be started
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of malloc.h
NEVER = -1


def keep_memory() -> None:
    """From here on this process keeps what it has had once, where the C library is glibc."""
    import pyarrow as pa

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for setting, value in ((MMAP_THRESHOLD, 1 << 30), (TRIM_THRESHOLD, NEVER), (ARENA_MAX, 1)):
        mallopt(setting, value)
    pa.set_memory_pool(pa.system_memory_pool())
