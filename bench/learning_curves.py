"""Learning curves of recipes over several seeds, side by side: what AXPO's extra continuations are worth.

    python bench/learning_curves.py [mini mini-grpo] [--seeds 4] [--every 5] [--dir build/bench/curves]

Each recipe (several joined by `+` compose, as in `mini+arpo`) is trained with every seed by `axpo.train`, one run after
the other, and evaluated on the same held-out questions every few steps. Prints the held-out Pass@1 and tool-use rate by
step, mean and standard deviation over seeds, and each seed's difference to the last recipe; writes curves.png and
curves.json to --dir. A run that is there is resumed, a finished one is read.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from axpo.sheet import Sheet, print_sheets

MEASURES = {"pass@1": "Pass@1", "tool/rate": "tool-use rate"}
Curve = dict[int, dict[str, float]]
"""The held-out measures of a run by step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["mini", "mini-grpo"], help="the last one is the baseline")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dir", type=Path, default=Path("build/bench/curves"))
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    runs = [(recipe, seed) for seed in range(args.seeds) for recipe in args.recipes]
    curves: dict[str, list[Curve]] = {recipe: [] for recipe in args.recipes}
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=len(runs) * args.steps)
        for index, (recipe, seed) in enumerate(runs):
            bar.update(task, description=f"{recipe}, seed {seed}", completed=index * args.steps)
            curve = train(recipe, seed, args, lambda step, i=index: bar.update(task, completed=i * args.steps + step))
            curves[recipe].append(curve)
        bar.update(task, completed=len(runs) * args.steps)
    print_sheets(sheets(curves))
    (args.dir / "curves.json").write_text(json.dumps(curves, indent=1))
    draw(curves, args.dir / "curves.png")
    print(f"plot: {args.dir / 'curves.png'}")


def train(recipe: str, seed: int, args: argparse.Namespace, tick: Callable[[int], None]) -> Curve:
    """The held-out measures of one run, which is made, or gone on with, where it is not there."""
    name = f"{recipe.replace('+', '-')}-seed{seed}"
    path = args.dir / name
    if not (path / "policy" / "config.json").is_file():
        options = {"run.name": name, "run.dir": args.dir, "run.seed": seed, "run.steps": args.steps}
        options |= {"eval.every": args.every, "log.tensorboard": "false", "log.console": "false"}
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        if path.exists():
            words.append("--run.resume")
        with (args.dir / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "axpo.train", *recipe.split("+"), *words]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(1)
                    tick(_steps(path / "metrics.jsonl"))
            finally:
                process.terminate()
                process.wait()
        if process.returncode:
            sys.exit(f"{name} ended with {process.returncode}:\n{Path(log.name).read_text()[-2000:]}")
    read = [json.loads(file.read_text()) for file in sorted((path / "evaluation").glob("step_*.json"))]
    return {one["step"]: {measure: one["summary"][measure] for measure in MEASURES} for one in read}


def _steps(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def sheets(curves: dict[str, list[Curve]]) -> list[Sheet]:
    """By measure: every recipe by step, then each seed's difference to the last recipe."""
    steps = list(next(iter(curves.values()))[0])
    seeds = len(next(iter(curves.values())))
    baseline = list(curves)[-1]
    shown = []
    for measure, title in MEASURES.items():
        rows = [
            [recipe, *(_spread([run[step][measure] for run in runs]) for step in steps)]
            for recipe, runs in curves.items()
        ]
        for recipe in list(curves)[:-1]:
            pairs = list(zip(curves[recipe], curves[baseline], strict=True))
            for seed, (one, other) in enumerate(pairs):
                changes = [f"{100 * (one[step][measure] - other[step][measure]):+.1f}" for step in steps]
                rows.append([f"  {recipe} − {baseline}, seed {seed}", *changes])
        columns = ["step", *map(str, steps)]
        shown.append(Sheet(f"held-out {title}, %: mean ± standard deviation over {seeds} seeds", columns, rows))
    return shown


def _spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """A panel a measure: the mean over seeds as a line, their lowest and highest as a band."""
    figure = Figure(figsize=(4.6 * len(MEASURES), 3.2), dpi=150, layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for index, (recipe, runs) in enumerate(curves.items()):
            steps = list(runs[0])
            values = [[100 * run[step][measure] for run in runs] for step in steps]
            axes.plot(
                steps, [statistics.fmean(some) for some in values], "o-", markersize=3, color=f"C{index}", label=recipe
            )
            axes.fill_between(
                steps, [min(some) for some in values], [max(some) for some in values], alpha=0.2, linewidth=0
            )
        axes.set(xlabel="training step", ylabel=f"held-out {title}, %", ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    main()
