"""The texts of a page beside what the raw files say: what is checked, wrong or unexplained."""

from __future__ import annotations

import itertools
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scripts.check_figures.page import Texts
from scripts.check_figures.raw import PYPROJECT
from scripts.check_figures.shown import agree, numbers_in

Cell = Sequence[float] | str
"""The numbers of a cell, or its whole text."""


@dataclass
class Sheet:
    """One page, card or tracker that is checked."""

    texts: Texts
    names: Sequence[str] = ()
    """Texts whose digits are no figures: names of files, models and sites, reasons of failures."""
    checked: Counter[str] = field(default_factory=Counter)
    """Kind of place → figures that are right."""
    findings: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    """Places that a rule has checked."""

    def want(self, place: str, raw: Sequence[float]) -> None:
        """Check that a text holds these numbers, one each and in order."""
        if place not in self.texts:
            self.findings.append(f"{place} is missing: the raw files have {_listed(raw)}")
            return
        self.seen.add(place)
        if agree(numbers_in(self.texts[place], self.names), raw):
            self._count(place, len(raw))
        else:
            self.findings.append(
                f"{place} says {self.texts[place]!r}: the raw files have {_listed(raw)}"
            )

    def among(self, place: str, raw: Iterable[float]) -> None:
        """Check that every number of a text is one of these."""
        values = list(raw)
        self.seen.add(place)
        for shown in numbers_in(self.texts[place], self.names):
            if any(shown.shows(value) for value in values):
                self._count(place, 1)
            else:
                self.findings.append(
                    f"{place} says {self.texts[place]!r}: no raw value is {shown.value:g}"
                )

    def verbatim(self, place: str, text: str) -> None:
        """Check that a text is this one."""
        self.seen.add(place)
        said = self.texts.get(place)
        if said == text:
            self._count(place, len(numbers_in(text)))
        else:
            self.findings.append(f"{place} says {said!r}: the raw files have {text!r}")

    def marks(self, figure: str, raw: Sequence[Sequence[float]]) -> None:
        """Check that the marks of a figure are these, in any order."""
        left = list(raw)
        for place in self.under(f"figure/{figure}/mark/"):
            self.seen.add(place)
            shown = numbers_in(self.texts[place], self.names)
            match = next((values for values in left if agree(shown, values)), None)
            if match is None:
                self.findings.append(f"{place} says {self.texts[place]!r}: no raw values match")
            else:
                left.remove(match)
                self._count(place, len(match))
        self.findings += [f"figure/{figure} has no mark for {_listed(values)}" for values in left]

    def table(self, place: str, rows: Sequence[Sequence[Cell]]) -> None:
        """Check all cells of a table."""
        there = {
            p.removeprefix(f"{place}/cell/").split("/")[0] for p in self.under(f"{place}/cell/")
        }
        if len(there) != len(rows):
            self.findings.append(f"{place} has {len(there)} rows: the raw files have {len(rows)}")
        for r, row in enumerate(rows):
            for c, cell in enumerate(row):
                at = f"{place}/cell/{r}/{c}"
                if isinstance(cell, str):
                    self.verbatim(at, cell)
                else:
                    self.want(at, cell)

    def ticks(self) -> None:
        """Check that the numbers of each axis rise evenly, or as powers, to about its values."""
        axes: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for place in self.under("figure/"):
            figure, key, kind, *where = place.split("/")
            if kind != "tick":
                continue
            self.seen.add(place)
            anchor, x, y, _ = where[0].split(",")
            if len(found := numbers_in(self.texts[place], self.names)) == 1:
                axis, at = (f"y{x}", float(y)) if anchor == "end" else (f"x{y}", float(x))
                axes.setdefault((figure, key, axis), []).append((at, found[0].value))
        for (_, key, axis), found in axes.items():
            found.sort()
            values = [value for _, value in found]
            steps = {round(b - a, 9) for a, b in itertools.pairwise(values)}
            rises = sorted(values) in (values, values[::-1])
            rises &= max(map(abs, values)) <= 2 * self._largest(f"figure/{key}", axis)
            if not rises or (len(steps) > 1 and not _are_round(values)):
                self.findings.append(f"figure/{key}: the ticks of axis {axis} are {values}")
            else:
                self._count("figure/tick/tick", len(values))

    def _largest(self, figure: str, axis: str) -> float:
        """Return about what a tick may be at most, from the marks and the table of a figure.

        A vertical axis has what marks say after a colon, stacks added up; shares end at 100 %.
        """
        marks = [self.texts[place] for place in self.under(f"{figure}/mark/")]
        values = [text.rpartition(": ")[2] if axis.startswith("y") else text for text in marks]
        sizes = [sum(abs(s.value) for s in numbers_in(text, self.names)) for text in values]
        is_share = any("%" in text for text in marks)
        planned = [self.texts[place] for place in self.under(f"{figure}/cell/")]
        has_more = figure.endswith(("/communication", "/participation"))  # the plan, all sites
        if axis.startswith("x") or has_more:
            sizes += [abs(s.value) for text in planned for s in numbers_in(text, self.names)]
        return max(1e-12, *sizes, 100.0 * is_share)

    def labels(self, figure: str, raw: Iterable[float]) -> None:
        """Check that numbers beside marks are among these."""
        values = list(raw)
        for place in self.under(f"figure/{figure}/label/"):
            self.among(place, values)

    def under(self, start: str) -> list[str]:
        """Return the places that begin so."""
        return [place for place in self.texts if place.startswith(start)]

    def rest(self) -> None:
        """Report every number that no rule has explained."""
        version = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["version"]
        if self.texts.get("footer", "").startswith(f"Made by grandrounds {version}, "):
            self.seen.add("footer")  # the rest is the date of the page
        for place in self.texts:
            if "/column/" in place and place not in self.seen:
                self.among(place, [95, 256])  # 95 % intervals, SHA-256
        for place, text in self.texts.items():
            if place not in self.seen and numbers_in(text, self.names):
                self.findings.append(f"{place}: no rule explains {text!r}")

    def _count(self, place: str, figures: int) -> None:
        parts = place.split("/")
        kind = parts[2] if parts[0] == "figure" and len(parts) > 2 else parts[0]
        self.checked[f"figure {kind}" if parts[0] == "figure" else kind] += figures


def _are_round(values: Sequence[float]) -> bool:
    """Whether all values are 1, 2 or 5 times a power of ten, or 0."""
    return all(f"{abs(v):e}"[0] in "0125" for v in values)


def _listed(raw: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in raw) + "]"
