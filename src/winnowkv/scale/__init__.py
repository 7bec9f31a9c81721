"""The evaluation of :mod:`winnowkv.evaluate.run` on more than one process."""

from winnowkv.scale.rayrun import Pool, join, pool

__all__ = ["Pool", "join", "pool"]
