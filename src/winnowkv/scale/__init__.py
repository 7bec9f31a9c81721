"""The evaluation of :mod:`winnowkv.evaluate.tasks.run` on more than one process."""

from winnowkv.scale.rayrun import Pool, join, pool

__all__ = ["Pool", "join", "pool"]
