"""Pictures of needle results and of calibration profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from winnowkv.profile import Profile


def head_map(profile: Profile, file: Path) -> None:
    """Layer x head maps of both retrieval scores, and the layers' shares of the eviction error, as PNG."""
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


def depth_map(groups: Sequence[dict[str, Any]], file: Path) -> None:
    """A heat map of accuracy, depth x policy, one panel for each length and budget, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(g["length"] for g in groups))
    budgets = list(dict.fromkeys(g["budget"] for g in groups))
    policies = list(dict.fromkeys(g["policy"] for g in groups))
    depths = sorted({float(d) for g in groups for d in g["accuracy_by_depth"]})
    width = max(1.0 * len(policies) + 1.5, 4)
    figure = Figure(figsize=(width * len(budgets), (0.5 * len(depths) + 2.2) * len(lengths)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(lengths), len(budgets), squeeze=False)
    for r, length in enumerate(lengths):
        for c, budget in enumerate(budgets):
            found = {g["policy"]: g["accuracy_by_depth"] for g in groups if (g["length"], g["budget"]) == (length, budget)}
            cells = [[found.get(p, {}).get(str(d), float("nan")) for p in policies] for d in depths]
            panel = panels[r][c]
            image = panel.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, row in enumerate(cells):
                for x, value in enumerate(row):
                    if value == value:  # not NaN
                        panel.text(
                            x,
                            y,
                            f"{100 * value:.0f}",
                            ha="center",
                            va="center",
                            fontsize=9,
                            color="white" if value < 0.6 else "black",
                        )
            panel.set_xticks(range(len(policies)), [p.replace(":", "\n") for p in policies], rotation=30, ha="right")
            panel.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
            panel.set_ylabel("depth of the needle")
            kept = f"{100 * budget:g}%" if isinstance(budget, float) else f"{budget} entries"
            panel.set_title(f"{length} tokens, {kept} kept")
    figure.colorbar(image, ax=panels, label="needles found", shrink=0.8)
    figure.savefig(file, dpi=120)
