"""A server's process gives large blocks back to the system."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from winnowkv.serve.allocator import ASKED, LARGE

# Blocks of half the size that glibc may raise its threshold to, every second of which is freed; then resident MiB.
BLOCKS = """
import sys
from winnowkv.serve.allocator import give_large_blocks_back
if sys.argv[1] == "set":
    assert give_large_blocks_back()
bytearray(b"x") * (31 << 20)  # freed at once: the size that glibc takes for its own
blocks = [bytearray(b"x") * (12 << 20) for _ in range(16)]
del blocks[::2]
print(int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20)
"""


def resident(how: str) -> int:
    """MiB of a process that has freed half of 192 MiB."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return int(subprocess.run([sys.executable, "-c", BLOCKS, how], capture_output=True, check=True, env=plain).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="another C library than glibc")
def test_freed_blocks_are_given_back() -> None:
    assert LARGE < 12 << 20
    assert resident("set") < resident("not set") - 64


def test_a_size_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from winnowkv.serve import allocator

    monkeypatch.setenv(ASKED, "1048576")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("the allocator was asked"))
    assert allocator.give_large_blocks_back()
