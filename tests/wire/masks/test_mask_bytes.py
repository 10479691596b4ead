"""What masks add to the bytes of a site: within the limits, for small and large adapters."""

from __future__ import annotations

import pytest

from grandrounds.wire.masks import packed
from grandrounds.wire.masks.fixed_point import FixedPoint

MIB = 2**20


@pytest.mark.parametrize(
    ("sites", "mib", "share"),
    [(20, 0.47, 0.01), (100, 0.47, 0.05), (20, 13, 0.001), (100, 84, 0.001)],
)
def test_masks_add_little_to_an_adapter_both_ways(sites: int, mib: float, share: float) -> None:
    values = int(mib * MIB / 4)
    numbers = FixedPoint("masked32", sites, values, 0.05, 1000)
    sizes = packed.sizes(sites)
    more = sum(sizes.down.values()) + sum(sizes.up.values()) + numbers.size_bytes - 4 * values
    assert 0 < more / (2 * 4 * values) <= share
