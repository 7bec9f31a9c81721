"""A case for every way a built-in policy may work."""

from __future__ import annotations

from dataclasses import dataclass

import winnowkv as wk
from support.profiles import PROFILES


@dataclass(frozen=True)
class Case:
    """A policy as a user writes it, and a budget in entries that its window fits in and that is below PROMPT."""

    spec: str
    task: str | None = None
    budget: int = 20

    @property
    def name(self) -> str:
        return self.spec.split(":")[0]

    @property
    def ragged(self) -> bool:
        """Whether heads of a layer may keep different numbers of entries."""
        return wk.policy(self.spec).per_head

    @property
    def settings(self) -> dict[str, object]:
        """Keyword arguments of compress() and CompactCache()."""
        return {"policy": self.spec, "budget": self.budget, "task": self.task}

    def __str__(self) -> str:
        spec = self.spec.removesuffix(f":profile={PROFILES}")
        return f"{spec}-{self.task}" if self.task else spec


# Windows and kernels are small because the prompts are. The layer counts below (5 and 7) are multiples of no
# group=2, group=3 and no every=2, every=4, so a shorter last group is always there.
CASES = [
    Case("full"),
    Case("random:sinks=2:observe=3"),
    Case("streaming:sinks=2"),
    Case("snapkv:observe=8:kernel=3"),
    Case("snapkv:observe=4:kernel=5:pooling=avg:group_by=max:sinks=3"),
    Case("snapkv:observe=question", budget=40),  # no structure: the paper's window
    Case("pyramidkv:observe=4:kernel=3:slope=5"),
    Case("pyramidkv:observe=4:sinks=2"),
    Case("dynamickv:observe=4:kernel=3:every=2:ceiling=2"),
    Case("dynamickv:observe=8:sinks=2"),
    Case("h2o"),
    Case("h2o:recent=0.3:sinks=2:observe=3:group_by=max"),
    Case("tova"),
    Case("tova:sinks=2:observe=3"),
    Case("cake:preset=paper", budget=40),
    Case("cake:observe=4:kernel=3"),
    Case("cake:observe=8:sinks=2:tau1=0.5:tau2=2"),
    Case("adakv:of=snapkv:observe=4:kernel=3"),
    Case("adakv:floor=0:of=snapkv:observe=4:sinks=2"),
    Case("adakv:floor=0.1:of=expected:observe=4:samples=16"),
    Case(f"headkv:observe=4:kernel=3:profile={PROFILES}"),
    Case(f"headkv:observe=4:sinks=2:heads=traditional:beta=4:profile={PROFILES}"),
    Case(f"compresskv:observe=4:least=8:profile={PROFILES}"),
    Case(f"compresskv:observe=4:heads=traditional:heads_per_layer=2:indices=per-kv-head:sinks=2:least=8:profile={PROFILES}"),
    Case(f"compresskv:heads=all:kernel=3:profile={PROFILES}", budget=40),
    Case("compresskv:observe=4:heads=random:3:budgets=uniform"),
    Case("windowkv:observe=4:window=4:top=2:group=2:sinks=2", "localization"),
    Case("windowkv:observe=4:window=5:top=9:group=3", "aggregation"),
    Case("windowkv:preset=paper:group=2", "localization", 40),
    Case("windowkv:preset=paper:group=3", "aggregation", 40),
    Case("windowkv:preset=repo:group=2", "localization", 40),
    Case("windowkv:preset=repo", "aggregation", 40),
    Case("winnow:observe=4:heads=3:sinks=2:samples=16:least=4"),  # no profile: the heads of this prompt
    Case(f"winnow:observe=8:heads=6:longest=5:peak=0.6:least=6:profile={PROFILES}"),
    Case(f"winnow:observe=4:top=2:share=0.5:least=0:progressive=false:sinks=0:profile={PROFILES}", budget=12),
    Case(f"winnow:observe=8:heads=6:longest=5:peak=0.6:least=6:equal=true:profile={PROFILES}"),
    Case("winnow:observe=4:samples=16", "aggregation"),
    Case("winnow:observe=context:samples=16:sinks=1", budget=40),
    Case("expected:observe=4:samples=16"),
    Case("expected:observe=6:samples=300:sinks=0"),
    Case("expected:observe=4:samples=16:equal=true"),
    Case("keydiff:sinks=2:observe=3"),
    Case("knorm:sinks=2:observe=3"),
    Case("lagkv:lag=8"),
    Case("lagkv:lag=5:sinks=1:observe=3"),
    Case("defensivekv:observe=6:sinks=2"),
    Case("criticalkv:of=snapkv:observe=4:kernel=3"),
    Case("criticalkv:of=dynamickv:observe=4:kernel=3:every=2:ceiling=2"),
    Case("chunkkv:chunk=4:of=snapkv:observe=4:kernel=3"),
    Case("chunkkv:chunk=5:of=expected:observe=4:samples=16"),
    Case("criticalkv:first=0.25:of=adakv:floor=0.1:of=expected:observe=4:samples=16"),  # wrappers of wrappers
]
EVICTING = [case for case in CASES if case.name != "full"]
# These serve texts that are read for questions to come, and nothing else: tests/policies/test_kvzip.py, tests/documents.
STUDIED = [Case("kvzip"), Case("kvzip:plus=true"), Case("kvzip:equal=true")]
# Lossy storage has laws of its own in laws/test_quantization.py: those about exact values do not hold for it.
QUANTIZED = [
    Case("int8"),
    Case("int4"),
    Case("snapkv:observe=8:kernel=3:quantize=int8"),
    Case("adakv:floor=0:of=snapkv:observe=4:sinks=2:quantize=int4"),
    Case("dynamickv:observe=4:kernel=3:every=2:ceiling=2:quantize=int8"),
    Case("windowkv:observe=4:window=4:top=2:group=2:sinks=2:quantize=int4", "localization"),
]
