"""``python -m winnowkv.calibrate.task --data DIR``: train the built-in task classifier and report its accuracy.

Training rows are those of :mod:`winnowkv.calibrate.task_rows`. Every dataset and every family of instructions is held out
once: reported predictions come from models that saw no row of it. ``DIR/longbench`` and
``--prompts`` are used only for testing. Needs scikit-learn (``pip install 'winnowkv[test]'``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from winnowkv.calibrate.task_rows import Filler, Row, added_templates, composed, instructed, longbench, read_prompts, templates
from winnowkv.evaluate.report.machine import versions
from winnowkv.prompt.classifier import (
    CLASSIFIER_FORMAT,
    HASHED_FEATURES,
    SHAPE_WEIGHT,
    LinearClassifier,
    ends,
    hashed,
    of_probability,
    sentences,
    shapes,
    units,
)  # fmt: skip
from winnowkv.prompt.task import TASKS, TaskProfile

PACKAGED_WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "task.safetensors"
FOLDS = 5
SURE = 0.75  # as the policies have it
HELD_OUT = {
    "held_out": ("templates", "code"), "held_out_added": ("added",), "held_out_composed": ("ours",), "held_out_file": ("file",),
}  # fmt: skip


@dataclass
class Parts:
    """What prompts are made of: sentences ``[sentences, HASHED_FEATURES]``, shapes ``[rows, HASHED_FEATURES]``, both sparse.

    ``owner`` is each sentence's row; ``said`` is 1 for an instruction, 0 for the text that it is about, -1 if not known.
    """

    sentences: Any
    shapes: Any
    owner: Any
    said: Any

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Parts:
        """Read some rows."""
        found = [[hashed(sentence) for sentence in sentences(row.text)] for row in rows]
        said = [
            -1 if not row.context else int(unit.strip() not in row.context)
            for row in rows for _, _, unit in units(row.text)
        ]  # fmt: skip
        return cls(
            matrix([sentence for row in found for sentence in row]),
            matrix([hashed(shapes(ends(row.text)[1])) for row in rows]) * SHAPE_WEIGHT,
            np.repeat(np.arange(len(rows)), [len(row) for row in found]), np.array(said),
        )  # fmt: skip


def matrix(found: Sequence[Sequence[int]]) -> Any:
    """Lists of features as a sparse matrix with rows of length 1."""
    from scipy.sparse import csr_matrix

    values = [1 / len(row) ** 0.5 for row in found for _ in row]
    places = [at for row in found for at in row]
    return csr_matrix((values, places, list(accumulate(map(len, found), initial=0))), shape=(len(found), HASHED_FEATURES))


def pooled(parts: Parts, weights: Any, bias: float) -> Any:
    """Features of each row: those of its sentences, each with the share that the weights for instructions give it."""
    from scipy.sparse import csr_matrix

    likely = 1 / (1 + np.exp(-np.maximum(parts.sentences @ weights + bias, -30.0)))
    rows = parts.shapes.shape[0]
    shares = likely / np.bincount(parts.owner, weights=likely, minlength=rows)[parts.owner]
    return (
        csr_matrix((shares, (parts.owner, np.arange(len(shares)))), shape=(rows, len(shares))) @ parts.sentences + parts.shapes
    )


def fit(parts: Parts, rows: Sequence[Row], seen: Sequence[int]) -> tuple[torch.Tensor, list[float]]:
    """Weights ``[2, HASHED_FEATURES]`` and biases of :class:`LinearClassifier`, trained on the rows ``seen``."""
    from sklearn.linear_model import LogisticRegression

    known = np.isin(parts.owner, seen) & (parts.said >= 0)
    first = LogisticRegression(C=30.0, solver="liblinear", random_state=0)
    first.fit(parts.sentences[known], parts.said[known])
    features = pooled(parts, first.coef_[0], float(first.intercept_[0]))[np.asarray(seen)]
    second = LogisticRegression(C=600.0, class_weight="balanced", solver="liblinear", random_state=0)
    second.fit(features, [rows[at].task == TASKS[0] for at in seen])
    weights = torch.from_numpy(np.stack([first.coef_[0], second.coef_[0]])).half()
    return weights, [float(first.intercept_[0]), float(second.intercept_[0])]


def held_out(parts: Parts, rows: Sequence[Row]) -> list[TaskProfile]:
    """A prediction for every row, by one of ``FOLDS`` models that saw no row of its dataset or family."""
    from sklearn.model_selection import GroupKFold

    predictions = [TaskProfile()] * len(rows)
    folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
    for seen, unseen in folds.split(parts.shapes, groups=[row.dataset for row in rows]):
        weights, biases = fit(parts, rows, seen)
        first, second = weights.float().numpy()
        logits = pooled(parts, first, biases[0])[unseen] @ second + biases[1]
        for at, logit in zip(unseen, logits, strict=True):
            predictions[at] = of_probability(float(1 / (1 + np.exp(-logit))))
    return predictions


def report(rows: Sequence[Row], profiles: Sequence[TaskProfile]) -> dict[str, Any]:
    """Accuracy, recall and F1 of each task, the confusion matrix (rows are true tasks), accuracy of each dataset group.

    ``sure`` is the accuracy and the confusion matrix when less than 75% sure counts as localization, as the policies have it.
    """
    from sklearn.metrics import classification_report, confusion_matrix

    truth, predictions = [row.task for row in rows], [str(profile.task) for profile in profiles]
    sure = [profile.decided("report", SURE, "localization") for profile in profiles]
    scores = classification_report(truth, predictions, labels=list(TASKS), output_dict=True, zero_division=0)
    groups: dict[str, list[bool]] = {}
    for row, predicted in zip(rows, predictions, strict=True):
        groups.setdefault(row.dataset, []).append(row.task == predicted)
    return {
        "rows": len(rows),
        "accuracy": sum(a == b for a, b in zip(truth, predictions, strict=True)) / len(rows),
        **{task: {"recall": scores[task]["recall"], "f1": scores[task]["f1-score"]} for task in TASKS},
        "confusion": confusion_matrix(truth, predictions, labels=list(TASKS)).tolist(),
        "sure": {
            "accuracy": sum(a == b for a, b in zip(truth, sure, strict=True)) / len(rows),
            "confusion": confusion_matrix(truth, sure, labels=list(TASKS)).tolist(),
        },
        "by_dataset": {name: f"{sum(right)} of {len(right)}" for name, right in sorted(groups.items())},
    }


def train(
    data: Annotated[Path, typer.Option(help="Folder with task_classifier/, needle/, longbench/ and longbench_config/.")],
    out: Annotated[Path, typer.Option(help="File for the weights.")] = PACKAGED_WEIGHTS,
    prompts: Annotated[Path | None, typer.Option(help="JSON file of further prompts to test on.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of fillings and composed prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the task classifier; report it on held-out datasets and on LongBench."""
    filler = Filler(data, seed)
    rows = [*templates(data, filler), *added_templates(data, filler), *composed(filler), *instructed(filler)]
    parts = Parts.of(rows)
    predictions = held_out(parts, rows)
    result = {}
    for name, sources in HELD_OUT.items():
        mine = [at for at, row in enumerate(rows) if row.dataset.split("/")[0] in sources]
        result[name] = report([rows[at] for at in mine], [predictions[at] for at in mine])
    weights, biases = fit(parts, rows, range(len(rows)))
    classifier = LinearClassifier(weights, biases)
    tests = {"longbench": longbench(data), **({} if prompts is None else {"prompts": read_prompts(prompts)})}
    for name, those in tests.items():
        result[name] = report(those, classifier([row.text for row in those]))
    about = {
        "format": CLASSIFIER_FORMAT, "biases": biases, "features": HASHED_FEATURES, "seed": seed, "rows": len(rows),
        "versions": versions(),
        "held_out": result["held_out"]["accuracy"], "longbench": result["longbench"]["accuracy"],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weights": weights}, out, metadata={"winnowkv": json.dumps(about)})
    if as_json:
        print(json.dumps({"weights": str(out), "bytes": out.stat().st_size, **result}, indent=2))
        return
    for name, scores in result.items():
        sure = f"{100 * scores['sure']['accuracy']:.1f}% if unsure is localization"
        print(f"{name}: {100 * scores['accuracy']:.1f}% of {scores['rows']} rows; {sure}")
        both = zip(TASKS, scores["confusion"], scores["sure"]["confusion"], strict=True)
        for task, (first, second), (third, fourth) in both:
            recall, f1 = scores[task]["recall"], scores[task]["f1"]
            print(f"  {task}: recall {recall:.3f}, F1 {f1:.3f}; called loc. {first}, agg. {second}; if sure {third}, {fourth}")
    print("LongBench: " + ", ".join(f"{name} {right}" for name, right in result["longbench"]["by_dataset"].items()))
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    typer.run(train)
