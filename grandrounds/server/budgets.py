"""The privacy budgets of a run's sites, as far as the server knows them: what each site told.

A site enforces its budget itself. The server notes the ε that each has told, and goes on without
the sites whose budget is spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.words import counted
from grandrounds.errors import BudgetError
from grandrounds.server.exchange import Tally
from grandrounds.server.introductions import SiteCard
from grandrounds.server.roll_call import Roster
from grandrounds.wire import guarantee
from grandrounds.wire.guarantee import EPSILON, VISITS_LEFT
from grandrounds.wire.told import in_custody


def note(roster: Roster, tally: Tally) -> None:
    """Note the ε that sites told in a round, and which of them have spent their budget."""
    for site, metrics in tally.good.items():
        card = roster.cards[site]
        if EPSILON in metrics:
            facts = {**card.facts, EPSILON: float(metrics[EPSILON])}
            roster.cards[site] = SiteCard(card.node_id, facts)
        if metrics.get(VISITS_LEFT, 1) == 0:
            roster.spent.add(site)
    roster.spent |= tally.spent


def are_enough(roster: Roster) -> bool:
    """Whether as many sites have a budget left as the run needs."""
    return roster.num_sites - len(roster.spent) >= (roster.min_sites or roster.num_sites)


def check(roster: Roster, number: int, cohort: Sequence[int]) -> None:
    """Check that a round can be played without the sites whose budget is spent.

    Parameters
    ----------
    cohort
        The round's cohort without these.

    Raises
    ------
    BudgetError
        If too few sites are left, or none of the cohort.
    """
    if not roster.spent or (cohort and are_enough(roster)):
        return
    left = roster.num_sites - len(roster.spent)
    least = roster.min_sites or roster.num_sites
    needed = (
        f"{counted(left, 'site')} of at least {least} left (strategy.min-sites = "
        f"{roster.min_sites})"
        if left < least
        else "nobody left in its cohort"
    )
    raise BudgetError(
        f"The privacy budget of {roster.names.listed(sorted(roster.spent))} is spent: round "
        f"{number} has {needed}. The last checkpoint stays; a larger epsilon-of-run at these sites "
        "or fewer rounds lets a new run go further."
    )


def fallen(introduced: Iterable[Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """Return the sites that told a smaller ε than before: partition id → (before, now)."""
    return {
        int(facts["partition-id"]): (float(facts[EPSILON]), float(facts[guarantee.EPSILON_FELL]))
        for facts in introduced
        if guarantee.EPSILON_FELL in facts
    }


def loss_noise(
    good: Mapping[int, Mapping[str, Any]],
    introduced: Mapping[int, Mapping[str, Any]],
    weights: Mapping[int, int],
) -> dict[str, float]:
    """Return the standard deviation of the noise on a round's mean training loss, in nats.

    Empty if no site of the round noises its loss.
    """
    telling = [p for p, metrics in good.items() if "train-loss" in metrics]
    noise = {p: float(introduced.get(p, {}).get(guarantee.LOSS_DEVIATION, 0)) for p in telling}
    if not any(noise.values()):
        return {}
    squares = sum((weights[p] * noise[p]) ** 2 for p in telling)
    return {guarantee.LOSS_DEVIATION: math.sqrt(squares) / sum(weights[p] for p in telling)}


def summary_of(
    config: Config, sites: Sequence[Mapping[str, Any]], spent: Iterable[int]
) -> dict[str, Any] | None:
    """Return the section `privacy` of summary.json; None for a run without a guarantee.

    Parameters
    ----------
    sites
        The content of sites.json.
    spent
        Sites whose budget is spent.
    """
    private = [facts for facts in sites if guarantee.is_private(facts)]
    if not config.is_private and not private:
        return None
    gone = set(spent)
    epsilons = {str(f["partition-id"]): f.get(EPSILON) for f in private}
    fell = fallen(private)
    told = {
        str(facts["partition-id"]): {
            **{name.replace("-", "_"): facts.get(name) for name in guarantee.GUARANTEE},
            "enforced": in_custody(facts),
            "budget_spent": int(facts["partition-id"]) in gone,
            "epsilon_fell_to": fell.get(int(facts["partition-id"]), (0.0, None))[1],
        }
        for facts in private
    }
    known = [epsilon for epsilon in epsilons.values() if epsilon is not None]
    return {
        "guarantee": config.privacy.unit_guarantee,
        "mode": "enforced" if private and all(map(in_custody, private)) else "rehearsal",
        "adjacency": guarantee.ADJACENCY,
        **{name.replace("-", "_"): _shared(private, name) for name in SHARED},
        "epsilon": max(known, default=None),
        "epsilon_by_site": epsilons,
        "sites_without_guarantee": sorted(
            str(facts["partition-id"]) for facts in sites if not guarantee.is_private(facts)
        ),
        "budget_spent": sorted(map(str, gone)),
        "sites": told,
        **({"continued_from": config.lora.from_adapter_sha256} if config.lora.is_continued else {}),
    }


SHARED = (
    *(guarantee.UNIT, guarantee.DELTA, guarantee.NOISE_MULTIPLIER, guarantee.CLIPPING_NORM),
    *(guarantee.SAMPLING_RATE, guarantee.RESERVED_EPSILON, guarantee.LOSS_DEVIATION),
    guarantee.ACCOUNTANT,
)
"""What the summary says of all sites together; null where they differ."""


def _shared(sites: Sequence[Mapping[str, Any]], name: str) -> Any:
    values = {facts.get(name) for facts in sites}
    return values.pop() if len(values) == 1 else None
