"""An expression that a site would match for hours is none of a recipe."""

from __future__ import annotations

import math
import re
import time

import pytest

from grandrounds.config.expressions import MOST_WAYS, ways

PATH = "model.layers.31.self_attn.q_projj"


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        ("q_proj", 1),
        (r"layers\.[0-7]\.self_attn\.q_proj", 1),
        (r"model\.layers\.\d+\..*_proj", 64**2),
        ("(q|k|v)_proj", 3),
        ("q_proj|(k|v)_proj", 4),
        (r"(0|1)\.q_(a_)?proj", 4),
        (r"[*+?(|]\*", 1),
        ("(.*a)*b", math.inf),
        ("(a|b){9}", math.inf),
        ("(?=a)b", math.inf),
        (r"(a)\1", math.inf),
        ("a*+", math.inf),
        (".?" * 30, 2**30),
        (".*" * 5, 64**5),
    ],
)
def test_the_ways_of_an_expression_are_bounded_from_its_text(expression: str, count: float) -> None:
    assert ways(expression) == count


@pytest.mark.parametrize("expression", [".*.*.*x", "(.|.)" * 19 + "x", ".?" * 19 + "x"])
def test_the_slowest_that_are_allowed_take_about_a_second(expression: str) -> None:
    assert ways(expression) <= MOST_WAYS
    begun = time.process_time()
    assert re.match(rf"(.*\.)?({expression})$", PATH) is None
    assert time.process_time() - begun < 5
