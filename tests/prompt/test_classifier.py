"""The task classifier: what it reads, what it decides, how it is trained, and what is refused."""

from __future__ import annotations

import json
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
from winnowkv.prompt.classifier import EDGE_WORDS, HASHED_FEATURES, WORDS_PER_END, load_classifier, pieces, vectorizer

TEXT = " ".join(f"w{i}" for i in range(5000))


def test_it_reads_both_ends_and_nothing_between() -> None:
    read = set(pieces(TEXT))
    assert {"<w0", ">w4999", "=w0 w1", f"w{EDGE_WORDS}", f"w{WORDS_PER_END - 1}", f"w{5000 - WORDS_PER_END}"} <= read
    assert f"w{WORDS_PER_END}" not in read
    assert "w2500" not in read
    changed = TEXT.replace("w2500", "question")
    assert (vectorizer().transform([TEXT]) != vectorizer().transform([changed])).nnz == 0


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
    from winnowkv.calibrate.task import longbench, report

    rows = longbench(data_dir)
    assert len(rows) > 400
    result = report(rows, [str(p.task) for p in load_classifier()([row.text for row in rows])])
    assert result["accuracy"] >= 0.97
    assert min(result[task]["recall"] for task in ("localization", "aggregation")) > 0.9


@pytest.mark.slow
def test_training_is_repeatable_and_splits_by_dataset(data_dir: Path) -> None:
    from winnowkv.calibrate.task import Filler, Row, composed, fit, held_out, report

    filler = Filler(data_dir, 0)
    rows = composed(filler)
    assert rows == composed(Filler(data_dir, 0))
    features = vectorizer().transform([row.text for row in rows])
    weights, bias = fit(features, rows)
    again, same = fit(features, rows)
    assert torch.equal(weights, again)
    assert bias == same
    # Labels that depend on nothing but the dataset: a split by row would learn them, a split by dataset cannot.
    coin = [
        Row(f"{row.dataset} {row.text}", "localization" if hash_of(row.dataset) else "aggregation", row.dataset) for row in rows
    ]
    assert report(coin, held_out(coin))["accuracy"] < 0.9


def hash_of(name: str) -> int:
    return sum(map(ord, name)) % 2


def test_weights_of_a_newer_format_and_other_files_are_refused(tmp_path: Path) -> None:
    newer, broken = tmp_path / "newer.safetensors", tmp_path / "broken.safetensors"
    save_file({"weights": torch.zeros(HASHED_FEATURES)}, newer, metadata={"winnowkv": json.dumps({"format": 2, "bias": 0.0})})
    broken.write_bytes(b"nothing")
    with pytest.raises(wk.InputError, match="format 2, this version reads up to 1"):
        wk.task_profile("x", newer)
    with pytest.raises(wk.InputError, match="is not a task classifier"):
        wk.task_profile("x", broken)


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
    assert list(pieces(" " * 9000 + text + "\n" * 9000)) == list(pieces(text))


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
