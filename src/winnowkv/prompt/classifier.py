"""The built-in task classifier, and any Hugging Face sequence classifier in its place.

WindowKV (arXiv 2503.17922) tells localization from aggregation with a BERT. The built-in one is
a hashed n-gram linear model: it reads the outermost sentences of both ends, and listens to those that read
like an instruction. It needs no GPU.
``python -m winnowkv.calibrate.task`` trains it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import cast
from zlib import crc32

import torch
from torch import Tensor, nn

from winnowkv.errors import InputError
from winnowkv.files import parse_json, reason
from winnowkv.prompt.task import TASKS, Task, TaskProfile

CLASSIFIER_FORMAT = 2
HASHED_FEATURES = 2**16
WORDS_PER_END = 256  # read at each end
UNITS_PER_END = 4  # sentences or lines nearest to each end: instructions stand there
SHAPE_WEIGHT = 0.5
WORDS_PER_UNIT = 32  # read of each of them
TOKENS_PER_END = 256  # read at each end by a Hugging Face classifier, as in the paper
STEM = 5  # letters by which words of one stem are told to be alike
WORD = re.compile(r"\w+|[^\w\s]")
BREAK = re.compile(r"[^\S\n]*\n\s*|(?<=[.!?])[\"')\]]*\s+")
# What chat templates put around turns, whether or not a tokenizer left their special tokens out.
TURN = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>")
ROLE = re.compile(r"^(?:system|user|assistant|model|human)\s*:?[^\S\n]*$", re.M | re.I)
CODE_LINE = re.compile(
    r"^\s*(?:def |class |import |from \w+ import |return\b|for .*:|if .*:|@\w|#|//)|[;{}]$|\w\(.*\)$|^\s*[\w.]+ = "
)
MEAN_WORD_LIMIT = 24  # characters a word has at the most, on average: how much text is cut into words at all


def sentences(text: str) -> list[list[str]]:
    """Words, word pairs and shapes of the sentences at both ends, a list for each; all that is seen, besides :func:`shapes`."""
    return [list(unit_pieces(mark, min(rank, 2), unit)) for mark, rank, unit in units(text)]


def units(text: str) -> list[tuple[str, int, str]]:
    """The outermost sentences of both ends: which end, how far from it, and what it says."""
    head, tail = ends(text)
    first, last = cut(head)[:UNITS_PER_END], cut(tail)[-UNITS_PER_END:][::-1]
    return [(mark, rank, unit) for mark, found in (("<", first), (">", last)) for rank, unit in enumerate(found)]


def ends(text: str) -> tuple[str, str]:
    """Both ends of a text, without chat templates' marks."""
    reach = WORDS_PER_END * MEAN_WORD_LIMIT
    text = text.strip()  # before the cut: blanks at an end must not hide the words next to them
    return unframed(text[:reach]), unframed(text[-reach:])


def unframed(text: str) -> str:
    """A text without the marks and the roles of chat templates."""
    return ROLE.sub("", TURN.sub("\n", text)).strip()


def cut(text: str) -> list[str]:
    """Sentences and lines."""
    return [unit for unit in BREAK.split(text) if unit and unit.strip()]


def unit_pieces(mark: str, rank: int, unit: str) -> Iterable[str]:
    """What one sentence says, marked by where it stands, and how it begins and ends."""
    words = WORD.findall(unit.lower())
    start, words = words[:3], words[:WORDS_PER_UNIT] if mark == "<" else words[-WORDS_PER_UNIT:]
    for word in words:
        yield f"{mark}{rank}{word}"
        yield "=" + word  # anywhere: an instruction may stand at the other end next time
        yield "~" + word[:STEM]
    for one, two in pairwise(words):
        yield f"{mark}{one} {two}"
        yield f"={one} {two}"
    for count in range(1, len(start) + 1):
        yield f"^{' '.join(start[:count])}"
        yield f"{mark}{rank}^{' '.join(start[:count])}"
    if words:
        yield f"{mark}{rank}${words[-1]}"
        yield f"^{start[0]}${words[-1]}"
        yield f"{mark}{rank}#{min(len(words) // 4, 8)}"


