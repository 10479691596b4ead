"""What a plan says of masks: what is lost, what is refused beside them, the range, what is told."""

from __future__ import annotations

from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.config.masked import REFUSED_RULES
from grandrounds.study.plan import masks
from grandrounds.wire.masks.fixed_point import SURE_STEPS

STEPS = "train.training-arguments.max-steps"


def notes(**changes: Any) -> str:
    asked = {"secure-aggregation": "masked32", "strategy.fraction-train": 0.25}
    return "\n".join(masks.notes(recipes.resolve(asked, changes)))


def test_without_masks_nothing_is_said() -> None:
    assert notes(**{"secure-aggregation": "none"}) == ""


def test_masks_or_robust_rules_is_called_a_choice_and_every_refused_rule_is_named() -> None:
    said = notes()
    assert "masks or robust rules is a choice" in said
    assert all(rule in said for rule in REFUSED_RULES)
    assert "uplink codecs" in said
    assert "incremental downlink" in said


@pytest.mark.parametrize(
    ("share", "lost"), [(0.15, "no site of 3"), (0.25, "1 site of 5"), (1.0, "6 sites of 20")]
)
def test_how_many_sites_may_be_lost_is_said(share: float, lost: str) -> None:
    assert f"{lost} may be lost in a round" in notes(**{"strategy.fraction-train": share})


def test_the_range_of_a_value_is_said_and_that_nothing_is_cut() -> None:
    """Six steps at 0.003 (cosine: 0.00299 in round 1), four learning rates each: 0.0717."""
    assert "32 bits in a range of ±0.0717 in round 1" in notes()
    assert "stays inside, and no value is cut" in notes()


def test_how_coarse_values_of_16_bits_are_is_said() -> None:
    """Five sites have 32767 // 5 = 6553 steps for a range of 0.0717: 2^16 * 0.0717 = 4699 fit.

    Twice as many do not, so a step is 2^-16 = 0.000015, which is 0.00021 of the range.
    """
    said = notes(**{"secure-aggregation": "masked16"})
    assert "16 bits in a range of ±0.0717 in round 1" in said
    assert "unbiased, to multiples of 1.5e-05 in round 1, 0.00021 of the range" in said
    assert "multiples of" not in notes()
    step = {
        codec: masks.as_dict(recipes.resolve({"secure-aggregation": codec}))["step-in-round-1"]
        for codec in ("masked16", "masked32")
    }
    assert step["masked16"] == step["masked32"] * 65536


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("train.training-arguments.weight-decay", 0.01, "with weight decay a value may leave it"),
        ("train.optimizer", "paged_adamw_8bit", "with the 8-bit states of paged_adamw_8bit a"),
        (STEPS, SURE_STEPS + 1, "in more than 862 steps a visit a value may leave it"),
    ],
)
def test_what_may_leave_the_range_is_said_to_be_cut_and_counted(
    key: str, value: Any, why: str
) -> None:
    said = notes(**{key: value})
    assert why in said
    assert "sites cut such values, and their count travels in the mask" in said


def test_what_a_server_still_gets_of_each_site_is_said() -> None:
    assert "and its held-out loss (rounded, if its policy lets it); message sizes" in notes()
    private = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 8.0}
    assert "its held-out loss (in a rehearsal only)" in notes(**private)
    assert "held-out loss" not in notes(**private, **{"strategy.fraction-evaluate": 0.0})
    assert "what the server still gets of each site: its introduction" in notes(**private)
    assert "and the epsilon that it has spent; message sizes" in notes(**private)
    told = {**private, "privacy.report-train-loss": True}
    assert "and the noised training loss of a visit, if its policy lets it" in notes(**told)
