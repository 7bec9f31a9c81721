"""Requests decode while a prompt is read: between the layers of its forward passes, in the thread that reads it.

So a stream never waits for a whole prompt, and what a layer evicts when it was read is free as early as without: chunks, the
usual way, would hold the whole prompt until the last one. No answer depends on it, since each pass goes into its own cache.
"""

from __future__ import annotations

from collections.abc import Callable

from winnowkv.engine.job import StoppedError


class Interleaving:
    """Called before each layer of a forward pass, as ``CompactCache(between=)``.

    Parameters
    ----------
    every: a step after as many layers as take about the time of a pass of so many tokens; None for no steps.
    layers: of the model. step: a decode step of all that run.
    stopped: whether what is read is not wanted any more; StoppedError is raised then.
    """

    def __init__(self, every: int | None, layers: int, step: Callable[[], None], stopped: Callable[[], bool]) -> None:
        self._layers, self._step, self._stopped = layers, step, stopped
        self._every = every
        self._read = 0  # tokens, each counted in every layer, since the last step

    def __call__(self, tokens: int) -> None:
        """The next layer is to read so many tokens."""
        if self._every is not None and self._read >= self._every * self._layers:
            self._read = 0
            self._step()
        if self._stopped():
            raise StoppedError("this is not wanted any more")
        self._read += tokens
