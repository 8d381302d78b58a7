"""Small charts as inline SVG: no script, no fonts, colours from the page's style sheet so that dark mode works.

Every function returns safe markup: numbers are formatted here and every text is escaped.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from axpo.report.axis import Axis, Format, Point, number, smoothed, thin, tick_labels, value_axis

WIDTH, HEIGHT = 400, 236  # of the view box; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 30


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. points: (step, value or None), ascending in step. tone: 1 to 6, the page's series colours.

    smooth: draw a light moving average over the faint raw values.
    """

    label: str
    tone: int
    points: Sequence[Point]
    smooth: bool = True


@dataclass(frozen=True, slots=True)
class Whisker:
    """A single measurement with its interval, drawn over the curves."""

    label: str
    tone: int
    x: float
    value: float
    low: float
    high: float


def line_chart(
    lines: Sequence[Line],
    *,
    form: Format = number,
    log: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
    whiskers: Sequence[Whisker] = (),
) -> Markup:
    """Curves over the steps. `limits` fixes an end of the y axis; a log axis leaves out what is not positive."""
    lines = [Line(line.label, line.tone, thin(_clean(line.points, log)), line.smooth) for line in lines]
    values = [y for line in lines for _, y in line.points if y is not None]
    values += [end for w in whiskers for end in (w.low, w.high)]
    steps = [x for line in lines for x, _ in line.points] + [w.x for w in whiskers]
    if not values:
        return _frame([], "no values")
    x = Axis(min(steps), max(steps), _LEFT, WIDTH - _RIGHT)
    y = _vertical(values, log, limits)
    body = [_grid(x, y, form)]
    for line in lines:
        smooth = smoothed(line.points, log) if line.smooth else []
        body.append(f'<g class="s{line.tone}">{_strokes(line.points, x, y, "raw" if smooth else "line")}')
        body.append(f"{_strokes(smooth, x, y, 'line')}</g>")
    for w in whiskers:
        body.append(
            f'<g class="s{w.tone} whisker"><path d="M{x(w.x):.1f} {y(w.low):.1f}V{y(w.high):.1f}"/>'
            f'<circle cx="{x(w.x):.1f}" cy="{y(w.value):.1f}" r="4"/></g>'
        )
    body.append(_readout(lines, x, form, {w.x: f"{w.label} {form(w.value)}" for w in whiskers}))
    return _frame(body, ", ".join(line.label for line in lines))


def stacked_area(lines: Sequence[Line], *, form: Format = number) -> Markup:
    """Parts of a whole over the steps, the first line lowest; a missing value counts as 0."""
    lines = [Line(line.label, line.tone, thin(line.points), False) for line in lines]
    steps = [x for x, _ in lines[0].points] if lines else []
    if not steps:
        return _frame([], "no values")
    parts = np.array([[y or 0.0 for _, y in line.points] for line in lines])
    edges = np.vstack([np.zeros(len(steps)), np.cumsum(parts, axis=0)])
    x = Axis(steps[0], steps[-1], _LEFT, WIDTH - _RIGHT)
    y = _vertical([0.0, float(edges.max())], limits=(0.0, None))
    if len(steps) == 1:  # one step has no extent: draw it as a block
        edges, steps = np.repeat(edges, 2, axis=1), [steps[0] - 0.5, steps[0] + 0.5]
        x = Axis(steps[0], steps[1], _LEFT, WIDTH - _RIGHT)
    body = [_grid(x, y, form)]
    for line, low, high in zip(lines, edges[:-1], edges[1:], strict=True):
        top = [f"{x(s):.1f} {y(v):.1f}" for s, v in zip(steps, high, strict=True)]
        bottom = [f"{x(s):.1f} {y(v):.1f}" for s, v in zip(reversed(steps), reversed(low), strict=True)]
        body.append(f'<path class="s{line.tone} area" d="M{"L".join(top + bottom)}Z"/>')
    body.append(_readout(lines, x, form, {}))
    return _frame(body, ", ".join(line.label for line in lines))


def bars(
    categories: Sequence[str], series: Sequence[tuple[str, int, Sequence[float]]], *, form: Format, x_label: str
) -> Markup:
    """Grouped columns: `series` are (label, tone, one value a category)."""
    y = _vertical([value for _, _, values in series for value in values] + [0.0], limits=(0.0, None))
    slot = (WIDTH - _RIGHT - _LEFT) / max(len(categories), 1)
    width = slot * 0.74 / max(len(series), 1)
    body = [_y_grid(y, form)]
    for index, category in enumerate(categories):
        left = _LEFT + index * slot
        body.append(f'<text class="tick" text-anchor="middle" x="{left + slot / 2:.1f}" y="{HEIGHT - 13}">')
        body.append(f"{escape(category)}</text>")
        for place, (label, tone, values) in enumerate(series):
            top = y(values[index])
            body.append(
                f'<rect class="s{tone} bar" x="{left + slot * 0.13 + place * width:.1f}" y="{top:.1f}" rx="1"'
                f' width="{width * 0.94:.1f}" height="{max(y(0.0) - top, 0):.1f}">'
                f"<title>{escape(label)}: {escape(form(values[index]))}</title></rect>"
            )
    body.append(_x_label(x_label))
    return _frame(body, ", ".join(label for label, _, _ in series))


