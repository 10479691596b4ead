"""The clip that bounds what one unit can do, against sums worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from grandrounds.site.private.clipping import MARGIN, add_clipped, clip_factors
from grandrounds.site.private.per_unit import per_unit


class Product(torch.nn.Module):
    """y = b a x with scalars a = 1 and b = 2, as LoRA's factors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.a.weight.fill_(1.0)
            self.b.weight.fill_(2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


def test_a_clip_worked_out_by_hand() -> None:
    """dA = g b x, dB = g a x.

    x = 1, g = 3 gives (6, 3) of norm 6.7082; x = 0.1, g = 0.5 gives (0.1, 0.05), short enough.
    With C = 1 the sums are 6 / 6.7082 + 0.1 = 0.994427 and 3 / 6.7082 + 0.05 = 0.497214.
    """
    model = Product()
    parameters = list(model.parameters())
    with per_unit(model, parameters, slots=2) as units:
        with units.of_batch([1, 1], [0, 1], padding_free=True):
            y = model(torch.tensor([[1.0], [0.1]]))
        y.backward(torch.tensor([[3.0], [0.5]]))
        units.check()
        d_a, d_b = (g.flatten() for g in units.gradients)
        assert torch.cat([d_a, d_b]).tolist() == pytest.approx([6.0, 0.1, 3.0, 0.05])
        assert math.hypot(float(d_a[0]), float(d_b[0])) == pytest.approx(6.7082, abs=1e-4)
        sums = [torch.zeros(1, 1, dtype=torch.float64) for _ in parameters]
        add_clipped(sums, units.gradients, 1.0)
    assert [float(s) for s in sums] == pytest.approx([0.994427, 0.497214], abs=2e-6)


def clipped(*units: list[float], norm: float = 1.0) -> torch.Tensor:
    """Return the clipped sum of units' gradients, over two tensors of two values."""
    gradients = torch.tensor(units).view(len(units), 2, 2)
    sums = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
    add_clipped(sums, [gradients[:, 0].clone(), gradients[:, 1].clone()], norm)
    return torch.cat(sums)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(
    "unit",
    [
        [0, 0, 0, 0],
        [0.2, 0, -0.1, 0],
        [3, 4, 0, 0],
        [1e28, -1e24, 0, 1e26],
        [1e30, -1e35, 1e38, 3e38],
    ],
)
def test_sensitivity_is_the_clip_and_no_setting(unit: list[float], norm: float) -> None:
    """One unit more moves the sum by at most C, whatever it is and whatever the others are."""
    others = [[1.0, 2.0, 3.0, 4.0], [-0.01, 0.0, 0.02, 0.0]]
    moved = clipped(*others, [float(v) for v in unit], norm=norm) - clipped(*others, norm=norm)
    assert float(moved.norm()) <= norm * (1 + 1e-7)


def test_zero_update() -> None:
    assert clipped([0.0, 0.0, 0.0, 0.0]).tolist() == [0.0] * 4
    assert clip_factors([torch.zeros(3, 5)], 1.0).tolist() == [1 - MARGIN] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_nan_does_not_pass_the_clip(bad: float) -> None:
    """The unit is left out, and the others are as without it."""
    good = [0.3, 0.0, 0.0, 0.4]
    assert torch.equal(clipped(good, [1e9, bad, 0.0, 0.0]), clipped(good))


def test_norm_does_not_overflow() -> None:
    """1e25^2 overflows float32, whose norm would be infinite and the clip 0: here it is C long."""
    assert float(clipped([1e25, 1e25, 1e25, 1e25]).norm()) == pytest.approx(1.0, abs=2e-6)
    assert float(clipped([1e-30, 0.0, 0.0, 0.0])[0]) == pytest.approx(1e-30, rel=1e-5)
