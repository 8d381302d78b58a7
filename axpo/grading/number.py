"""Answers that are numbers, with a tolerance and units."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from axpo.grading.text import FONT

_SPACES = re.compile(r"\\[,;:! ]|\\quad|~|\s")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?:\.(?P<part>\d*))?)"
    r"(?:/(?P<below>\d+(?:\.\d+)?))?(?:(?:[eE]|(?:\\times|\\cdot|[x×*·])10\^?)\{?(?P<power>[+-]?\d{1,3})\}?)?(?P<unit>.*)",
    re.ASCII | re.DOTALL,
)
_UNIT = re.compile(r"[A-Za-zµΩ°%$€£¥]+(?:\^?\{?-?\d\}?)?(?:[/*·]?[A-Za-zµΩ°]+(?:\^?\{?-?\d\}?)?){0,4}")
_TWO_NUMBERS = re.compile(r"\d\s+(?!\d{3}(?!\d))[\d.]", re.ASCII)  # "1 200" is one, "3 4" is not
_MONEY = re.compile(r"(?<!\\)\$")
_PREFIXED = re.compile(r"^([$€£¥])(.*)$", re.DOTALL)


def number(given: str, answers: Iterable[str], tolerance: float) -> float:
    """1.0 within the relative tolerance of an answer, in the same unit, one that converts to it, or none at all.

    A number of dollars also answers where no unit is wanted.

    Numbers are read as 1,200 · 1.5e3 · 2/3 · \\frac{2}{3} · 3\\times10^4 · 45% · $20 · 3.2 km/h. Anything else is none.
    """
    value = parse(given)
    if value is None:
        return 0.0
    return float(any(_near(value, parse(answer), tolerance) for answer in answers))


def parse(text: str) -> tuple[float, str] | None:
    """(value, unit) of a text that is one number and nothing else; the unit may be empty."""
    if len(text) > 100:
        return None
    text = FONT.sub(r"\1", text.replace("\u2212", "-"))
    text = _FRACTION.sub(r"\1/\2", text.replace("\\%", "%").replace("^\\circ", "°"))
    if len(_MONEY.findall(text)) != 1:  # those around mathematics; one alone is money
        text = _MONEY.sub("", text)
    text = _SPACES.sub(" ", text.replace("\\$", "$")).strip()
    if _TWO_NUMBERS.search(text):
        return None
    text = text.replace(" ", "").rstrip(".")
    sign = text[:1] if text[:1] in "+-" else ""
    if money := _PREFIXED.match(text[len(sign) :]):
        text = f"{sign}{money[2]}{money[1]}"
    match = _NUMBER.fullmatch(text)
    if match is None or not (match["whole"] or match["part"]):
        return None
    unit = match["unit"]
    if unit and not _UNIT.fullmatch(unit):
        return None
    value = float(f"{(match['whole'] or '0').replace(',', '')}.{match['part'] or '0'}")
    below = float(match["below"] or 1)
    if below == 0:
        return None
    power = int(match["power"] or 0)
    if abs(power) > 300:
        return None
    value = (-value if match["sign"] == "-" else value) / below * 10.0**power
    return (value / 100, "") if unit == "%" else (value, unit)


def _near(given: tuple[float, str], answer: tuple[float, str] | None, tolerance: float) -> bool:
    if answer is None:
        return False
    (value, unit), (wanted, wanted_unit) = given, answer
    if unit and wanted_unit and unit != wanted_unit:
        factor = _factor(unit, wanted_unit)
        if factor is None:
            return False
        value *= factor
    elif unit and not wanted_unit and unit != "$":
        return False
    return abs(value - wanted) <= tolerance * abs(wanted) + 1e-9 * (abs(wanted) or 1.0)


@lru_cache(maxsize=4096)
def _factor(unit: str, wanted: str) -> float | None:
    """How many of `wanted` one `unit` is; None when they do not convert by a factor."""
    try:
        one = _registry().Quantity(1.0, _plain(unit))
        two = _registry().Quantity(2.0, _plain(unit))
        factor = float(one.to(_plain(wanted)).magnitude)
        return factor if abs(float(two.to(_plain(wanted)).magnitude) - 2 * factor) <= 1e-9 * abs(factor) else None
    except Exception:  # pint raises errors of many families for what it does not know
        return None


def _plain(unit: str) -> str:
    return unit.replace("^", "**").replace("{", "").replace("}", "").replace("·", "*").replace("°C", "degC")


@lru_cache(maxsize=1)
def _registry() -> Any:
    import pint  # half a second to import

    return pint.UnitRegistry()
