"""Damaged files for everything that winnowkv reads: each must be refused in one sentence, or be used as what it says.

    python benchmarks/soak/parsers.py --count 2000 --json out.json

For each kind of file, ``--count`` copies of valid ones are damaged (damage.py) and read. What is accepted is used: a cache
continues and must give the logits of the whole one, a profile compresses a prompt, results become a page. It prints a table
and exits with 1 if anything but a WinnowError of one line came out, or if a damaged cache gave other logits.
``--kind K --only N`` reads one file again, and ``--keep FOLDER`` keeps it.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
from damage import BYTES, Damage, change_json, change_line, change_yaml, forge_header, forge_table

import winnowkv as wk
from winnowkv.budget import Budget
from winnowkv.cache.reading import prefill
from winnowkv.cache.snapshot import load_document
from winnowkv.errors import WinnowError
from winnowkv.evaluate.audit.audit import file_prompts
from winnowkv.evaluate.needle.prompts import read_chains, read_needles
from winnowkv.evaluate.report.lines import line_fault
from winnowkv.evaluate.report.merge import merge
from winnowkv.evaluate.report.store import ResultStore, read_config
from winnowkv.evaluate.report.summary import summarize
from winnowkv.evaluate.tasks.recipes import read_recipe
from winnowkv.evaluate.tasks.run import identity
from winnowkv.memory.shape import read_shape
from winnowkv.models.calibration import CalibrationProfile
from winnowkv.models.curve import Curve
from winnowkv.models.info import ModelInfo
from winnowkv.models.load import load_config
from winnowkv.policies import PromptInfo, policy as make_policy
from winnowkv.prompt.task import TaskProfile

LONGEST_MESSAGE = 1000  # characters; a path is in it
SLOWEST = 30  # seconds for one file
MAY_BE_REFUSED = ".word"  # a budget whose profile is not there is refused as it is
OUTCOMES = ("equal", "changed", "refused", "raw", "wrong")
TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
SPECS = (
    "full", "snapkv", "snapkv:observe=16:kernel=5", "adakv:floor=0.1:of=snapkv:observe=16", "windowkv:group=6:window=8",
    "compresskv:heads=random:4:budgets=uniform", "criticalkv:first=0.25:of=adakv:of=expected:samples=16",
    "pyramidkv:slope=5", "snapkv:quantize=int8", "winnow:sinks=2:share=0.5:progressive=false", "cake:tau1=0.5:tau2=2",
)  # fmt: skip
BUDGETS = ("128", "0.12", "1.0", "auto", "auto:0.95", "auto:0.9:p.json", "1", "1e-3")


class WrongError(Exception):
    """A file was accepted and is not what it says."""


@dataclass(frozen=True)
class Kind:
    """One kind of file: valid ones, what reads and uses one, and how they are damaged.

    ``use`` gives something that is equal for equal files, raises WinnowError for a refusal, and :class:`WrongError`.
    """

    name: str
    valid: Sequence[bytes]
    use: Callable[[Path], Any]
    damages: Sequence[Damage]
    suffix: str = ""


@dataclass
class Tally:
    """What became of the files of one kind; ``faults`` name the file's number, its damage and what came out."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def llama() -> PreTrainedModel:
    """A model of random weights with 3 layers."""
    torch.manual_seed(20)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, attn_implementation="sdpa", **TINY)).eval()


def gemma() -> PreTrainedModel:
    """A model of random weights of which layers 2 and 5 attend to everything, the others to a window."""
    torch.manual_seed(20)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 4, "sliding_window": 16, "layer_types": kinds}
    return Gemma3ForCausalLM(Gemma3TextConfig(attn_implementation="sdpa", **TINY, **sizes)).eval()