def shapes(text: str) -> Iterable[str]:
    """Whether the last lines are code, and how many lines before them begin or end like the last one, as examples do."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return
    last = WORD.findall(lines[-1].lower()) or [""]
    others = [WORD.findall(line.lower()) for line in lines[:-1]]
    begin = sum(words[:1] == last[:1] for words in others)
    inside = sum(last[-1] in words for words in others) if not last[-1].isalnum() else 0
    yield f"begins*{min(begin, 4)}"
    yield f"holds{last[-1]}*{min(inside, 4)}"
    yield f"code*{sum(bool(CODE_LINE.search(line)) for line in lines[-4:])}"
    yield f"last code*{bool(CODE_LINE.search(lines[-1]))}"


def hashed(pieces: Iterable[str]) -> list[int]:
    """Places of pieces in the weights, each once."""
    return sorted({crc32(piece.encode("utf-8", "replace")) % HASHED_FEATURES for piece in pieces})


class LinearClassifier:
    """Weights ``[2, HASHED_FEATURES]`` and two biases.

    The first row tells instructions from the text that they are about, the second localization (above zero) from
    aggregation; each sentence votes by the second, with the share that the first gives it.
    """

    def __init__(self, weights: Tensor, biases: Sequence[float]) -> None:
        self._weights = weights.float()
        self._biases = biases

    def shares(self, units: Sequence[Sequence[int]]) -> list[float]:
        """How much each sentence is listened to; they add up to 1."""
        odds = [float(self._weights[0, unit].sum()) / max(len(unit), 1) ** 0.5 + self._biases[0] for unit in units]
        likely = [1 / (1 + exp(-max(odd, -30.0))) for odd in odds]
        return [one / sum(likely) for one in likely]

    def logit(self, text: str) -> float:
        """Log odds of localization."""
        units, last = [hashed(unit) for unit in sentences(text)], hashed(shapes(ends(text)[1]))
        shares = [*self.shares(units), SHAPE_WEIGHT]
        votes: list[float] = [
            share * float(self._weights[1, unit].sum()) / max(len(unit), 1) ** 0.5
            for share, unit in zip(shares, [*units, last], strict=True)
        ]
        return self._biases[1] + sum(votes)

    def __call__(self, texts: Sequence[str]) -> list[TaskProfile]:
        """Task and probability of each text."""
        return [of_probability(p) for p in torch.tensor([self.logit(text) for text in texts]).sigmoid().tolist()]


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
    if type(found) is not int:
        raise fail("its format is missing")
    if found < CLASSIFIER_FORMAT:
        raise InputError(
            f"{source} has format {found}, this version reads {CLASSIFIER_FORMAT}: "
            f"train it anew (python -m winnowkv.calibrate.task)"
        )
    if found > CLASSIFIER_FORMAT:
        raise InputError(f"{source} has format {found}, this version reads up to {CLASSIFIER_FORMAT}: update winnowkv")
    biases = about.get("biases")
    if not isinstance(biases, list) or len(biases) != 2 or not all(isinstance(bias, int | float) for bias in biases):
        raise fail("its two biases are missing")
    if weights.shape != (2, HASHED_FEATURES) or not weights.is_floating_point() or not bool(weights.isfinite().all()):
        raise fail(f"its weights are {weights.dtype} {list(weights.shape)}, not [2, {HASHED_FEATURES}] finite numbers")
    return LinearClassifier(weights, biases)


def task_profile(text: str, classifier: str | Path | None = None) -> TaskProfile:
    """What a prompt asks for, with the classifier's probability, 0.5 to 1.

    ``classifier``: None for the built-in one, else as :func:`load_classifier` takes it.
    Raises InputError if it cannot be used.
    """
    return load_classifier(classifier)([text])[0]
