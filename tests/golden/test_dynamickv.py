"""Law 9 for DynamicKV: DreamMr/DynamicKV, methods/dynamic_v11.py, and where we differ on purpose.

Faults of the published code, by the ids of the vectors' JSON: D1 repeated window tokens, D2 budgets above the
ceiling, D3 layers after the last multiple of four, D4 lost slots, D5 remainders to the last layer, D6 no floor,
D7 keys expanded to query heads, D8 global state.
"""

from __future__ import annotations

import pytest

from support import golden
from support.golden import Case, cases, heads, positions, published_dynamickv_updates, same
from winnowkv.cache.selection import PromptSelection
from winnowkv.policies import Policy, policy
from winnowkv.scoring.allocate import apportion

CASES = cases("dynamickv")
USABLE = cases("dynamickv", lambda case: case["parity_usable"])
CLEAN = cases("dynamickv", lambda case: not case["bugs_triggered"])
BUGS = {
    "D1_duplicated_window_growth", "D2_exceeds_rmax", "D3_overallocation_tail", "D4_lost_slots", "D5_last_layer_bias",
    "D6_radio_min_ignored", "D7_query_head_cache", "D8_global_state",
}  # fmt: skip


def with_bug(bug: str) -> list:
    return cases("dynamickv", lambda case: bug in case["bugs_triggered"])


def dynamickv(case: Case, **options: float) -> Policy:
    pooling = {"avgpool": "avg", "maxpool": "max"}[case["pooling"]]
    options = {"every": case["update_every"], "ceiling": case["radio_max"], **options}
    return policy("dynamickv", observe=case["window"], kernel=case["kernel"], pooling=pooling, **options)


def lengths(case: Case, selection: PromptSelection) -> list[int]:
    return [case["n"] if kept is None else kept.shape[-1] for kept in selection.kept]


def check_laws(case: Case, selection: PromptSelection) -> None:
    """Exact total, no repeated position, the window kept once and last."""
    assert sum(lengths(case, selection)) == min(case["max_capacity"], case["n"]) * case["num_layers"]
    for kept in selection.kept:
        for row in heads(kept, case["n"], 1):
            assert row == sorted(set(row))
            assert row[-case["window"] :] == list(range(case.context, case["n"]))


def test_every_fault_listed_in_the_vectors_has_a_test() -> None:
    assert {bug["id"] for bug in golden.document("dynamickv")["reference_bugs"]} == BUGS


@pytest.mark.parametrize("case", CASES)
def test_published_updates_from_our_scores_and_our_global_top_k(case: Case) -> None:
    """The hits are ours alone; the budgets are the authors' chain of floors over them."""
    ours = dynamickv(case)
    scores = [case.scores(ours, layer) for layer in range(case["num_layers"])]
    updates = published_dynamickv_updates(case, scores)
    assert len(updates) == len(case["counts_updates"]) == case["num_layers"] // 4
    for i, update in enumerate(updates):
        assert update.counts == case.update("counts", i)
        assert update.budgets == case.update("budgets", i)
    assert updates[-1].budgets == case.numbers("budgets_final")


@pytest.mark.parametrize("case", USABLE)
def test_parity_with_the_published_selection(case: Case) -> None:
    """Every query head keeps its own top, so keys are expanded for the comparison (D7)."""
    ours, may = dynamickv(case), case.get("may")
    for layer, budget in enumerate(case.numbers("budgets_final")):
        entries = min(budget, case.context) + ours.observe  # D4: the excess is lost
        kept = case.select(ours, 0, case.scores(ours, layer), entries)
        assert kept.shape[1] == case["num_heads"]
        for head, row in enumerate(kept[0].tolist()):
            tied = positions(case.tensor("may")[layer, head]) if may else None
            same(row, positions(case.tensor("kept")[layer, head]), tied)
            assert len(row) - ours.observe == case.tensor("context_kept")[layer, head]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("per_query_head", [False, True], ids=["kv_heads", "query_heads"])
def test_our_allocation_is_exact_for_any_scores_of_the_layers(case: Case, per_query_head: bool) -> None:
    check_laws(case, case.run(dynamickv(case), case["max_capacity"], per_query_head=per_query_head))


@pytest.mark.parametrize("case", with_bug("D1_duplicated_window_growth"))
def test_d1_a_layer_that_shrank_never_grows_again(case: Case) -> None:
    for layer in case["bug_duplicated_window_layers"]:  # the fault, as recorded
        row = positions(case.tensor("kept")[layer, 0])
        assert len(row) > len(set(row))
    ours = dynamickv(case)
    selection = PromptSelection(case.bind(ours, case["max_capacity"]))
    held: dict[int, set[int]] = {}
    shrunk_twice = 0
    for layer in range(case["num_layers"]):
        for i, kept in selection.observe(case.states(selection.bound, layer, per_query_head=True)).items():
            now = set(kept[0, 0].tolist())
            shrunk_twice += i in held
            assert now <= held.get(i, now)  # what left never comes back
            assert len(now) < len(held.get(i, range(case["n"])))
            held[i] = now
    assert shrunk_twice > 0
    check_laws(case, selection)


