"""Axes of the report's charts: round ticks, how numbers are written, and what is done to long or noisy curves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Point = tuple[float, float | None]  # (step, value; None where nothing was measured)
Format = Callable[[float], str]
_MOST_POINTS = 240  # of a drawn line; longer ones are averaged in bins, so that the file stays small


def percent(value: float) -> str:
    """0.256 → 26 %, 0.031 → 3.1 %, 0.0003 → 0.03 %: small shares keep two figures."""
    scaled = 100 * value
    size = abs(scaled)
    if size >= 9.95 or abs(scaled - round(scaled)) < 1e-9:
        return f"{scaled:.0f} %"
    return f"{scaled:.1f} %" if size >= 0.95 else f"{scaled:.2g} %"


def number(value: float) -> str:
    """Three significant figures, thousands with a comma, tiny and huge values as powers of ten."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def tick_labels(ticks: Sequence[float], form: Format) -> list[str]:
    """The ticks as `form` writes them, with more figures where those would not tell them apart."""
    labels = [form(tick) for tick in ticks]
    if len(set(labels)) == len(labels):
        return labels
    scale, unit = (100, " %") if form is percent else (1, "")
    digits = math.ceil(-math.log10(scale * abs(ticks[1] - ticks[0]))) + 1
    return [f"{scale * tick:.{max(digits, 0)}f}{unit}" for tick in ticks]


def smoothed(points: Sequence[Point], log: bool = False) -> list[Point]:
    """A Gaussian moving average over steps, narrow enough to keep every bend; [] for fewer than 8 values.

    Where nothing was measured nearby it has a gap too.
    """
    known = [(x, y) for x, y in points if y is not None]
    if len(known) < 8:
        return []
    xs, ys = np.array(known).T
    ys = np.log(ys) if log else ys
    span = xs[-1] - xs[0]
    width = max(span / 45, span / len(points))
    out: list[Point] = []
    for x, _ in points:
        weights = np.exp(-0.5 * ((xs - x) / width) ** 2)
        near = np.abs(xs - x).min() <= 2 * width
        mean = float(weights @ ys / weights.sum()) if near else None
        out.append((x, math.exp(mean) if log and mean is not None else mean))
    return out


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of its bin's values; None where a bin has none."""
    if len(points) <= most:
        return list(points)
    out: list[Point] = []
    for chunk in np.array_split(np.arange(len(points)), most):
        known = [y for i in chunk if (y := points[i][1]) is not None]
        out.append((points[chunk[len(chunk) // 2]][0], sum(known) / len(known) if known else None))
    return out


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps low..high to first..last pixels, linear or logarithmic."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (self.low, self.high, value)
        if self.log:
            low, high, at = (math.log10(v) for v in (low, high, value))
        share = min(max((at - low) / (high - low), 0.0), 1.0) if high > low else 0.5
        return self.first + share * (self.last - self.first)

    def ticks(self, most: int, whole: bool = False) -> list[float]:
        if self.log:
            low, high = round(math.log10(self.low)), round(math.log10(self.high))
            stride = max(1, math.ceil((high - low) / most))
            return [10.0**exponent for exponent in range(low, high + 1, stride)]
        stride = _nice((self.high - self.low) / most, whole)
        first = math.ceil(self.low / stride - 1e-9)
        return [i * stride for i in range(first, math.floor(self.high / stride + 1e-9) + 1)]


def value_axis(
    values: Sequence[float],
    first: float,
    last: float,
    *,
    log: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
) -> Axis:
    """Ends on round numbers about all values, with room where they do not vary."""
    low, high = min(values), max(values)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return Axis(low, high if high > low else low * 10, first, last, log=True)
    low, high = low if limits[0] is None else limits[0], high if limits[1] is None else limits[1]
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        room = 0.05 * abs(high) or 1.0
        low, high = low - (room if limits[0] is None else 0.0), high + (room if limits[1] is None else 0.0)
    stride = _nice((high - low) / 4, whole=False)
    low = math.floor(low / stride + 1e-9) * stride if limits[0] is None else low
    high = math.ceil(high / stride - 1e-9) * stride if limits[1] is None else high
    return Axis(low, high, first, last)


def _nice(raw: float, whole: bool) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    raw = max(raw, 1.0 if whole else 1e-300)
    power = 10.0 ** math.floor(math.log10(raw))
    choices = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    return next(factor * power for factor in choices if factor * power >= raw * (1 - 1e-9))
