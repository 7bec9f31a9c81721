"""Shared fixtures: tiny random models, one case for every way a built-in policy may work, paths of outside data."""

from __future__ import annotations

import atexit
import copy
import functools
import io
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEVICE = os.environ.get("WINNOW_TEST_DEVICE", "cpu")  # of tiny models and prompts: cuda runs the laws on a GPU
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import winnowkv as wk
from winnowkv.models.info import Fingerprint
from winnowkv.policies.registry import policy_class

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 128
PROMPT = 72  # tokens of a usual test prompt

torch.set_num_threads(1)  # the models are so small that handing work to threads costs more than the work


# Where _write_profiles() below puts a calibration profile for each tiny model: a spec names the folder.
PROFILES = tempfile.mkdtemp(prefix="winnowkv-profiles-")
atexit.register(shutil.rmtree, PROFILES, ignore_errors=True)


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
        return policy_class(self.name).per_head

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
    Case("pyramidkv:observe=4:kernel=3:slope=5"),
    Case("pyramidkv:observe=4:sinks=2"),
    Case("dynamickv:observe=4:kernel=3:every=2:ceiling=2"),
    Case("dynamickv:observe=8:sinks=2"),
    Case("h2o"),
    Case("h2o:recent=0.3:sinks=2:observe=3:group_by=max"),
    Case("tova"),
    Case("tova:sinks=2:observe=3"),
    Case("cake:observe=4:kernel=3"),
    Case("cake:observe=8:sinks=2:tau1=0.5:tau2=2"),
    Case("adakv:observe=4:kernel=3"),
    Case("adakv:observe=4:floor=0:sinks=2"),
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
    Case("winnow:observe=4:samples=16", "aggregation"),
    Case("winnow:observe=context:samples=16:sinks=1", budget=40),
    Case("expected:observe=4:samples=16"),
    Case("expected:observe=6:samples=300:sinks=0"),
]
EVICTING = [case for case in CASES if case.name != "full"]
# Lossy storage: what the laws ask of it stands in test_law_quantize.py, since those that speak of exact values do not hold.
QUANTIZED = [
    Case("int8"),
    Case("int4"),
    Case("snapkv:observe=8:kernel=3:quantize=int8"),
    Case("adakv:observe=4:floor=0:sinks=2:quantize=int4"),
    Case("dynamickv:observe=4:kernel=3:every=2:ceiling=2:quantize=int8"),
    Case("windowkv:observe=4:window=4:top=2:group=2:sinks=2:quantize=int4", "localization"),
]

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Larger than usual: attention must be peaked, or dropping an entry would change nothing that a test can see.
    "initializer_range": 0.15,
    # No stop token: every generation has the length that was asked for.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}


def tiny_model(family: str) -> PreTrainedModel:
    """A seeded float32 model: ``llama`` with 5 layers or ``qwen2`` with 7 and biases that are not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=5, **TINY)).eval()
        else:
            model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=7, **TINY)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                torch.nn.init.normal_(parameter, std=0.2)
    # Logits of about 1 and not 5: float32 noise is relative (the framework's own cache is 1.2e-5 off at 5),
    # and the laws say 1e-5.
    model.lm_head.weight.data *= 0.25
    return model.to(DEVICE)


def prompt(tokens: int, seed: int = 0) -> Tensor:
    """A random prompt ``[1, tokens]`` that hangs on its seed only."""
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(1000 + seed)).to(DEVICE)


def random_profile(fingerprint: Fingerprint, layers: int, seed: int = 0) -> wk.Profile:
    """A profile with scores that nobody measured; the laws must hold for any."""
    draw = random.Random(seed)
    heads = range(fingerprint.heads)
    semantic, traditional = (tuple(tuple(draw.random() for _ in heads) for _ in range(layers)) for _ in range(2))
    errors = [draw.random() for _ in range(layers)]
    return wk.Profile("tiny", fingerprint, semantic, traditional, tuple(error / sum(errors) for error in errors))


@functools.cache
def _built(family: str) -> PreTrainedModel:
    return tiny_model(family)


def _write_profiles() -> None:
    for family in ("llama", "qwen2"):
        model = _built(family)
        random_profile(Fingerprint.of(model), model.config.num_hidden_layers).write(Path(PROFILES) / f"{family}.json")


_write_profiles()


@pytest.fixture
def llama() -> PreTrainedModel:
    return copy.deepcopy(_built("llama"))


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each tiny model in turn, a fresh copy: what one test leaves behind cannot reach the next."""
    return copy.deepcopy(_built(request.param))


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    """Each policy case in turn."""
    return request.param


@pytest.fixture(params=QUANTIZED, ids=str)
def quantized(request: pytest.FixtureRequest) -> Case:
    """Each case that stores what it keeps in fewer bits."""
    return request.param


@pytest.fixture(params=EVICTING, ids=str)
def evicting(request: pytest.FixtureRequest) -> Case:
    """Each case that evicts something."""
    return request.param


@pytest.fixture
def winnow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, standard output, standard error."""
    from winnowkv.cli import main

    def call(*arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["winnow", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


def outside(variable: str, folder: str) -> Path:
    """A folder that is not part of the repository: the variable's, or the one beside the checkout; skips if absent."""
    path = Path(os.environ.get(variable) or ROOT.parent / "shared" / folder)
    if not path.is_dir():
        pytest.skip(f"{path} does not exist; point {variable} at the folder to run this test")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return outside("WINNOW_DATA", "data")


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return outside("WINNOW_GOLDEN", "golden")