def scatter(
    points: Sequence[tuple[float, float, float]],
    *,
    x_label: str,
    y_label: str,
    x_form: Format = number,
    y_form: Format = number,
    path: bool = False,
    tone: int = 1,
) -> Markup:
    """Points (x, y, age from 0 to 1): older ones are fainter. `path` joins them in order and marks both ends."""
    if not points:
        return _frame([], "no values")
    x = value_axis([p[0] for p in points], _LEFT, WIDTH - _RIGHT)
    y = _vertical([p[1] for p in points])
    body = [_grid(x, y, y_form, x_form)]
    places = [(f"{x(px):.1f}", f"{y(py):.1f}") for px, py, _ in points]
    body.append(f'<g class="s{tone}">')
    if path:
        body.append(f'<path class="raw" d="M{"L".join(" ".join(place) for place in places)}"/>')
    for (px, py), (_, _, age) in zip(places, points, strict=True):
        body.append(f'<circle class="dot" cx="{px}" cy="{py}" r="2.6" opacity="{0.22 + 0.68 * age:.2f}"/>')
    if path:
        for name, (px, py) in (("first", places[0]), ("last", places[-1])):
            body.append(f'<circle class="end" cx="{px}" cy="{py}" r="5"/>')
            anchor = "end" if float(px) > WIDTH * 0.8 else "start"
            shift = -9 if anchor == "end" else 9
            body.append(
                f'<text class="mark" text-anchor="{anchor}" x="{float(px) + shift:.1f}" y="{float(py) + 4:.1f}">'
                f"{name} step</text>"
            )
    body.append("</g>")
    body.append(
        f'<text class="axis" text-anchor="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 1}">{escape(x_label)} →</text>'
    )
    body.append(f'<text class="axis" x="{_LEFT}" y="8">↑ {escape(y_label)}</text>')
    return _frame(body, f"{y_label} against {x_label}")


def _vertical(
    values: Sequence[float], log: bool = False, limits: tuple[float | None, float | None] = (None, None)
) -> Axis:
    return value_axis(values, HEIGHT - _BOTTOM, _TOP, log=log, limits=limits)


def _clean(points: Iterable[Point], log: bool) -> list[Point]:
    return [(x, None if y is None or not math.isfinite(y) or (log and y <= 0) else y) for x, y in points]


def _strokes(points: Sequence[Point], x: Axis, y: Axis, style: str) -> str:
    """One path for every run of known values; a value alone between gaps is a dot."""
    runs: list[list[str]] = [[]]
    for step, value in points:
        if value is not None:
            runs[-1].append(f"{x(step):.1f} {y(value):.1f}")
        elif runs[-1]:
            runs.append([])
    lines = [f"M{'L'.join(run)}" for run in runs if len(run) > 1]
    dots = [run[0].split() for run in runs if len(run) == 1]
    drawn = f'<path class="{style}" d="{"".join(lines)}"/>' if lines else ""
    return drawn + "".join(f'<circle class="dot {style}-dot" cx="{px}" cy="{py}" r="1.8"/>' for px, py in dots)


def _grid(x: Axis, y: Axis, form: Format, x_form: Format | None = None) -> str:
    parts = [_y_grid(y, form)]
    ticks = x.ticks(6 if x_form is None else 5, whole=x_form is None)
    for tick, label in zip(ticks, tick_labels(ticks, x_form or "{:g}".format), strict=True):
        parts.append(f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{HEIGHT - 13}">')
        parts.append(f"{escape(label)}</text>")
    if x_form is None:
        parts.append(_x_label("step"))
    return "".join(parts)


def _x_label(text: str) -> str:
    return f'<text class="axis" text-anchor="end" x="{WIDTH - _RIGHT}" y="{HEIGHT - 1}">{escape(text)} →</text>'


def _y_grid(y: Axis, form: Format) -> str:
    parts = []
    ticks = y.ticks(5)
    for tick, label in zip(ticks, tick_labels(ticks, form), strict=True):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">')
        parts.append(f"{escape(label)}</text>")
    return "".join(parts)


def _readout(lines: Sequence[Line], x: Axis, form: Format, extra: dict[float, str]) -> str:
    """Invisible columns whose tooltip tells the values of a step."""
    steps = sorted({step for line in lines for step, _ in line.points} | set(extra))
    found = [dict(line.points) for line in lines]
    width = (WIDTH - _RIGHT - _LEFT) / max(len(steps), 1)
    parts = ['<g class="readout">']
    for step in steps:
        texts = [
            f"{line.label} {form(v)}" for line, at in zip(lines, found, strict=True) if (v := at.get(step)) is not None
        ]
        texts += [extra[step]] if step in extra else []
        parts.append(
            f'<rect x="{x(step) - width / 2:.1f}" y="{_TOP}" width="{width:.1f}" height="{HEIGHT - _BOTTOM - _TOP}">'
            f"<title>step {step:g}: {escape(', '.join(texts) or 'nothing measured')}</title></rect>"
        )
    return "".join([*parts, "</g>"])


def _frame(body: Iterable[str], label: str) -> Markup:
    inner = (
        "".join(body) or f'<text class="axis" text-anchor="middle" x="{WIDTH / 2}" y="{HEIGHT / 2}">no values</text>'
    )
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{inner}</svg>'
    )
