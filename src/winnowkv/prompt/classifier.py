"""The built-in task classifier, and any Hugging Face sequence classifier in its place.

WindowKV (arXiv 2503.17922) tells localization from aggregation with a BERT. The built-in one is
a hashed n-gram linear model: it reads the first and last 256 words and needs no GPU.
``python -m winnowkv.calibrate.task`` trains it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from winnowkv.errors import InputError
from winnowkv.files import parse_json, reason
from winnowkv.prompt.task import TASKS, Task, TaskProfile

CLASSIFIER_FORMAT = 1
HASHED_FEATURES = 2**17
WORDS_PER_END = 256  # read at each end
EDGE_WORDS = 48  # of these, the words nearest to the ends, where instructions stand, count apart from the rest
TOKENS_PER_END = 256  # read at each end by a Hugging Face classifier, as in the paper
WORD = re.compile(r"\w+|[^\w\s]")
MEAN_WORD_LIMIT = 24  # characters a word has at the most, on average: how much text is cut into words at all


def pieces(text: str) -> Iterable[str]:
    """Words and word pairs of both ends, marked by where they stand; this is all that the classifier sees."""
    reach = WORDS_PER_END * MEAN_WORD_LIMIT
    text = text.strip()  # before the cut: blanks at an end must not hide the words next to them
    head = WORD.findall(text[:reach].lower())[:WORDS_PER_END]
    tail = WORD.findall(text[-reach:].lower())[-WORDS_PER_END:]
    for mark, words in (("<", head[:EDGE_WORDS]), (">", tail[-EDGE_WORDS:])):
        for word in words:
            yield mark + word
            yield "=" + word  # at either end: an instruction may stand at the other one next time
        for first, second in pairwise(words):
            yield f"{mark}{first} {second}"
            yield f"={first} {second}"
    yield from head[EDGE_WORDS:]
    yield from tail[:-EDGE_WORDS]


def vectorizer() -> Any:
    """The features, the same for training and for use. Imported late: scikit-learn takes a second."""
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(n_features=HASHED_FEATURES, analyzer=pieces, alternate_sign=False, norm="l2", binary=True)


class LinearClassifier:
    """Weights ``[HASHED_FEATURES]`` and a bias; above zero is localization."""

    def __init__(self, weights: Tensor, bias: float) -> None:
        self._weights = weights.float().numpy()
        self._bias = bias
        self._features = vectorizer()

    def __call__(self, texts: Sequence[str]) -> list[TaskProfile]:
        """Task and probability of each text."""
        logits = torch.from_numpy(self._features.transform(texts) @ self._weights) + self._bias
        return [of_probability(p) for p in logits.sigmoid().tolist()]


class SequenceClassifier:
    """A Hugging Face sequence classifier with two labels; reads the first and last 256 tokens.

    A label with localization or aggregation in its name is taken by it, else the first is localization.
    Raises InputError for a model that cannot be loaded or has other than two labels.
    """

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._model = AutoModelForSequenceClassification.from_pretrained(str(path)).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(str(path))
        except Exception as error:  # what a broken config or tokenizer raises differs from model to model
            raise InputError(f"classifier {path} cannot be loaded: {reason(error)}") from None
        names = [str(name).lower() for _, name in sorted(self._model.config.id2label.items())]
        if len(names) != 2:
            raise InputError(
                f"classifier {path} has {len(names)} labels ({', '.join(names)}): it must have two, "
                f"localization and aggregation"
            )
        named = [name for name in names if "localization" in name] or [name for name in names if "aggregation" not in name]
        self._localization = names.index((named or names)[0])
        self._positions = positions(self._model)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[TaskProfile]:
        """Task and probability of each text."""
        profiles = []
        for text in texts:
            encoded = self._tokenizer(text, return_special_tokens_mask=True)
            special = [bool(flag) for flag in encoded["special_tokens_mask"]]
            begin = special.index(False) if False in special else len(special)
            end = len(special) - (special[::-1].index(False) if False in special else 0)
            ids, opening, closing = encoded["input_ids"][begin:end], encoded["input_ids"][:begin], encoded["input_ids"][end:]
            half = min(TOKENS_PER_END, (self._positions - len(opening) - len(closing)) // 2)
            whole = opening + (ids if len(ids) <= 2 * half else ids[:half] + ids[-half:]) + closing
            probabilities = self._model(input_ids=torch.tensor([whole])).logits[0].softmax(-1)
            profiles.append(of_probability(float(probabilities[self._localization])))
        return profiles


def positions(model: nn.Module) -> int:
    """Tokens that a classifier has positions for; RoBERTa's kind leaves those up to its padding id unused."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return 2 * TOKENS_PER_END + 64  # relative or rotary positions: no table to run out of


def of_probability(localization: float) -> TaskProfile:
    """The likelier task, with its probability."""
    task = TASKS[0] if localization >= 0.5 else TASKS[1]
    return TaskProfile(cast(Task, task), max(localization, 1 - localization))


@lru_cache(maxsize=4)
def load_classifier(path: str | Path | None = None) -> LinearClassifier | SequenceClassifier:
    """The built-in classifier, another weights file (``.safetensors``), or a Hugging Face classifier's folder or hub id."""
    if path is not None and not str(path).endswith(".safetensors"):
        return SequenceClassifier(path)
    from safetensors import SafetensorError, safe_open

    source = Path(str(path or files("winnowkv") / "data" / "task.safetensors"))

    def fail(why: str) -> InputError:
        return InputError(f"{source} is not a task classifier: {why}")

    try:
        with safe_open(source, framework="pt") as file:
            text = (file.metadata() or {})["winnowkv"]
            weights = file.get_tensor("weights")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise fail(reason(error)) from None
    about = parse_json(text, fail)
    found = about.get("format") if isinstance(about, dict) else None
    if type(found) is not int or not isinstance(bias := about.get("bias"), int | float):
        raise fail("its format or its bias is missing")
    if found > CLASSIFIER_FORMAT:
        raise InputError(f"{source} has format {found}, this version reads up to {CLASSIFIER_FORMAT}: update winnowkv")
    if weights.shape != (HASHED_FEATURES,) or not weights.is_floating_point() or not bool(weights.isfinite().all()):
        raise fail(f"its weights are {weights.dtype} {list(weights.shape)}, not {HASHED_FEATURES} finite numbers")
    return LinearClassifier(weights, bias)


def task_profile(text: str, classifier: str | Path | None = None) -> TaskProfile:
    """What a prompt asks for, with the classifier's probability, 0.5 to 1.

    ``classifier``: None for the built-in one, else as :func:`load_classifier` takes it.
    Raises InputError if it cannot be used.
    """
    return load_classifier(classifier)([text])[0]
