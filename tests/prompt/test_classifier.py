"""The task classifier: what it reads, what it decides, how it is trained, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import winnowkv as wk
from winnowkv.evaluate.needle.prompts import read_rows
from winnowkv.policies.parts import Scorer, Selector
from winnowkv.prompt.classifier import HASHED_FEATURES, LinearClassifier, load_classifier, sentences, units

TEXT = " ".join(f"w{i}" for i in range(5000))


PROMPTS = Path(__file__).parent / "data" / "held_out_prompts.json"


def test_it_reads_the_outermost_sentences_of_both_ends_and_nothing_between() -> None:
    text = " ".join(f"Sentence number s{i} ends." for i in range(100))
    read = [(mark, rank, unit.split()[2]) for mark, rank, unit in units(text)]
    assert read == [("<", i, f"s{i}") for i in range(4)] + [(">", i, f"s{99 - i}") for i in range(4)]
    assert sentences(text) == sentences(text.replace("s50", "question"))
    assert sentences(text) != sentences(text.replace("s99", "question"))


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        ("user\n", "\nassistant\n"),
        ("[INST] ", " [/INST]"),
        ("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    ],
)
def test_marks_of_chat_templates_are_no_sentences(opening: str, closing: str) -> None:
    text = f"Translate this.\n\n{'A short one. ' * 900}\n\nTranslation:"
    assert units(opening + text + closing) == units(text)


def test_sentences_vote_with_the_share_that_the_first_weights_give_them() -> None:
    """Weights that hear nothing give all sentences the same share; they add up to 1."""
    classifier = LinearClassifier(torch.zeros(2, HASHED_FEATURES), [0.0, 0.0])
    assert classifier.shares([[1], [2, 3], [], [4]]) == [0.25] * 4
    weights = torch.zeros(2, HASHED_FEATURES)
    weights[0, 7] = 100.0
    assert LinearClassifier(weights, [-20.0, 0.0]).shares([[7], [8]])[0] > 0.99


def test_prompts_that_were_never_trained_on_are_classified() -> None:
    from winnowkv.calibrate.task_rows import read_prompts

    rows = read_prompts(PROMPTS)
    tasks = [row.task for row in rows]
    assert tasks.count("localization") == tasks.count("aggregation") >= 20
    profiles = load_classifier()([row.text for row in rows])
    right = [profile.task == row.task for profile, row in zip(profiles, rows, strict=True)]
    assert sum(right) / len(rows) >= 0.85
    found = [ok for ok, row in zip(right, rows, strict=True) if row.task == "localization"]
    assert sum(found) / len(found) >= 0.85


def test_held_out_prompts_share_no_wording_with_those_that_were_trained_on() -> None:
    """No six words in a row, except where both list the same answers."""
    from winnowkv.calibrate import task_prompts
    from winnowkv.calibrate.task_instructions import read_families

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[at : at + 6]) for at in range(len(words) - 5)}

    taught = set(task_prompts.QUESTIONS)
    for group in (task_prompts.LOCALIZATION, task_prompts.AGGREGATION):
        taught.update(text for pairs in group.values() for pair in pairs for text in pair)
    taught.update(text for family in read_families() for pair in family.lines for text in pair)
    seen = set().union(*map(runs, taught))
    assert len(seen) > 500
    for prompt in json.loads(PROMPTS.read_text())["prompts"]:
        assert not (runs(prompt["before"]) | runs(prompt["after"])) & seen


def test_instructions_are_filled_completely() -> None:
    import random

    from winnowkv.calibrate.task_instructions import Words, read_families, table

    draw = random.Random(0)
    context, rows = table(draw, 5)
    words = Words(draw, ["Who came?"], context, rows)
    families = read_families()
    assert {family.task for family in families} == {"localization", "aggregation"}
    for family in families:
        for before, after in family.lines:
            filled = words.fill(before) + words.fill(after)
            assert not re.search(r"(?<![\w.])\{(q|claim|noun|name|line|row|cell|column|options|function|few)\}", filled), filled
    assert words.fill("(a|a) {q} \\{x\\}") in ("a Who came? {x}", "a who came {x}") or "{x}" in words.fill("{q} \\{x\\}")


def test_a_huge_word_and_an_empty_text_do_no_harm() -> None:
    for text in ("", "x" * 10**6, "?"):
        profile = wk.task_profile(text)
        assert profile.task in ("localization", "aggregation")
        assert 0.5 <= (profile.probability or 0) <= 1


@pytest.mark.parametrize(
    ("text", "task"),
    [
        (f"{TEXT}\n\nAnswer the question about the text above. Question: Where was the painter born?\nAnswer:", "localization"),
        (f"Write a summary of the following report.\n\n{TEXT}\n\nSummary:", "aggregation"),
        (
            "Please complete the code given below.\nimport os\n\ndef walk(path):\n    for name in\nNext line of code:\n",
            "aggregation",
        ),
    ],
)
def test_plain_prompts_are_classified(text: str, task: str) -> None:
    assert wk.task_profile(text).task == task


def test_rows_of_longbench_are_classified(data_dir: Path) -> None:
    """Every row of LongBench in its official prompt; none was trained on."""
    from winnowkv.calibrate.task import report
    from winnowkv.calibrate.task_rows import longbench

    rows = longbench(data_dir)
    assert len(rows) > 400
    result = report(rows, load_classifier()([row.text for row in rows]))
    assert result["accuracy"] >= 0.98
    assert result["sure"]["accuracy"] >= 0.98
    assert min(result[task]["recall"] for task in ("localization", "aggregation")) > 0.95


@pytest.mark.slow
def test_training_is_repeatable_and_splits_by_dataset(data_dir: Path) -> None:
    from winnowkv.calibrate.task import Parts, fit, held_out, report
    from winnowkv.calibrate.task_rows import Filler, Row, composed, instructed

    rows = composed(Filler(data_dir, 0))
    assert rows == composed(Filler(data_dir, 0))
    assert instructed(Filler(data_dir, 1)) == instructed(Filler(data_dir, 1))
    parts, all_rows = Parts.of(rows), range(len(rows))
    (weights, biases), (again, same) = fit(parts, rows, all_rows), fit(parts, rows, all_rows)
    assert torch.equal(weights, again)
    assert biases == same
    # What was trained answers as the packaged kind of classifier does.
    profiles = LinearClassifier(weights, biases)([row.text for row in rows])
    assert report(rows, profiles)["accuracy"] > 0.97
    # Labels that depend on nothing but the dataset: a split by row would learn them, a split by dataset cannot.
    coin = [
        Row(f"{row.dataset} {row.text}", "localization" if hash_of(row.dataset) else "aggregation", row.dataset, row.context)
        for row in rows
    ]
    assert report(coin, held_out(Parts.of(coin), coin))["accuracy"] < 0.9


def hash_of(name: str) -> int:
    return sum(map(ord, name)) % 2


def test_weights_of_a_newer_format_and_other_files_are_refused(tmp_path: Path) -> None:
    def saved(name: str, about: dict[str, object], shape: tuple[int, ...] = (2, HASHED_FEATURES)) -> Path:
        save_file({"weights": torch.zeros(shape)}, tmp_path / name, metadata={"winnowkv": json.dumps(about)})
        return tmp_path / name

    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for file, says in (
        (saved("newer.safetensors", {"format": 3}), "format 3, this version reads up to 2"),
        (saved("older.safetensors", {"format": 1, "bias": 0.0}, (2**17,)), "format 1, this version reads 2: train it anew"),
        (saved("one.safetensors", {"format": 2, "biases": [0.0]}), "two biases are missing"),
        (saved("shape.safetensors", {"format": 2, "biases": [0.0, 1]}, (2, 8)), r"\[2, 8\], not \[2, 65536\]"),
        (tmp_path / "broken.safetensors", "is not a task classifier"),
    ):
        with pytest.raises(wk.InputError, match=says):
            wk.task_profile("x", file)
    assert wk.task_profile("x", saved("good.safetensors", {"format": 2, "biases": [0.0, 2.0]})).task == "localization"


def bert(
    folder: Path, labels: list[str], config_class: type = BertConfig, model_class: type = BertForSequenceClassification
) -> Path:
    """A tiny random classifier with a word tokenizer, saved as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "first", "middle", "last"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=514, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
        initializer_range=1.0, pad_token_id=1,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    return folder


