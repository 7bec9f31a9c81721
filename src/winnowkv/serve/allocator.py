"""The C library's allocator in a server's process: large blocks go back to the system as soon as they are freed."""

from __future__ import annotations

import ctypes
import os

M_MMAP_THRESHOLD = -3  # in glibc's malloc.h
LARGE = 4 * 2**20  # bytes
ASKED = "MALLOC_MMAP_THRESHOLD_"  # the same setting in the environment


def give_large_blocks_back() -> bool:
    """Let every block of :data:`LARGE` bytes and more be mapped by itself; returns whether the allocator does so.

    glibc raises that size by itself to the largest block that was freed, up to 32 MiB. What a long prompt needs for a moment
    then lies in one heap with the keys and values of others, between which it cannot be given back. A size that is set in the
    environment stays; C libraries without the setting are left as they are.
    """
    if ASKED in os.environ:
        return True
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
    except (OSError, AttributeError, TypeError):
        return False
