"""A site's data: the name that a column gives it."""

from __future__ import annotations

from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.site.local_data import natural_name, site_of
from grandrounds.site.visit import introduction
from grandrounds.wire import messages


def test_a_site_of_the_natural_partition_introduces_itself_by_the_value_of_its_column(
    federation: dict[str, Any],
) -> None:
    natural = {"data.partitioner": "natural", "data.partition-by": "ward"}
    config = recipes.resolve({**federation, **natural})
    told = [introduction(site_of(config, p), config) for p in range(4)]
    assert all(facts.keys() <= messages.FACTS for facts in told)  # the server drops others
    assert [facts["name"] for facts in told] == ["ward 0", "ward 1", "ward 2", "ward 3"]
    iid = recipes.resolve(federation)
    assert "name" not in introduction(site_of(iid, 0), iid)


@pytest.mark.parametrize(
    ("value", "name"),
    [(7, "ward 7"), (3.0, "ward 3.0"), ("-1", "ward -1"), ("North", "North"), ("9b", "9b")],
)
def test_a_number_is_named_with_its_column(value: object, name: str) -> None:
    assert natural_name("ward", value) == name
