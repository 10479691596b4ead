"""Charts as SVG: lines over rounds, and columns; what is in rows is in `row_charts`.

Series differ in colour, mark and dashes, so that none depends on colour alone. Colours are classes
of templates/figures.css.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from grandrounds.study.report.drawing import (
    CHARACTER,
    DASHES,
    LINE,
    MOST_MARKS,
    STYLES,
    WIDTH,
    Marks,
    Scale,
    box,
    element,
    label,
    path,
    scale_over,
    shape,
    shortened,
)

PLOT_HEIGHT = 190
LEFT = 52
RIGHT = 10


@dataclass(frozen=True)
class Point:
    """One measured value."""

    x: float
    y: float
    label: str
    """What the mark says when it is pointed at."""
    low: float | None = None
    high: float | None = None
    """Ends of its interval."""
    flag: str = ""
    """A few words beside a mark that stands out; it is drawn larger, with a ring."""


@dataclass(frozen=True)
class Series:
    """Values that belong together."""

    name: str
    points: Sequence[Point]
    style: int = 0
    line: bool = True
    """Whether the points are joined."""
    marks: bool = True
    """Whether they have marks; a plan has none."""
    wide: bool = False
    """Whether the line is drawn wide and pale below all others, which may cover it exactly."""


@dataclass(frozen=True)
class Reference:
    """A value to compare with: a line across, with a band for its interval."""

    name: str
    value: float
    style: int
    low: float | None = None
    high: float | None = None


def drawing(height: float, title: str, *parts: str) -> str:
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


# --- Legend and axes ------------------------------------------------------------------------------


@dataclass
class Legend:
    """Names of series with a sample of each, in as many lines as they need."""

    entries: list[tuple[str, str]] = field(default_factory=list)
    """(name, kind: `line`, `dot`, `rule` or `wide` and a style, or `fill <class>`)."""

    def draw(self, top: float) -> tuple[str, float]:
        """Return the markup, and where the next thing may begin."""
        parts: list[str] = []
        x, y = 0.0, top + LINE - 4
        for name, kind in self.entries:
            words = shortened(name, 50)
            width = 30 + CHARACTER * len(words) + 12
            if x and x + width > WIDTH:
                x, y = 0.0, y + LINE
            parts += [self._sample(kind, x, y - 4), label(words, x + 30, y)]
            x += width
        return "".join(parts), (y + 8 if self.entries else top)

    @staticmethod
    def _sample(kind: str, x: float, y: float) -> str:
        form, _, which = kind.partition(" ")
        if form == "fill":
            return element("path", d=box(x + 10, y - 5, 12, 10), class_=f"cell {which}")
        style = int(which)
        dashes = DASHES[style % STYLES] or None
        rule = element(
            "path", d=path([(x, y), (x + 24, y)]), class_="line", stroke_dasharray=dashes
        )
        dot = element("path", d=shape(style, x + 12, y), class_="dot")
        wide = element("path", d=path([(x, y), (x + 24, y)]), class_="wide")
        shown = {"line": rule + dot, "dot": dot, "rule": rule, "wide": wide}[form]
        return element("g", shown, class_=f"s{style % STYLES}")


def axes(
    xs: Scale, ys: Scale, x_label: str, y_label: str, *, x_ticks: Sequence[float] | None = None
) -> str:
    """Return grid lines, ticks and the names of both axes; the vertical one's stands on top."""
    parts = [label(y_label, 0, ys.end - 11, class_="name")]
    ticks = ys.ticks(5)
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        y = ys(tick)
        parts.append(element("path", d=path([(xs.start, y), (xs.end, y)]), class_="rule"))
        parts.append(label(text, xs.start - 6, y + 4, "end"))
    marked = xs.ticks(8, whole=True) if x_ticks is None else x_ticks
    for tick, text in zip(marked, tick_texts(marked), strict=True):
        parts.append(label(text, xs(tick), ys.start + 18, "middle"))
        parts.append(element("path", d=f"M{xs(tick):.1f} {ys.start:.1f}v4", class_="tick"))
    parts.append(label(x_label, xs.end, ys.start + 35, "end", class_="name"))
    base = element("path", d=path([(xs.start, ys.start), (xs.end, ys.start)]), class_="base")
    return element("g", *parts, base, class_="axes", aria_hidden="true")


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Return the texts of an axis, all in one notation.

    Thousands (`20k`) where it reaches 10,000 and no tick but 0 is below 100; powers (`1e-5`) where
    it reaches 10,000 from below that, or comes nearer to 0 than 0.0001; else plain numbers.
    """
    sizes = [abs(tick) for tick in ticks if tick]
    if not sizes:
        return ["0"] * len(ticks)
    least, most = min(sizes), max(sizes)
    if most >= 9_999 and least >= 100:
        texts = [f"{tick / 1000:,.10g}k" for tick in ticks]
    elif most >= 9_999 or least < 9.999e-5:
        texts = [_power(tick) for tick in ticks]
    else:
        texts = [f"{tick:.10g}" for tick in ticks]
    return [text if tick else "0" for tick, text in zip(ticks, texts, strict=True)]


def _power(value: float) -> str:
    """Return `1.5e-5`."""
    digits, _, power = f"{value:.9e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


# --- Lines ----------------------------------------------------------------------------------------


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    y_label: str,
    x_label: str = "round",
    log: bool = False,
    from_zero: bool = False,
    references: Sequence[Reference] = (),
    x_range: tuple[float, float] | None = None,
) -> str:
    """Return values over rounds: lines with marks, intervals as whiskers, references across."""
    drawn = [
        (s, [p for p in s.points if math.isfinite(p.y) and (p.y > 0 or not log)]) for s in series
    ]
    points = [p for _, found in drawn for p in found]
    values = [p.y for p in points] + [r.value for r in references]
    bounds = [p.low for p in points] + [p.high for p in points]
    bounds += [r.low for r in references] + [r.high for r in references]
    values += [b for b in bounds if b is not None] + ([0.0] if from_zero else [])
    legend = Legend([(s.name, _kind(s)) for s, found in drawn if found and s.name])
    legend.entries += [(r.name, f"rule {r.style}") for r in references]
    named, top = legend.draw(0)
    top += LINE + 8
    xs = _over_rounds([p.x for p in points], x_range)
    ys = scale_over(values, top + PLOT_HEIGHT, top, log=log)
    marks = Marks(sum(len(f) for s, f in drawn if s.marks) <= MOST_MARKS)
    body = [_reference(r, xs, ys) for r in references]
    below_first = sorted(drawn, key=lambda item: not item[0].wide)
    body += [_series(s, found, xs, ys, marks) for s, found in below_first]
    height = top + PLOT_HEIGHT + 40
    return drawing(height, title, named, axes(xs, ys, x_label, y_label), *body)


def _kind(series: Series) -> str:
    if series.wide:
        return f"wide {series.style}"
    form = "line" if series.line and series.marks else "rule" if series.line else "dot"
    return f"{form} {series.style}"


def _over_rounds(found: Sequence[float], given: tuple[float, float] | None) -> Scale:
    low, high = given or (min(found, default=0), max(found, default=1))
    if high <= low:
        high = low + 1
    room = (high - low) * 0.02
    return Scale(low - room, high + room, LEFT, WIDTH - RIGHT)


def _reference(reference: Reference, xs: Scale, ys: Scale) -> str:
    y = ys(reference.value)
    dashes = DASHES[reference.style % STYLES] or None
    parts = []
    if reference.low is not None and reference.high is not None:
        top, bottom = ys(reference.high), ys(reference.low)
        parts.append(
            element("path", d=box(xs.start, top, xs.end - xs.start, bottom - top), class_="band")
        )
    across = path([(xs.start, y), (xs.end, y)])
    parts.append(element("path", d=across, class_="line", stroke_dasharray=dashes))
    return element("g", *parts, class_=f"s{reference.style % STYLES}")


def _series(series: Series, points: Sequence[Point], xs: Scale, ys: Scale, marks: Marks) -> str:
    parts = []
    if series.line and points:
        line = path([(xs(p.x), ys(p.y)) for p in points])
        dashes = None if series.wide else DASHES[series.style % STYLES] or None
        shown = "wide" if series.wide else "line"
        parts.append(element("path", d=line, class_=shown, stroke_dasharray=dashes))
    dots = []
    for p in points if series.marks else ():
        x, y = xs(p.x), ys(p.y)
        if p.low is not None and p.high is not None:
            low, high = ys(p.low), ys(p.high)
            whisker = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8"
            whisker += f"M{x - 4:.1f} {high:.1f}h8"
            parts.append(element("path", d=whisker, class_="whisker"))
        if p.flag:
            parts.append(element("path", d=shape(0, x, y, 7.5), class_="ring"))
            side, anchor = (-11, "end") if x > WIDTH - 90 else (11, "start")
            parts.append(label(p.flag, x + side, y + 4, anchor, class_="flag"))
        drawn = shape(series.style, x, y) if marks.labelled else box(x - 1.5, y - 1.5, 3, 3)
        dots.append((drawn, p.label))
    parts.append(marks.draw(dots, "dot"))
    return element("g", *parts, class_=f"s{series.style % STYLES}")


# --- Columns --------------------------------------------------------------------------------------


def column_chart(
    title: str,
    columns: Sequence[tuple[float, str]],
    stacks: Sequence[tuple[str, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    top_value: float | None = None,
) -> str:
    """Return stacked columns.

    Parameters
    ----------
    columns
        (place on the axis, what the column says) of each.
    stacks
        (name, a height for each column), from the bottom up.
    top_value
        Upper end of the axis; default: the highest column.
    """
    named, top = Legend(
        [(name, f"fill f{i}") for i, (name, _) in enumerate(stacks)] if len(stacks) > 1 else []
    ).draw(0)
    top += LINE + 8
    totals = [sum(values[i] for _, values in stacks) for i in range(len(columns))]
    highest = top_value or 1.05 * max(totals, default=0.0) or 1.0
    places = [place for place, _ in columns]
    first, last = min(places, default=0), max(places, default=1)
    xs = Scale(first - 0.5, last + 0.5, LEFT, WIDTH - RIGHT)
    ys = Scale(0, highest, top + PLOT_HEIGHT, top)
    wide = (xs.end - xs.start) / (last - first + 1)
    gap = min(3.0, 0.25 * wide)
    marks = Marks(len(columns) <= MOST_MARKS)
    body, covers = [], []
    for i, (place, words) in enumerate(columns):
        left = xs(place) - wide / 2 + gap / 2
        floor = 0.0
        for number_of_stack, (_, values) in enumerate(stacks):
            height = ys(floor) - ys(floor + values[i])
            shown = box(left, ys(floor + values[i]), wide - gap, height)
            body.append(element("path", d=shown, class_=f"cell f{number_of_stack}"))
            floor += values[i]
        reach = max(ys(0) - ys(floor), 4.0)
        covers.append((box(left, ys(0) - reach, wide - gap, reach), words))
    body.append(marks.draw(covers, "cover"))
    height = top + PLOT_HEIGHT + 40
    return drawing(height, title, named, axes(xs, ys, x_label, y_label), *body)
