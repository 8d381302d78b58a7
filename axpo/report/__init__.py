"""Writes `<run>/report.html`, one file that needs no network: `python -m axpo.report RUN_DIR`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from axpo.config import Algo
from axpo.paths import ASSETS
from axpo.report.axis import number, percent
from axpo.report.choice import choose, spread
from axpo.report.data import ReportError, Run, load_run
from axpo.report.evaluation import Row, evaluation_rows
from axpo.report.sections import sections
from axpo.report.trees import Tree, build_trees
from axpo.resample import Candidate
from axpo.rundir import RunDir, write_text

__all__ = ["ReportError", "write_report"]

_LARGEST = 5_000_000  # characters of the page; above it trees are left out


def write_report(run_dir: Path, trees: int) -> Path:
    """Writes the report of a run directory, with at most `trees` question trees, and returns its path.

    What the directory lacks is left out and noted on the page.

    Raises:
        ReportError: there is no such directory, or no step and no evaluation in it.
    """
    run = load_run(Path(run_dir))
    groups, failed_calls = choose(run, trees)
    drawn = build_trees(run, groups)
    page = _render(run, failed_calls, drawn)
    while len(page) > _LARGEST and drawn:
        drawn = spread(drawn, int(0.95 * len(drawn) * _LARGEST / len(page)))
        page = _render(run, failed_calls, drawn)
    path = RunDir(run.path).report
    # Text of a model may hold half of a surrogate pair, which no encoding can write.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def _render(run: Run, failed_calls: Sequence[Candidate], drawn: Sequence[Tree]) -> str:
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent1": _percent1, "number": number, "points": _points, "signed": _signed}
    rows = evaluation_rows(run.evaluations)
    return environment.get_template("report.html.jinja").render(
        name=str(run.setting("run.name", run.path.resolve().name)),
        facts=_facts(run),
        rollouts=bool(run.points("reward/mean")),
        axpo=_is_axpo(run),
        ablation=_ablation(run),
        group_size=run.setting("algo.group_size", "several"),
        resamples=run.setting("algo.resamples_per_prefix", "several"),
        tiles=_tiles(run, rows),
        rows=rows,
        evaluations=run.evaluations,
        sections=sections(run, failed_calls),
        trees=drawn,
        labels=_labels(drawn),
        config=_config_text(run),
        notes=run.notes,
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """A number at the top of the page."""

    label: str
    value: str
    detail: str


def _facts(run: Run) -> list[str]:
    """The run in a line: what was trained, on what, for how long, when."""
    facts = [str(run.setting("algo.name", "")).upper()]
    if run.steps:
        steps = run.steps[-1]["step"]
        planned = run.setting("run.steps", steps)
        facts.append(f"{steps} steps" if steps == planned else f"{steps} of {planned} steps")
    if model := run.setting("model.path"):
        facts.append(f"model {model}")
    if (questions := run.setting("rollout.questions_per_step")) and (size := run.setting("algo.group_size")):
        facts.append(f"{questions} questions × {size} rollouts a step")
    if (seed := run.setting("run.seed")) is not None:
        facts.append(f"seed {seed}")
    written = max(
        (f.stat().st_mtime for n in ("metrics.jsonl", "config.toml") if (f := run.path / n).is_file()), default=0
    )
    if written:
        facts.append(time.strftime("%Y-%m-%d", time.localtime(written)))
    return [fact for fact in facts if fact]


def _tiles(run: Run, rows: Sequence[Row]) -> list[Tile]:
    tiles = []
    for row in rows:
        if row.after and row.label in ("Pass@1", "Tool use"):
            change = f"{_points(row.change.value)} points in training" if row.change else row.meaning
            tiles.append(Tile(f"Held-out {row.label.replace('Tool', 'tool')}", percent(row.after.value), change))
    if not tiles and (ends := run.ends("reward/mean")):
        tiles.append(Tile("Reward", percent(ends[1]), f"{percent(ends[0])} in the first steps"))
    if restored := _restored(run):
        tiles.append(Tile("Restored", percent(restored[0] / restored[1]), f"of {restored[1]:.0f} all-wrong subgroups"))
    mismatch = [y for _, y in run.points("mismatch/logprob_diff_max") if y is not None]
    if mismatch:
        tiles.append(Tile("Engine against trainer", number(max(mismatch)), "largest log-prob difference of the run"))
    seconds = sum(y for _, y in run.points("perf/step_s") if y is not None)
    if seconds:
        tiles.append(Tile("Training", _duration(seconds), f"{number(seconds / len(run.steps))} s a step"))
    return tiles


def _restored(run: Run) -> tuple[float, float] | None:
    """(restored, all) all-wrong tool-using subgroups of the run; None when there was none."""
    rates, counts = dict(run.points("resample/restore_rate")), dict(run.points("resample/triggered"))
    pairs = [(rate, count) for step, rate in rates.items() if rate is not None and (count := counts.get(step))]
    return (sum(rate * count for rate, count in pairs), sum(count for _, count in pairs)) if pairs else None


def _is_axpo(run: Run) -> bool:
    return bool(run.points("resample/prefixes")) and run.setting("algo.name", "axpo") == "axpo"


def _ablation(run: Run) -> str:
    """What decides which prefixes are resampled where it is not AXPO's choice: the fields with their values."""
    algo = Algo()
    fields = {name: run.setting(f"algo.{name}", getattr(algo, name)) for name in ("trigger", "fork_at", "rank")}
    other = any(value != getattr(algo, name) for name, value in fields.items())
    return ", ".join(f"algo.{name} = {value}" for name, value in fields.items()) if other and _is_axpo(run) else ""


def _config_text(run: Run) -> str:
    file = run.path / "config.toml"
    return file.read_text(encoding="utf-8", errors="replace").strip() if run.config else ""


def _labels(trees: Sequence[Tree]) -> list[str]:
    """The branches that the style sheet needs a rule for: pointing at one singles out its boxes."""
    sources = [source for tree in trees for source in tree.sources]
    others = {branch.label for tree in trees for branch in tree.others}
    children = {child.label for source in sources for child in source.resamples}
    return sorted(others | children | {source.label for source in sources})


def _percent1(value: float) -> str:
    """0.256 → 25.6 %: one figure more than in charts, for the table."""
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    """A difference of shares in percentage points."""
    return _signed(round(100 * value, 1), 1)


def _signed(value: float, digits: int = 2) -> str:
    """+1.62, −0.54, and 0 without a sign."""
    text = f"{abs(value):.{digits}f}"
    return "0" if float(text) == 0 else ("+" if value > 0 else "−") + text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
