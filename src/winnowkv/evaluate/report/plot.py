"""Pictures of needle results and of calibration profiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnowkv.budget import Asked, budget_text
from winnowkv.models.calibration import CalibrationProfile

METRIC_LABELS = {
    "correct": "prompts answered", "found": "needles found", "rouge1_f1": "ROUGE-1 F1", "rouge1_recall": "ROUGE-1 recall",
}  # fmt: skip
MAX_FIGURE_INCHES = 15  # width of a figure; further panels go in the next row
MAX_NUMBERED_LENGTHS = 8  # a panel with more lengths shows colours only
MARKERS = "osD^vP*XhpdH"
DASHES = ("-", "--", ":")


def head_map(profile: CalibrationProfile, file: Path) -> None:
    """Draw layer x head maps of both retrieval scores, and the layers' shares of the eviction error, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, heads = len(profile.semantic), len(profile.semantic[0])
    size = (max(0.3 * heads, 2.5) * 2 + 4, max(0.16 * layers + 1.5, 3))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 0.6))
    for panel, kind in ((left, "semantic"), (middle, "traditional")):
        image = panel.imshow(getattr(profile, kind), cmap="viridis", aspect="auto", vmin=0)
        figure.colorbar(image, ax=panel, shrink=0.7)
        panel.set_title(f"{kind} retrieval score")
        panel.set_xlabel("query head")
    left.set_ylabel("layer")
    right.barh(range(layers), profile.errors, color="tab:gray")
    right.set_title("eviction error, share")
    figure.suptitle(f"{profile.model}: {profile.about.get('answered')} answered prompts")
    figure.savefig(file, dpi=120)


