"""The parts of benchmarks/peers_speed.py that need no peer: the work they are given, and the table of all peers."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import winnowkv as wk
from support.paths import BENCHMARKS

PEERS = runpy.run_path(str(BENCHMARKS / "peers_speed.py"))
VLLM = runpy.run_path(str(BENCHMARKS / "peers_speed_vllm.py"))
CONFIG = {"rounds": 2, "steps": 5, "new_tokens": 100}


def spread(value: float) -> dict[str, float]:
    return {"median": value}


def setting(policy: str, context: int, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "budget": 0.25, "compiled": False, "context": context, "prompt_tokens": context, **more}


def bench() -> dict[str, Any]:
    """What two policies measured at two contexts, one and four requests, and 1,000 bytes of KV memory."""
    prefill = [
        setting(policy, context, prefill_s=spread(2.0), plain_s=spread(1.9), over_plain=spread(1.05), kept_bytes=25,
                full_bytes=100)
        for policy in ("snapkv", "tova")
        for context in (300, 600)
    ]  # fmt: skip
    decode = [
        setting(policy, context, batch=batch, ms={"slots": spread(10.0), "native": spread(11.0), "dynamic": spread(30.0)},
                over={"native": spread(0.9), "dynamic": spread(1 / 3)},
                tokens_s={"slots": 100.0, "native": 90.0, "dynamic": 33.0})
        for policy in ("snapkv", "tova")
        for context in (300, 600)
        for batch in (1, 4)
    ]  # fmt: skip
    serve = [
        setting("snapkv", 600, kv_memory=1000, plain_fits=2, fits=16, tokens_s=spread(200.0), plain_tokens_s=spread(40.0),
                speedup=spread(5.0)),
        setting("tova", 600, kv_memory=1000, plain_fits=2, fits=0, skipped="too small"),
    ]  # fmt: skip
    return {"prefill": prefill, "decode": decode, "serve": serve}


def test_peers_get_the_work_without_the_policies() -> None:
    cells = PEERS["cells_of"](bench(), CONFIG)
    told = [(c["kind"], c["context"], c.get("batch"), c.get("kv_memory")) for c in cells]
    assert told == [
        ("prefill", 300, None, None), ("prefill", 600, None, None),
        ("decode", 300, 1, None), ("decode", 300, 4, None), ("decode", 600, 1, None), ("decode", 600, 4, None),
        ("serve", 600, None, 1000),
    ]  # fmt: skip
    assert all((c["rounds"], c["steps"], c["new_tokens"]) == (2, 5, 100) for c in cells)
    assert PEERS["budget_of"](bench()) == 0.25
    with pytest.raises(wk.InputError, match="evicted anything"):
        PEERS["budget_of"]({"prefill": [setting("full", 300, kept_bytes=5, full_bytes=5)]})


def test_presses_keep_exactly_as_many_entries_as_our_budget() -> None:
    (job,) = PEERS["kvpress_jobs"](PEERS["cells_of"](bench(), CONFIG), ["A()", "B()"], 0.25)
    assert len(job["cells"]) == 2 * 7
    for cell in job["cells"]:
        left = cell["context"] * (1 - cell["ratio"])
        assert int(left) == round(left) == cell["context"] // 4


def test_vllm_gets_one_start_for_each_size_of_memory() -> None:
    cells = PEERS["cells_of"](bench(), CONFIG)
    roomy, tight = PEERS["vllm_jobs"](cells, 10, None)
    assert [cell["kind"] for cell in roomy["cells"]] == ["prefill"] * 2 + ["decode"] * 4
    # Four requests of 600 + 100 tokens, and one to spare, in whole blocks of 128.
    assert (roomy["kv_bytes"], roomy["most_rows"], roomy["longest"]) == (5 * 768 * 10, 4, 700)
    assert (tight["kv_bytes"], tight["cells"][0]["batch"]) == (1000, 4)
    small, _ = PEERS["vllm_jobs"](cells, 10, 2 * 30_000)
    assert [(cell["context"], cell.get("batch")) for cell in small["cells"]] == [
        (300, None), (600, None), (300, 1), (300, 4), (600, 1)
    ]  # fmt: skip
    none = [{**cell, "plain_fits": 0} for cell in cells if cell["kind"] == "serve"]
    assert PEERS["vllm_jobs"](none, 10, None) == []


def test_the_table_has_every_peer_once_and_in_order() -> None:
    theirs = [
        {"side": "vllm", "kind": "decode", "context": 300, "batch": 4, "running": 4, "step_ms": 12.5, "tokens_s": 320.0},
        {"side": "kvpress", "kind": "prefill", "press": "A()", "context": 600, "prefill_s": 2.1, "over_plain": 1.1},
        {"side": "vllm", "kind": "serve", "context": 600, "kv_memory": 1000, "running": 2, "step_ms": 20.0, "tokens_s": 100.0},
    ]
    rows = PEERS["rows_of"](bench(), theirs)
    assert [row["kind"] for row in rows] == sorted((row["kind"] for row in rows), key=["prefill", "decode", "serve"].index)
    who = [(row["who"], row["requests"]) for row in rows if (row["kind"], row["tokens"]) == ("decode", 300)]
    assert who == [
        ("winnowkv snapkv at 0.25", 1), ("transformers, dynamic", 1), ("winnowkv tova at 0.25", 1),
        ("winnowkv snapkv at 0.25", 4), ("transformers, dynamic", 4), ("winnowkv tova at 0.25", 4), ("vLLM, full cache", 4),
    ]  # fmt: skip
    text = PEERS["markdown"](rows, "title", {"vllm": "it stopped"})
    assert "| decode | 300 | 4 | vLLM, full cache | 12.5 | 320.0 | - | - |" in text
    assert "| prefill | 600 | 1 | kvpress A() | - | - | 2.10 | 1.100 of its seconds |" in text
    assert "| decode in 0 MiB | 600 | 16 | winnowkv snapkv at 0.25 | - | 200.0 | - | 5.00x as fast |" in text
    assert "| decode in 0 MiB | 600 | 2 | transformers, dynamic | - | 40.0 | - | - |" in text
    assert text.endswith("- vllm did not finish: it stopped\n")


def test_a_peer_that_fails_keeps_its_finished_lines_and_reports_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "side.py"
    script.write_text(
        "import json, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        'print(json.dumps({"versions": {"torch": "1"}}))\n'
        'print(json.dumps({**job["cells"][0], "tokens_s": 7.0}), flush=True)\n'
        'raise ValueError("no room")\n'
    )
    monkeypatch.setitem(PEERS["measure"].__globals__["SIDES"], "vllm", script)
    cells, told = PEERS["cells_of"](bench(), CONFIG)[:2], []
    store = PEERS["ResultStore"](tmp_path / "out", {}, PEERS["identity"])
    call = ("vllm", Path(sys.executable), [{"cells": cells}], {"threads": 1}, store, told.append)
    assert "no room" in PEERS["measure"](*call)
    assert [(line["context"], line["tokens_s"]) for line in store.lines] == [(300, 7.0)]
    PEERS["measure"](*call)  # continues after the finished lines
    store.close()
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["context"] for line in lines] == [300, 600]


class FakeEngine:
    """Reads a prompt a step, then gives every request it runs a token a step."""

    def __init__(self, rows: int) -> None:
        self.rows, self.waiting, self.running = rows, [], {}
        self.limit = 0

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        self.waiting.append(name)
        self.limit = params.max_tokens

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Any]:
        if self.waiting and len(self.running) < self.rows:
            self.running[self.waiting.pop(0)] = 0
        for name in self.running:
            self.running[name] += 1
        made = [SimpleNamespace(request_id=n, outputs=[SimpleNamespace(token_ids=[0] * k)]) for n, k in self.running.items()]
        self.running = {name: tokens for name, tokens in self.running.items() if tokens < self.limit}
        return made


def test_only_full_decode_steps_of_vllm_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    measured = VLLM["decode"](FakeEngine(2), [[1], [1], [1]], 5)
    # Steps: 1 starts, 2 starts, three more with both, then 2 and 3 in turn; two more where 3 begins beside 2.
    assert measured["running"] == 2
    assert measured["steps"] == 3
    assert measured["tokens_s"] == pytest.approx(2000 / measured["step_ms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sides", "sglang"), "--sides 'sglang' is unknown: use kvpress, vllm"),
        (("--sides", "vllm", "--vllm-python", "/no/python"), "vllm's python /no/python does not exist: run make peers-speed"),
        (
            ("--sides", "vllm", "--vllm-python", sys.executable, "--bench", "/no/bench"),
            "run winnow bench --out /no/bench first",
        ),
    ],
)
def test_bad_values_are_refused(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["peers_speed.py", *arguments])
    with pytest.raises(wk.InputError) as raised:
        PEERS["main"]()
    assert message in str(raised.value)