def test_a_sequence_classifier_reads_256_tokens_at_each_end(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert", ["aggregation", "localization"])
    text = " ".join(["first"] * 256 + ["middle"] * 400 + ["last"] * 256)
    profile = wk.task_profile(text, folder)
    assert profile == wk.task_profile(text.replace("middle", "first"), folder)
    assert profile != wk.task_profile(text.replace("last", "first"), folder)
    # The same weights with the labels' names exchanged decide the other way.
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "localization", "1": "aggregation"}
    (folder / "config.json").write_text(json.dumps(config))
    load_classifier.cache_clear()
    turned = wk.task_profile(text, folder)
    assert turned.task != profile.task
    assert turned.probability == pytest.approx(profile.probability)


def test_a_roberta_has_fewer_positions_than_its_table(tmp_path: Path) -> None:
    folder = bert(tmp_path / "roberta", ["localization", "aggregation"], RobertaConfig, RobertaForSequenceClassification)
    text = " ".join(["first"] * 400 + ["last"] * 400)
    assert 0.5 <= (wk.task_profile(text, folder).probability or 0) <= 1


@pytest.mark.parametrize(
    ("labels", "localization"),
    [
        (["localization", "aggregation"], 0),
        (["aggregation", "localization"], 1),
        (["other", "task_localization"], 1),
        (["Task-Aggregation", "rest"], 1),
        (["LABEL_0", "LABEL_1"], 0),
    ],
)
def test_the_label_of_localization_is_found_by_name(tmp_path: Path, labels: list[str], localization: int) -> None:
    assert load_classifier(bert(tmp_path / "bert", labels))._localization == localization