def ids(tokens: int, rows: int = 1) -> torch.Tensor:
    """Random tokens, the same each time."""
    return torch.randint(1, 128, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def continued(model: PreTrainedModel, cache: wk.CompactCache, mask: torch.Tensor | None) -> torch.Tensor:
    """The logits of the next four tokens."""
    rows = len(cache.compact_layers[0].pads)
    return model(ids(4).repeat(rows, 1), attention_mask=mask, past_key_values=cache).logits


def saved_caches(folder: Path) -> Iterator[Kind]:
    """Caches of one prompt, of a padded batch, quantized, with a decode budget, and of a model with sliding windows."""
    plain, windows = llama(), gemma()
    padded = torch.ones(2, 44, dtype=torch.long)
    padded[1, :9] = 0
    cases = (
        ("cache", plain, "snapkv:observe=8:kernel=3", 20, None, None, 0),
        ("cache of a batch", plain, "adakv:floor=0:of=snapkv:observe=4:sinks=2", 20, padded, None, 0),
        ("cache in int8", plain, "snapkv:observe=8:kernel=3:quantize=int8", 20, None, None, 6),
        ("cache with a decode budget", plain, "snapkv:observe=8:kernel=3", 20, None, 64, 140),
        ("cache with windows", windows, "snapkv:observe=8:kernel=3", 20, None, None, 3),
    )
    for name, model, spec, budget, mask, decode_budget, more in cases:
        cache = wk.CompactCache(model, spec, budget, decode_budget=decode_budget)
        prompt = ids(40, 1 if mask is None else len(mask))
        prefill(model, prompt, cache, None if mask is None else mask[:, :40])
        after = ids(more) if more else ids(1)[:, :0]
        with torch.no_grad():
            for token in after.split(1, 1) if more else ():
                model(token, past_key_values=cache)
        file = folder / "whole.safetensors"
        tokens = None if mask is not None else [*prompt[0].tolist(), *after[0].tolist()]
        wk.save_cache(cache, model, file, tokens=tokens, overwrite=True)
        expected = continued(model, cache, mask)

        def use(
            path: Path,
            model: PreTrainedModel = model,
            mask: torch.Tensor | None = mask,
            tokens: list[int] | None = tokens,
            expected: torch.Tensor = expected,
        ) -> str:
            loaded, found = (wk.load_cache(path, model), None) if tokens is None else load_document(path, model)
            if found != tokens:
                raise WrongError("other token ids")
            logits = continued(model, loaded, mask)
            if not torch.equal(logits, expected):
                raise WrongError(f"logits differ by {float((logits - expected).abs().max())}")
            return "the same logits"

        yield Kind(name, (file.read_bytes(),), use, (*BYTES[:5], forge_header, forge_header, forge_table, forge_table))


def profiles(folder: Path) -> Iterator[Kind]:
    """Calibration profiles, and the curves in them."""
    model = llama()
    info, draw = ModelInfo.of(model), random.Random(0)
    tables = [tuple(tuple(draw.random() for _ in range(8)) for _ in range(3)) for _ in range(2)]
    curve = Curve(((0.1, 0.2), (0.5, 0.9), (1.0, 1.0)), 12)
    made = CalibrationProfile("tiny", info, *tables, (0.5, 0.3, 0.2), {"seed": 1}, {"snapkv": curve})
    made.write(folder / "p.json")
    data = (folder / "p.json").read_bytes()

    def use(path: Path) -> Any:
        found = wk.read_profile(path)
        for spec in (f"compresskv:observe=4:least=8:profile={path}", f"headkv:observe=4:profile={path}"):
            prefill(model, ids(40), wk.CompactCache(model, spec, 20))
        return asdict(found)

    def use_curve(path: Path) -> Any:
        wk.CompactCache(model, "snapkv:observe=4", f"auto:0.9:{path}")
        curve = wk.read_profile(path).curve("snapkv")
        return asdict(curve), [curve.needed(at / 20) for at in range(21)], [curve.expected(at / 20) for at in range(21)]

    def change_curve(data: bytes, draw: random.Random) -> bytes:
        value = json.loads(data)
        value["curves"] = json.loads(change_json(json.dumps(value["curves"]).encode(), draw)) if draw.random() < 0.9 else None
        return json.dumps(value).encode()

    def change_curves(data: bytes, draw: random.Random) -> bytes:
        with suppress(ValueError, RecursionError):  # of what JSON cannot hold change_json has the rest
            return change_curve(data, draw)
        return change_json(data, draw)

    yield Kind("profile", (data,), use, (*BYTES, change_json, change_json, change_json))
    yield Kind("curve", (data,), use_curve, (*BYTES, change_curves, change_curves, change_curves))


def jsonl(folder: Path) -> Iterator[Kind]:
    """Prompts of an audit, needles, chains."""
    prompts = [{"id": f"p{n}", "prompt": f"The {n}th question, with ä and \u2028?"} for n in range(4)]
    needles = [{"needle": f"The code is {n}.", "question": "What is it?", "answer": str(n)} for n in range(4)]
    chains = [{"needles": ["a is b.", "b is c."], "question": "What is a?", "answer": "c"} for _ in range(3)]
    readers: tuple[tuple[str, list[dict[str, Any]], Callable[[Path], Any]], ...] = (
        ("prompts", prompts, file_prompts), ("needles", needles, read_needles), ("chains", chains, read_chains),
    )  # fmt: skip
    for name, rows, read in readers:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        yield Kind(name, (data,), read, (*BYTES, change_line, change_line, change_line), ".jsonl")


def results(folder: Path) -> Iterator[Kind]:
    """Results of winnow eval and the settings of the run."""
    numbers = dict.fromkeys(
        ("kept_entries", "kept_bytes", "full_bytes", "held_bytes", "prefill_s", "compress_s", "decode_s", "decode_tokens"), 3
    )
    lines = [
        {"task": "qa", "row": f"r{n}", "protocol": "official", "policy": policy, "budget": 0.12, "score": 0.5, "metric": "f1",
         "answers": ["a"], "prediction": "a", "prompt_tokens": 30, "prompt_tail": "t", "truncated_tokens": 0, **numbers,
         "versions": {"torch": "2"}, "git": "abc", "seed": 0}
        for n in range(3) for policy in ("full", "snapkv")
    ]  # fmt: skip
    lines.append({**lines[-1], "row": "r9", "score": None, "failed": "a budget that is too small"})
    config = {
        "command": "eval",
        "model": "tiny",
        "dtype": "float32",
        "protocol": "official",
        "depths": [0.1, 0.5],
        "chat": None,
    }
    run = folder / "run"

    def fresh(name: str, path: Path, other: str, text: str) -> None:
        run.mkdir(exist_ok=True)
        (run / other).write_text(text, encoding="utf-8")
        (run / name).write_bytes(path.read_bytes())

    def use_results(path: Path) -> Any:
        from winnowkv.evaluate.report.page import render

        fresh("results.jsonl", path, "config.yaml", yaml.safe_dump(config))
        merged, about = merge([run])
        page = summarize(merged, about)
        json.dumps(page, allow_nan=False)
        render(page, merged, about)
        store = ResultStore(run, config, identity, line_fault)
        store.close()
        return merged

    def use_config(path: Path) -> Any:
        fresh("config.yaml", path, "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        found = read_config(run)
        merged, about = merge([run])
        json.dumps(summarize(merged, about), allow_nan=False)
        ResultStore(run, found, identity, line_fault).close()
        return found

    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    yield Kind("results", (data,), use_results, (*BYTES, change_line, change_line, change_line))
    yield Kind("config.yaml", (yaml.safe_dump(config).encode(),), use_config, (*BYTES, change_yaml, change_yaml, change_yaml))


def recipes(folder: Path) -> Iterator[Kind]:
    """Recipes of both commands."""
    sizes = {"layers": 5, "heads": 8, "kv_heads": 2, "head_size": 8, "positions": 4096}
    head = {"claim": "c", "source": "s", "models": [{"name": "tiny", **sizes}], "policies": ["full", "snapkv"], "chat": None}
    test = {**head, "command": "eval", "budgets": [64, 0.12], "tasks": ["longeval_lines_200"], "protocol": "official"}
    test["max_context"] = 900
    needle = {
        **head, "command": "needle", "budgets": [64], "lengths": [300, 600], "depths": [0.1, 0.5], "haystack": "h", "metric":
        "correct", "max_new_tokens": 8, "needles": [{"needle": "n", "question": "q", "answer": "a"}],
    }  # fmt: skip

    def use(path: Path) -> Any:
        read = read_recipe(path)
        for plan in read.plans:
            plan.sizes(plan.context())
            if plan.command == "needle":
                assert plan.needles
                plan.lengths(400)
        return {**asdict(read), "file": None}

    files = [yaml.safe_dump(one).encode() for one in (test, needle)]
    yield Kind("recipe", files, use, (*BYTES, change_yaml, change_yaml, change_yaml))


def words(folder: Path) -> Iterator[Kind]:
    """Policy specs and budgets, as they come from a command line."""
    info, model = ModelInfo("Llama", 3, 8, 2, "x"), llama()

    def text(path: Path) -> str:
        return path.read_bytes().decode("utf-8", "surrogateescape")

    def use_spec(path: Path) -> Any:
        made = make_policy(text(path))
        task = TaskProfile.of("localization")
        made.check(info, task)
        made.bind(info, PromptInfo(2000, 3, 1000, task))
        return made

    def use_budget(path: Path) -> Any:
        budget = Budget.of(text(path))
        prompt = PromptInfo(40, 3, budget.entries(40), TaskProfile.of("localization"))
        make_policy("streaming:sinks=1").check_prompt(prompt)
        if budget.profile is not None:
            prefill(model, ids(40), wk.CompactCache(model, "snapkv:observe=4", budget))
        return str(budget), budget.key

    def spread(data: bytes, draw: random.Random) -> bytes:
        number = draw.choice((b"9" * 5000, b"1e999", b"nan", b"-inf", b"-1", b"0", b"2.5", b"1" * 25, b"", b"none", b"true"))
        parts = data.split(b"=")
        at = draw.randrange(len(parts))
        parts[at] = number + b"".join(parts[at].partition(b":")[1:])
        return b"=".join(parts)

    def nest(data: bytes, draw: random.Random) -> bytes:
        return b"adakv:of=" * draw.choice((1, 2, 9, 3000)) + data

    yield Kind("policy spec", [spec.encode() for spec in SPECS], use_spec, (*BYTES, spread, spread, nest), MAY_BE_REFUSED)
    yield Kind("budget", [budget.encode() for budget in BUDGETS], use_budget, (*BYTES, spread, spread), MAY_BE_REFUSED)


def configs(folder: Path) -> Iterator[Kind]:
    """A model's config.json."""
    config = llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    data = json.dumps({name: value for name, value in config.items() if value is not None}, default=str).encode()

    def use(path: Path) -> Any:
        shape = read_shape(load_config(str(path)), 2)
        return asdict(shape)

    yield Kind("config.json", (data,), use, (*BYTES, change_json, change_json, change_json), ".json")


GROUPS = (saved_caches, profiles, jsonl, results, recipes, words, configs)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; 0: never."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    if not seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_one(kind: Kind, number: int, seed: int, path: Path, expected: Sequence[Any], limit: float) -> tuple[str, str, str]:
    """Damage a file and use it: the outcome, the damage's name, and what was said."""
    draw = random.Random(f"{seed}:{kind.name}:{number}")
    which = draw.randrange(len(kind.valid))
    damage = draw.choice(kind.damages)
    data = damage(kind.valid[which], draw)
    path.write_bytes(data)
    try:
        with limited(limit):
            found = kind.use(path)
    except WinnowError as error:
        said = str(error)
        one_line = said.strip() and "\n" not in said and len(said) <= LONGEST_MESSAGE
        return ("refused" if one_line else "raw"), damage.__name__, said
    except WrongError as error:
        return "wrong", damage.__name__, str(error)
    except Exception as error:
        return "raw", damage.__name__, f"{type(error).__name__}: {error}"[:400]
    return ("equal" if found == expected[which] else "changed"), damage.__name__, ""


def soak(
    count: int, seed: int, *, names: Sequence[str] = (), only: int | None = None, keep: Path | None = None, limit: float = 0
) -> dict[str, Tally]:
    """Damage and read ``count`` files of every kind (or of those named); see the module's text."""
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for group in GROUPS:
            for kind in group(folder):
                if names and kind.name not in names:
                    continue
                tally = tallies.setdefault(kind.name, Tally())
                path = (keep or folder) / f"damaged{kind.suffix}"
                expected = []
                for data in kind.valid:
                    path.write_bytes(data)
                    try:
                        expected.append(kind.use(path))
                    except WinnowError as error:
                        if kind.suffix != MAY_BE_REFUSED:
                            raise RuntimeError(f"{kind.name}: the whole file is refused: {error}") from error
                        expected.append(None)
                begin = time.perf_counter()
                for number in range(count) if only is None else [only]:
                    outcome, damage, said = try_one(kind, number, seed, path, expected, limit)
                    tally.counts[outcome] += 1
                    if outcome in ("raw", "wrong"):
                        tally.faults.append({"number": number, "outcome": outcome, "damage": damage, "said": said})
                    if only is not None:
                        print(f"{kind.name} {number}: {damage}: {outcome} {said}")
                tally.seconds = time.perf_counter() - begin
    return tallies


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", default=[], help="only this kind; may be given more than once")
    parser.add_argument("--only", type=int, help="only the file of this number")
    parser.add_argument("--keep", type=Path, help="folder in which the last damaged file stays")
    parser.add_argument("--json", type=Path, help="write the counts here, too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tallies = soak(asked.count, asked.seed, names=asked.kind, only=asked.only, keep=asked.keep, limit=SLOWEST)
    print(f"seed {asked.seed}, {asked.count} damaged files of each kind")
    print(f"{'kind':28}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES) + f"{'seconds':>9}")
    for name, tally in tallies.items():
        print(f"{name:28}" + "".join(f"{tally.counts[outcome]:9}" for outcome in OUTCOMES) + f"{tally.seconds:9.0f}")
    for name, tally in tallies.items():
        for fault in tally.faults[:10]:
            print(f"{name} {fault['number']} ({fault['damage']}): {fault['outcome']}: {fault['said'][:300]}")
    faults = sum(len(tally.faults) for tally in tallies.values())
    files = sum(sum(tally.counts.values()) for tally in tallies.values())
    print(f"{files} files, {faults} faults")
    if asked.json is not None:
        found = {name: {**tally.counts, "seconds": tally.seconds, "faults": tally.faults} for name, tally in tallies.items()}
        about = {"seed": asked.seed, "count": asked.count, "files": files, "faults": faults, "kinds": found}
        asked.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
