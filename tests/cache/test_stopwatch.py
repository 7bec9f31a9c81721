"""Seconds of several stretches of work."""

from __future__ import annotations

import pytest
import torch

from winnowkv.cache import stopwatch
from winnowkv.cache.stopwatch import Stopwatch


def test_intervals_add_up_and_the_time_between_them_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    with watch.running(torch.device("cpu")):
        pass
    with pytest.raises(ZeroDivisionError), watch.running(torch.device("cpu")):
        _ = 1 / 0
    assert watch.seconds == 2.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_the_work_of_the_device_counts() -> None:
    watch, many = Stopwatch(), torch.randn(4096, 4096, device="cuda")
    for _ in range(2):
        with watch.running(many.device):
            for _ in range(20):
                many = (many @ many).clamp(-1, 1)
    assert watch.seconds > 20 * 2 * 4096**3 * 2 / 1e15  # no GPU does 10^15 operations in float32 a second
    assert watch.seconds == watch.seconds