def test_blanks_at_the_ends_hide_nothing() -> None:
    text = "Write a summary of the following report.\n\n" + TEXT
    assert sentences(" " * 9000 + text + "\n" * 9000) == sentences(text)


def test_a_classifier_with_three_labels_is_refused(tmp_path: Path) -> None:
    folder = bert(tmp_path / "bert3", ["qa", "summary", "code"])
    with pytest.raises(wk.InputError, match=r"3 labels \(qa, summary, code\): it must have two"):
        wk.task_profile("x", folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a"}\nnot json\n', "line 2: not JSON"),
        ('{"text": "a"}\n\n{"words": "b"}\n', "line 3: field 'text' is missing"),
        ("\n", "holds no prompt"),
    ],
)
def test_prompt_files_are_read(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(wk.InputError, match=says):
        read_rows(file, "prompt", ("text",))


def test_an_unsure_task_falls_back_and_a_sure_one_does_not() -> None:
    unsure, sure = wk.TaskProfile("aggregation", 0.6), wk.TaskProfile("aggregation", 0.9)
    made, model = wk.policy("windowkv"), wk.ModelInfo("Drawn", 4, 4, 2, "")

    def parts(policy: wk.Policy, task: wk.TaskProfile | str) -> tuple[Scorer, Selector]:
        bound = policy.bind(model, wk.PromptInfo(200, 4, 80, wk.TaskProfile.of(task)))
        return bound.parts.scorer, bound.parts.selector

    assert parts(made, unsure) == parts(made, "localization") != parts(made, "aggregation")
    assert parts(made, sure) == parts(made, "aggregation")
    assert parts(wk.policy("windowkv:sure=0.5"), unsure) == parts(made, sure)
    with pytest.raises(wk.PolicyError, match="tokenizer="):
        parts(made, wk.TaskProfile())
