"""The roster: who may take part."""

from __future__ import annotations

from typing import Any

import pytest

from grandrounds.engines.deployment.keys import public_text
from grandrounds.errors import ConfigError
from grandrounds.wire.masks.attempt import threshold
from grandrounds.wire.masks.roster import roster_of
from tests.masking import identity, roster_of_sites


def content(count: int = 3, **changes: Any) -> dict[str, Any]:
    sites = [
        {"partition-id": i, "name": f"site-{i}", "agent-key": public_text(identity(i).public_key())}
        for i in range(count)
    ]
    return {"consortium": "rounds", "serial": 1, "sites": sites, **changes}


def test_a_roster_has_its_keys_and_a_digest_of_all_of_them() -> None:
    found = roster_of(content(), "roster.json")
    assert found.digest == roster_of_sites(3).digest
    others = [
        roster_of(content(4), ""),
        roster_of(content(serial=2), ""),
        roster_of(content(consortium="x"), ""),
    ]
    assert len({found.digest, *(one.digest for one in others)}) == 4
    assert (found.name(1), found.name(9)) == ("'site-1'", "site 9")


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        [1],
        "x",
        None,
        {"consortium": "x", "serial": True, "sites": []},
        content(2),
        content(257),
        content(sites=[*content()["sites"], content()["sites"][0]]),
        content(sites=[*content()["sites"], {**content()["sites"][0], "partition-id": 9}]),
        content(sites=[*content()["sites"], {"partition-id": 5, "name": "x", "agent-key": "ssh"}]),
        content(sites=[*content()["sites"], "x"]),
        content(sites=[*content()["sites"], {**content(4)["sites"][3], "partition-id": True}]),
    ],
)
def test_a_roster_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        roster_of(wrong, "roster.json")


@pytest.mark.parametrize(("sites", "least"), [(3, 3), (4, 3), (5, 4), (6, 5), (20, 14), (100, 67)])
def test_the_threshold_is_more_than_two_thirds(sites: int, least: int) -> None:
    assert threshold(sites) == least