@pytest.mark.parametrize("case", with_bug("D2_exceeds_rmax"))
def test_d2_no_layer_passes_its_ceiling_and_d4_what_it_cannot_hold_goes_to_the_others(case: Case) -> None:
    most = int(case["radio_max"] * case["base"])
    assert max(case.numbers("budgets_final")) == 192 > most == 120  # the fault, as recorded
    row = positions(case.tensor("kept")[5, 0])
    assert len(row) > len(set(row))
    ours = dynamickv(case)
    selection = case.run(ours, case["max_capacity"], per_query_head=True)
    context = [length - ours.observe for length in lengths(case, selection)]
    assert context[5] == most
    assert sum(context) == case["context_slots_target"] == 192
    assert case["context_slots_total"] == 128  # D4: slots that the published code lost to the ceiling
    check_laws(case, selection)


@pytest.mark.parametrize("case", with_bug("D3_overallocation_tail"))
def test_d3_the_layers_after_the_last_multiple_of_four_are_updated_too(case: Case) -> None:
    assert (case["context_slots_total"], case["context_slots_target"]) == (624, 144)  # the fault, as recorded
    assert case.tensor("context_kept")[4:].unique().tolist() == [case["budget_size"]]
    ours = dynamickv(case)
    selection = case.run(ours, case["max_capacity"], per_query_head=True)
    context = [length - ours.observe for length in lengths(case, selection)]
    assert sum(context) == 144
    assert max(context[4:]) < case["budget_size"]
    check_laws(case, selection)
    # The first four layers share the budget of four layers, not the whole model's.
    first = PromptSelection(case.bind(ours, case["max_capacity"]))
    for layer in range(4):
        first.observe(case.states(first.bound, layer))
    assert sum(lengths(case, first)) == 4 * case["max_capacity"]
    assert sum(case.update("budgets", 0)) == case["num_layers"] * case["base"]


@pytest.mark.parametrize("case", with_bug("D4_lost_slots"))
def test_d4_a_budget_above_the_prompt_keeps_everything(case: Case) -> None:
    assert case["context_slots_total"] < case["context_slots_target"]
    selection = case.run(dynamickv(case), case["max_capacity"])
    assert selection.kept == [None] * case["num_layers"]


@pytest.mark.parametrize("case", CLEAN)
def test_d5_remainders_go_to_the_largest_not_to_the_last_layer(case: Case) -> None:
    counts, total = case.update("counts", len(case["counts_updates"]) - 1), case["base"] * case["num_layers"]
    quota = [total * count / sum(counts) for count in counts]
    ours = apportion(counts, total, [case.context] * len(counts))
    assert sum(ours) == total
    assert all(abs(share - exact) < 1 for share, exact in zip(ours, quota, strict=True))
    assert case.numbers("budgets_final")[-1] > quota[-1] + 4  # the fault, as recorded


@pytest.mark.parametrize("case", CLEAN)
def test_our_allocation_splits_the_published_hits(case: Case) -> None:
    """With room in every layer the budgets are the recorded hits' largest-remainder shares."""
    ours = dynamickv(case, floor=0.0)
    scores = [case.scores(ours, layer) for layer in range(case["num_layers"])]
    allocator = case.bind(ours, case["max_capacity"]).parts.allocator
    for i in range(2):
        seen = 4 * (i + 1)
        found = allocator.allocate(scores[:seen], [case["n"]] * seen)
        context = apportion(case.update("counts", i), case["base"] * seen, [case.context] * seen)
        assert found == [share + ours.observe for share in context]


@pytest.mark.parametrize("case", with_bug("D6_radio_min_ignored"))
def test_d6_every_layer_keeps_the_floor(case: Case) -> None:
    ours = dynamickv(case, floor=0.25)
    selection = case.run(ours, case["max_capacity"])
    least = case["base"] // 4
    assert min(lengths(case, selection)) - ours.observe >= least
    assert min(case.numbers("budgets_final")) < least  # the fault, as recorded
    check_laws(case, selection)


@pytest.mark.parametrize("case", CLEAN)
def test_d7_our_selection_is_per_kv_head_and_d8_keeps_no_state_between_prompts(case: Case) -> None:
    ours = dynamickv(case)
    selection = case.run(ours, case["max_capacity"])
    assert all(kept is not None and kept.shape[:2] == (1, case["num_kv_heads"]) for kept in selection.kept)
    case.run(ours, case["max_capacity"] - 8)
    again = case.run(ours, case["max_capacity"])
    assert [heads(a, case["n"], 2) for a in again.kept] == [heads(b, case["n"], 2) for b in selection.kept]
    # D8 names a crash for prompts shorter than the window, too: those are kept whole, see policies/test_registry.py.
