"""What `auto` stands for in the keys whose default follows from the data.

The formulary's private facts belong to twenty sites. Divided by them, each site knows drugs that no
other site knows, and the federation needs more steps to learn them all. Other data, and the
formulary with another number of sites, are divided IID. Where the formulary is taught to its own
base, public facts are replayed, which the base would forget.
"""

from __future__ import annotations

from collections.abc import Mapping

from grandrounds.config.values import AUTO, Scalar

FORMULARY_SITES = 20
"""Sites that own the formulary's private facts; `data.formulary.facts.SITES`."""

FORMULARY_DATA = ("formulary", "formulary-preferences")
"""Built-in data that hold the formulary's private facts: as answers, and as preferences."""

EMBEDDED_DATA = {"formulary": 1500, "formulary-preferences": 1500, "common-and-rare": 1905}
"""Built-in data, `data.embedded.EMBEDDED` → their number of records."""

_PARTITIONER, _COLUMN = "data.partitioner", "data.partition-by"
_STEPS = "train.training-arguments.max-steps"

_REPLAY, _REPLAYED = "train.replay-examples", 3

_BY_SITE: dict[str, Scalar] = {_PARTITIONER: "natural", _COLUMN: "site", _STEPS: 6}
_ELSEWHERE: dict[str, Scalar] = {_PARTITIONER: "iid", _STEPS: 5}


def settle(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a complete flat configuration with every `auto` of this module replaced."""
    by_site = (
        flat[_PARTITIONER] == AUTO
        and flat[_COLUMN] in ("", "site")
        and flat["static.dataset.name"] in FORMULARY_DATA
        and flat["data.num-partitions"] == FORMULARY_SITES
    )
    stands_for = _BY_SITE if by_site else _ELSEWHERE
    embedded = flat["static.dataset.name"] == flat["model.name"] == "formulary"
    has_answers = flat["train.objective"] != "dpo"
    is_replayed = embedded and has_answers and flat["privacy.unit-guarantee"] == "none"
    batch = flat["train.training-arguments.per-device-train-batch-size"]
    most = batch if isinstance(batch, int) and batch > 0 else _REPLAYED
    stands_for = {**stands_for, _REPLAY: min(_REPLAYED, most) if is_replayed else 0}
    out = {k: stands_for[k] if v == AUTO and k in stands_for else v for k, v in flat.items()}
    return {**out, _COLUMN: "site"} if by_site else out


def unsettle(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a settled configuration with `auto` wherever it stands for the value that is there."""
    partitions: dict[str, Scalar] = {_PARTITIONER: AUTO, _COLUMN: ""}
    steps: dict[str, Scalar] = {_STEPS: AUTO}
    replay: dict[str, Scalar] = {_REPLAY: AUTO}
    if settle({**flat, **replay}) == flat:
        flat = {**flat, **replay}
    settled = settle(flat)
    for tried in ({**partitions, **steps}, partitions, steps):
        if settle({**flat, **tried}) == settled:
            return {**flat, **tried}
    return dict(flat)
