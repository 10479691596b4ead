"""SVG primitives: elements, marks, scales and ticks. All text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 440
"""Width of a figure in user units; on a phone a unit is 0.8 CSS pixels, so text stays legible."""

CHARACTER = 7.1
"""Mean width of a character in user units."""

_NARROW, _WIDE = " fijlrtI.,:;'|!()[]", "mwMW@%…"
_WIDTHS = (5.1, 12.8, 10.0, 8.3)
"""At least the widths in DejaVu Sans of 13 units, the widest of the fonts that figures name: narrow
and wide characters, other capitals, and the rest."""

LINE = 17
"""Line height in user units."""

STYLES = 7
"""Number of series styles (colour, mark and dashes); more series reuse them."""

DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 4", "12 4")
"""Dash pattern of each style."""

MOST_MARKS = 2_500
"""With more marks than this a figure carries no labels; its table has the values."""

MARGIN = 0.06
"""Space between the values and the ends of an axis, as a share of their range."""


def element(name: str, *children: str, **attributes: object) -> str:
    """Return an SVG element; `children` are markup, attribute values are escaped.

    `class_` becomes `class`, `stroke_width` becomes `stroke-width`; None omits an attribute.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(children)
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def _value(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def label(words: str, x: float, y: float, anchor: str = "start", class_: str = "") -> str:
    """Return a line of text; `anchor` is start, middle or end."""
    where = None if anchor == "start" else anchor
    return element("text", escape(words), x=x, y=y, text_anchor=where, class_=class_ or None)


def text_width(words: str) -> float:
    """Return how wide a text is at most, in user units."""
    narrow, wide, capital, other = _WIDTHS
    return sum(
        narrow if c in _NARROW else wide if c in _WIDE else capital if c.isupper() else other
        for c in words
    )


def shortened(words: str, most: int) -> str:
    """Cut a text to `most` characters, with an ellipsis if it was longer."""
    return words if len(words) <= most else f"{words[: most - 1]}…"


def document(height: float, title: str, *parts: str) -> str:
    """Return the SVG of a figure."""
    return element(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {math.ceil(height)}",
        role="group",
        aria_label=title,
        class_="figure",
    )


# --- Marks ----------------------------------------------------------------------------------------


def shape(style: int, x: float, y: float, r: float = 3.4) -> str:
    """Return the path of a mark: disc, square, triangle, diamond, cross, star, or triangle down."""
    kind = style % STYLES
    if kind == 0:
        return f"M{x - r:.1f} {y:.1f}a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0"
    corners: dict[int, Sequence[tuple[float, float]]] = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)),
        3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
        4: ((-1, -1), (0, -0.3), (1, -1), (0.3, 0), (1, 1), (0, 0.3), (-1, 1), (-0.3, 0)),
        5: ((0, -1.5), (0.4, -0.4), (1.5, 0), (0.4, 0.4), (0, 1.5), (-0.4, 0.4), (-1.5, 0)),
        6: ((0, 1.3), (1.2, -0.9), (-1.2, -0.9)),
    }
    return path([(x + r * dx, y + r * dy) for dx, dy in corners[kind]]) + "Z"


def path(points: Sequence[tuple[float, float]]) -> str:
    """Return a path through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def box(x: float, y: float, width: float, height: float) -> str:
    """Return the path of a rectangle."""
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}Z"


@dataclass
class Marks:
    """Marks of a figure: Tab focuses the first, the arrow keys reach the others."""

    labelled: bool = True
    """Whether marks carry a label: only up to `MOST_MARKS` of them."""
    _first: bool = True

    def draw(self, shapes: Sequence[tuple[str, str]], class_: str) -> str:
        """Return marks, each given as (path, label)."""
        if not self.labelled:
            return element("path", d="".join(d for d, _ in shapes), class_=class_)
        return "".join(self._one(d, words, class_) for d, words in shapes)

    def _one(self, d: str, words: str, class_: str) -> str:
        turn, self._first = (0 if self._first else -1), False
        title = element("title", escape(words))
        return element("path", title, d=d, class_=f"mark {class_}", tabindex=turn, role="img")


# --- Scales ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Maps values to positions on an axis."""

    low: float
    high: float
    """Values at the ends; `high` is above `low`, and both are positive if `log`."""
    start: float
    end: float
    """Positions of the ends."""
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        turn: Callable[[float], float] = math.log if self.log else float
        share = (turn(value) - turn(self.low)) / (turn(self.high) - turn(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6, whole: bool = False) -> list[float]:
        """Return round values within the scale, about `most` at most."""
        if self.log:
            return log_ticks(self.low, self.high)
        return nice_ticks(self.low, self.high, most, whole)


def nice_ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between two values."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(k for k in (1, 2, 5, 10, 20) if (high - low) / (k * step) <= most)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two positive values; 2 and 5 times these over few decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // 6)
    steps = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [k * 10.0**d for d in decades[::every] for k in steps]
    return [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]


@dataclass(frozen=True)
class Axis:
    """An axis of measured values."""

    label: str
    from_zero: bool = False
    """Whether it includes 0."""
    log: bool = False
    """Whether it is logarithmic."""

    def scale(self, values: Iterable[float], start: float, end: float) -> Scale:
        """Return a scale that holds all values, with a margin at both ends.

        It has an extent even with a single value or with none.
        """
        values = [*values, 0.0] if self.from_zero else values
        found = [v for v in values if math.isfinite(v) and (v > 0 or not self.log)]
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        if self.log:
            low, high = (low or 1e-9), (high or 1.0)
            room = (high / low) ** MARGIN if high > low else 2.0
            return Scale(low / room, high * room, start, end, log=True)
        span = (high - low) or abs(high) or 1.0
        at_zero = low >= 0 and low - MARGIN * span < 0
        return Scale(0.0 if at_zero else low - MARGIN * span, high + MARGIN * span, start, end)
