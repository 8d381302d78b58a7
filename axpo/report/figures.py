"""The report's figures: a chart, its legend and the sentence under it, made from what a run has logged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from axpo.report.axis import Format, number, percent
from axpo.report.charts import Line, Whisker, bars, line_chart, scatter, stacked_area
from axpo.report.data import Run
from axpo.report.evaluation import Estimate, evaluation_rows
from axpo.resample import Candidate, rank_correlation

BLUE, ORANGE, TEAL, PURPLE, GREY, RED = range(1, 7)
_PHASES = (
    ("rollout", "rollout", BLUE),
    ("resample", "resampling", PURPLE),
    ("train", "training", ORANGE),
    ("weights", "weights", TEAL),
)


@dataclass(frozen=True, slots=True)
class Key:
    """A legend entry; `span` is the value in the first and in the last steps."""

    label: str
    tone: int
    span: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    caption: str
    chart: Markup
    keys: list[Key] = field(default_factory=list)


def curves(
    run: Run,
    title: str,
    caption: str,
    metrics: Sequence[tuple[str, str, int]],
    form: Format,
    *,
    floor: float | None = None,
    span: float = 0.0,
    log: bool = False,
    whiskers: Sequence[Whisker] = (),
) -> Figure | None:
    """A figure of those metrics that the run has; None when it has none of them.

    floor: where the axis begins, by default below the least value. span: how far above the floor it reaches at least.
    """
    lines, keys = [], []
    for name, label, tone in metrics:
        if points := run.points(name):
            lines.append(Line(label, tone, points))
            first, last = run.ends(name) or (0.0, 0.0)
            keys.append(Key(label, tone, f"{form(first)} → {form(last)}"))
    if not lines:
        return None
    if whiskers:
        keys.append(Key(whiskers[0].label, whiskers[0].tone, f"{form(whiskers[0].value)} → {form(whiskers[-1].value)}"))
    top = None
    if floor is not None and max(y for line in lines for _, y in line.points if y is not None) < floor + span:
        top = floor + span
    chart = line_chart(lines, form=form, log=log, limits=(floor, top), whiskers=whiskers)
    return Figure(title, caption, chart, keys)


def histogram(run: Run) -> Figure | None:
    names = {int(name.rpartition("/")[2]): name for record in run.steps for name in record if _is_count(name)}
    ends = [run.ends(names[count]) or (0.0, 0.0) for count in sorted(names)]
    if not ends:
        return None
    totals = [sum(pair[i] for pair in ends) or 1.0 for i in (0, 1)]
    shares = [[pair[i] / totals[i] for pair in ends] for i in (0, 1)]
    caption = (
        "How many of a question’s rollouts called a tool: the share of questions with 0, 1, 2 … such rollouts, in the "
        "first and in the last steps."
    )
    series = [("first steps", GREY, shares[0]), ("last steps", BLUE, shares[1])]
    chart = bars([str(count) for count in sorted(names)], series, form=percent, x_label="tool-using rollouts")
    return Figure("Tool-using rollouts of a question", caption, chart, [Key(label, tone) for label, tone, _ in series])


def confidence(failed_calls: Sequence[Candidate]) -> Figure | None:
    correlation = rank_correlation(failed_calls)
    if correlation is None:
        return None
    pearson, spearman = correlation
    caption = (
        f"The first calls of {len(failed_calls)} rollouts in all-wrong subgroups: mean probability of a call’s tokens "
        f"against their mean exact entropy, in nats. Entropy with negated confidence: Pearson {pearson:.3f}, Spearman "
        f"{spearman:.3f}. The closer to 1, the better one stands in for the other."
    )
    points = [(c.confidence, c.entropy, 0.45) for c in failed_calls]
    chart = scatter(points, x_label="confidence", y_label="entropy", tone=PURPLE)
    return Figure("Confidence against entropy", caption, chart)


def plane(run: Run) -> Figure | None:
    rate, accuracy = dict(run.points("tool/rate")), dict(run.points("tool/accuracy"))
    steps = [s for s in rate if rate[s] is not None and accuracy.get(s) is not None]
    if len(steps) < 4:
        return None
    count = min(20, len(steps))
    groups = [steps[i * len(steps) // count : (i + 1) * len(steps) // count] for i in range(count)]
    points = [(_average(rate, group), _average(accuracy, group), (i + 1) / count) for i, group in enumerate(groups)]
    caption = (
        f"One point for every {len(steps) // count} steps, later ones darker. Up: the calls get better. Right: there "
        "are more of them."
    )
    chart = scatter(points, x_label="tool use", y_label="right with a tool", x_form=percent, y_form=percent, path=True)
    return Figure("Tool use against its success", caption, chart)


def phases(run: Run) -> Figure | None:
    whole = run.points("perf/step_s")
    lines = [
        Line(label, tone, points, False) for name, label, tone in _PHASES if (points := run.points(f"perf/{name}_s"))
    ]
    if not whole or not lines:
        return None
    known = [sum(line.points[i][1] or 0.0 for line in lines) for i in range(len(whole))]
    rest = [(x, max(0.0, (y or 0.0) - part)) for (x, y), part in zip(whole, known, strict=True)]
    lines.append(Line("everything else", GREY, rest, False))
    total = sum(y or 0.0 for _, y in whole) or 1.0
    keys = [Key(line.label, line.tone, percent(sum(y or 0.0 for _, y in line.points) / total)) for line in lines]
    caption = f"Seconds of each step by what they went to; {number(run.mean('perf/step_s') or 0.0)} s on average."
    return Figure("Seconds a step", caption, stacked_area(lines), keys)


def whiskers(run: Run, name: str, label: str, tone: int) -> list[Whisker]:
    found = []
    for evaluation in run.evaluations:
        wanted = {"pass@1": "Pass@1", "tool/rate": "Tool use"}[name]
        estimate = next((row.after for row in evaluation_rows([evaluation]) if row.label == wanted), None)
        if isinstance(estimate, Estimate):
            low, high = estimate.low, estimate.high
            ends = (estimate.value if low is None else low, estimate.value if high is None else high)
            found.append(Whisker(label, tone, float(evaluation["step"]), estimate.value, *ends))
    return found


def tool_names(run: Run) -> list[str]:
    """The tools that the run's metrics tell of."""
    names = {match[1] for record in run.steps for name in record if (match := _CALLS(name))}
    return sorted(names)


_CALLS = re.compile(r"tool/(.+)/calls").fullmatch


def _is_count(name: str) -> bool:
    return name.startswith("tool_histogram/") and name.rpartition("/")[2].isdigit()


def _average(values: dict[float, float | None], steps: Sequence[float]) -> float:
    return sum(values[s] or 0.0 for s in steps) / len(steps)