def needle_maps(groups: Sequence[dict[str, Any]], metric: str, file: Path) -> None:
    """Draw length x depth heat maps of a metric, a panel for each policy and budget, as PNG; ``groups`` of a needle summary."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths, depths = sorted(distinct(groups, "length")), sorted({float(d) for g in groups for d in g["by_depth"][metric]})
    cell = (0.42, 0.26) if len(lengths) <= MAX_NUMBERED_LENGTHS else (0.22, 0.18)
    width, height = max(cell[0] * len(lengths), 0.9) + 1.1, max(cell[1] * len(depths), 0.8) + 1.0
    sections = map_sections(groups)
    columns = min(len(sections[0]), max(int(MAX_FIGURE_INCHES / width), 1))
    rows_each = math.ceil(len(sections[0]) / columns)
    figure = Figure(figsize=(max(width * columns + 1.2, 5), height * rows_each * len(sections) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows_each * len(sections), columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for number, section in enumerate(sections):
        for place, mine in enumerate(section):
            if mine:
                panel = panels[number * rows_each + place // columns][place % columns]
                image = draw_map(panel, mine, metric, lengths, depths)
    bar = figure.colorbar(image, ax=panels, shrink=min(3 / figure.get_figheight(), 0.9), aspect=20)
    bar.set_label(METRIC_LABELS[metric], fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel("prompt tokens", fontsize=8)
    figure.supylabel("depth", fontsize=8)
    figure.savefig(file, dpi=120)


def map_sections(groups: Sequence[dict[str, Any]]) -> list[list[list[dict[str, Any]]]]:
    """The groups of each panel: a section for each budget, or for each policy if there are more budgets than policies.

    A policy that evicts nothing is the same at every budget: it has a panel in the first section and an empty place in
    the others.
    """
    whole = distinct([g for g in groups if not g["evicts"]], "policy")
    evicting = [g for g in groups if g["evicts"]]
    policies, budgets = distinct(evicting, "policy"), distinct(evicting, "budget")

    def panel(policy: str, budget: Asked) -> list[dict[str, Any]]:
        return [g for g in evicting if g["policy"] == policy and same(g["budget"], budget)]

    if len(policies) >= len(budgets):
        sections = [[panel(policy, budget) for policy in policies] for budget in budgets]
    else:
        sections = [[panel(policy, budget) for budget in budgets] for policy in policies]
    first: list[list[dict[str, Any]]] = [[g for g in groups if g["policy"] == policy] for policy in whole]
    empty: list[list[dict[str, Any]]] = [[] for _ in whole]
    return [(empty if number else first) + section for number, section in enumerate(sections or [[]])]


def draw_map(panel: Any, groups: Sequence[dict[str, Any]], metric: str, lengths: Sequence[int], depths: Sequence[float]) -> Any:
    """One panel: a policy and budget, with its mean in the title."""
    scores = {(g["length"], float(depth)): score for g in groups for depth, score in g["by_depth"][metric].items()}
    cells = [[scores.get((length, depth), math.nan) for length in lengths] for depth in depths]
    panel.set_axis_on()
    image = panel.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (length, depth), score in scores.items() if len(lengths) <= MAX_NUMBERED_LENGTHS else ():
        at, color = (lengths.index(length), depths.index(depth)), "white" if score < 0.6 else "black"
        panel.text(*at, f"{100 * score:.0f}", ha="center", va="center", fontsize=7, color=color)
    panel.set_xticks(range(len(lengths)), [tokens_label(length) for length in lengths], rotation=45, fontsize=7)
    panel.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
    mean = sum(scores.values()) / len(scores)
    kept = f"{budget_label(groups[0]['budget'])}: " if groups[0]["evicts"] else ""
    panel.set_title(f"{groups[0]['policy'].replace(':', chr(10))}\n{kept}{100 * mean:.0f}%", fontsize=8)
    return image


def kept_lines(groups: Sequence[dict[str, Any]], metric: str, file: Path) -> None:
    """Draw a metric against the kept fraction of the cache's bytes, a line for each policy, a panel for each length, as PNG.

    A policy that evicts nothing is a horizontal line if it keeps all bytes, else (quantized) a point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    lengths, policies = sorted(distinct(groups, "length")), distinct(groups, "policy")
    columns = min(len(lengths), 3)
    rows = math.ceil(len(lengths) / columns)
    figure = Figure(figsize=(max(4 * columns, 5) + 2.5, max(3.2 * rows, 0.2 * len(policies) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(lengths) :]:
        panel.set_axis_off()
    for panel, length in zip(panels.flat, lengths, strict=False):
        for number, policy in enumerate(policies):
            draw_line(panel, [g for g in groups if (g["policy"], g["length"]) == (policy, length)], metric, number)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f"{100 * kept:.3g}%"))
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.set_ylim(-0.04, 1.04)
        panel.grid(alpha=0.3)
        panel.set_title(f"{length} tokens", fontsize=9)
    handles = {text: line for panel in panels.flat for line, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8, frameon=False)
    figure.supxlabel("kept of the cache's bytes", fontsize=9)
    figure.supylabel(METRIC_LABELS[metric], fontsize=9)
    figure.savefig(file, dpi=120)


def draw_line(panel: Any, groups: Sequence[dict[str, Any]], metric: str, number: int) -> None:
    """Draw one policy at one length; ``number`` chooses colour, marker and dashes."""
    if not groups:
        return
    points = sorted({(g["kept_bytes"] / g["full_bytes"], g[metric]) for g in groups})
    if not groups[0]["evicts"] and points[0][0] >= 1:
        panel.axhline(points[0][1], color="black", linewidth=1.2, label=groups[0]["policy"])
        return
    look = {
        "color": f"C{number % 10}",
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number // 10 % len(DASHES)],
    }
    panel.plot(*zip(*points, strict=True), label=groups[0]["policy"], markersize=5, linewidth=1.2, alpha=0.85, **look)


def distinct(groups: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """Values of a field, each once, in order; 1 entry and the fraction 1.0 are two."""
    return list({(type(g[name]), g[name]): g[name] for g in groups}.values())


def same(one: Asked, other: Asked) -> bool:
    """Whether two budgets are the same budget."""
    return type(one) is type(other) and one == other


def budget_label(budget: Asked) -> str:
    """A budget as text: ``12% kept``, ``128 entries``."""
    return budget_text(budget) + (" kept" if isinstance(budget, float) else "")


def tokens_label(tokens: int) -> str:
    """A length, in thousands if it is a multiple of 100."""
    return f"{tokens / 1000:g}k" if tokens >= 1000 and tokens % 100 == 0 else str(tokens)
