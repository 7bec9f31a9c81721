"""Recorded steps: when they are recorded, and that playing back reads the new inputs. CUDA itself if there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from winnowkv.engine.cuda_graphs import Recorded, record_cuda


def test_a_step_is_recorded_at_its_second_call_and_again_for_other_buffers() -> None:
    recorded: list[str] = []

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded.append("once")
        output = run()
        return lambda: output.copy_(run()), output

    calls = Recorded(record)

    def step(tokens: Tensor) -> Tensor:
        return tokens * 2

    outputs = [calls(step, key, {"tokens": torch.tensor([number])}) for number, key in enumerate("aaabbba")]
    assert [int(output) for output in outputs] == [0, 2, 4, 6, 8, 10, 12]  # each its own, though all are written over
    assert len(recorded) == 2


def test_a_step_that_cannot_be_recorded_runs_eagerly_and_warns_once() -> None:
    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    calls = Recorded(record)
    with pytest.warns(UserWarning, match=r"CUDA graph \(operation not permitted when stream is capturing\)") as told:
        outputs = [calls(lambda tokens: tokens + 1, "a", {"tokens": torch.tensor([number])}) for number in range(4)]
    assert [int(output) for output in outputs] == [1, 2, 3, 4]
    assert len(told) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cuda_graph_reads_and_writes_the_buffers_it_was_recorded_with() -> None:
    held = torch.zeros(3, device="cuda")

    def step(tokens: Tensor) -> Tensor:
        return held.add_(tokens).clone()

    calls = Recorded(record_cuda)
    outputs = [calls(step, held.data_ptr(), {"tokens": torch.full((3,), float(number), device="cuda")}) for number in range(5)]
    assert [float(output[0]) for output in outputs] == [0, 1, 3, 6, 10]
