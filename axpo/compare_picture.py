"""A comparison as bars: Pass@1 of each model by family, and Pass@k as an outline above it."""

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure  # without pyplot: no window system, no state

from axpo.scores import spread

if TYPE_CHECKING:
    from axpo.compare import Comparison

_WIDTH = 0.8  # of a family's bars together


def draw(comparison: "Comparison", path: Path) -> None:
    """Writes the picture in the format of the file's name; whiskers are the standard deviation over repeats."""
    models = {model: comparison.averages(model) for model in comparison.results}
    groups = list(next(iter(models.values())))
    figure = Figure(figsize=(1.5 + 1.7 * len(groups), 3.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = _WIDTH / len(models)
    for index, (model, means) in enumerate(models.items()):
        places = [group - _WIDTH / 2 + (index + 0.5) * width for group in range(len(groups))]
        ones, many = ([spread(getattr(means[group], name)) for group in groups] for name in ("pass_1", "pass_k"))
        colour = f"C{index}"
        whiskers = [100 * (deviation or 0.0) for _, deviation in ones]
        axes.bar(places, [100 * mean for mean, _ in ones], width, color=colour, label=model, yerr=whiskers, capsize=2)
        axes.bar(places, [100 * mean for mean, _ in many], width, fill=False, edgecolor=colour)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(f"Pass@1 (filled), Pass@{comparison.k}, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)
