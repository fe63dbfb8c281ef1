"""The C library's allocator, for steps on a CPU: freed memory is used again, not returned and faulted in anew."""

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""For processes that train in a thread: glibc unmaps the heaps of all threads but the first as soon as they empty."""


def keep_freed_memory() -> None:
    """Have this process keep, for good, what it frees: up to its peak. On a CPU with glibc; elsewhere does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or torch.cuda.is_available():
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    _ = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that older releases accept
