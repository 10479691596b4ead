"""Regular expressions that a recipe brings to a site: only those that cannot stall it.

Python's `re` tries all ways in which an expression can match, and some have more than any machine
can try. `ways` bounds their number from the text of the expression.
"""

from __future__ import annotations

import math
import re

LONGEST_PATH = 64
"""Characters of a module's path for which `ways` counts."""

MOST_WAYS = 1e6
"""Three repetitions (64^3) and a few alternatives; the worst takes about a second for each path."""

_BRACKETS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_ESCAPED = re.compile(r"\\.")


def ways(expression: str) -> float:
    """Return a bound of the ways to try an expression on a path; infinite if there is none.

    Each repetition of a character multiplies them by the length of the path, each optional part by
    2, each group by its alternatives. Repeated groups, references to groups and look-around have no
    bound here.
    """
    if re.search(r"\\[1-9]", expression):
        return math.inf
    text = _ESCAPED.sub("x", _BRACKETS.sub("x", expression))
    if re.search(r"\)[*+{]|\(\?|[*+?}][*+{]", text):
        return math.inf
    alternatives, found = [1], 1.0
    for character in text:
        if character in "*+{":
            found *= LONGEST_PATH
        elif character == "?":
            found *= 2
        elif character == "|":
            alternatives[-1] += 1
        elif character == "(":
            alternatives.append(1)
        elif character == ")" and len(alternatives) > 1:
            found *= alternatives.pop()
    return found * math.prod(alternatives)
