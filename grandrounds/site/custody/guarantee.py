"""What a site guarantees to its units in a run, and what it tells of it.

The site's policy decides whether visits must be private, and bounds the recipe's numbers. Noise,
sampling rate, clipping norm and number of visits are fixed at the roll call, for a day, from the
declared number of units, and then for all visits of the run. A roll call charges nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict

from grandrounds.config.digest import recipe_sha256
from grandrounds.config.keys import Config
from grandrounds.errors import BudgetError, PolicyError
from grandrounds.site.custody import budget
from grandrounds.site.custody.clock import DAY_SECONDS
from grandrounds.site.custody.sequence import check_started
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.site.private.accountant import epsilon_of, noise_for, visits_within
from grandrounds.site.private.mechanism import Mechanism, sampling_rate_of
from grandrounds.wire import guarantee
from grandrounds.wire.schedule import visits_at_most


def objections(site: SiteFile, config: Config) -> Iterator[str]:
    """Yield why a site's `[privacy]` refuses a recipe; nothing here computes ε."""
    privacy, asked = site.privacy, config.privacy
    if not config.is_private:
        if privacy.requires_units:
            yield (
                f"privacy.require = {privacy.require!r}, requested privacy.unit-guarantee = "
                f'"none" (set it to "example", and privacy.target-epsilon)'
            )
        return
    if not privacy.declared_units:
        yield (
            "privacy.declared-units = 0, but the recipe is private: the site's operator declares "
            f"its number of units under [privacy] in {site.path.name}"
        )
        return
    if privacy.declared_units < (least := site.policy.min_examples):
        yield f"min-examples = {least}, the site declares {privacy.declared_units} units"
    low, high = privacy.min_clipping_norm, privacy.max_clipping_norm
    if not low <= asked.clipping_norm <= high:
        yield (
            f"min-clipping-norm = {low:g} and max-clipping-norm = {high:g}, requested "
            f"{asked.clipping_norm:g}"
        )
    rate = sampling_rate_of(config, privacy.declared_units)
    if rate > privacy.max_sampling_rate:
        yield f"max-sampling-rate = {privacy.max_sampling_rate:g}, requested {rate:.3g}"
    rounds = config.federation.num_server_rounds
    steps = config.arguments.max_steps * visits_at_most(config, rounds)
    if steps > privacy.max_steps_of_run:
        yield f"max-steps-of-run = {privacy.max_steps_of_run}, requested {steps}"


def wanted(site: SiteFile, config: Config) -> Mechanism:
    """Return the mechanism that a recipe asks of a site, with all visits of the run.

    Raises
    ------
    ConfigError
        If no noise reaches the recipe's target, or dp-accounting is not installed.
    """
    asked, units = config.privacy, site.privacy.declared_units
    rate = sampling_rate_of(config, units)
    steps = config.arguments.max_steps
    visits = visits_at_most(config, config.federation.num_server_rounds)
    delta = min(asked.delta, site.privacy.delta)
    tells = asked.report_train_loss and site.privacy.report_train_loss
    clip = asked.clipping_norm
    return noise_for(asked, Mechanism(math.inf, clip, rate, units, steps, visits, delta, tells))


def allowed(site: SiteFile, config: Config, charged: budget.Budget) -> Mechanism:
    """Return the mechanism of a new run: with as many visits as the budget allows.

    Raises
    ------
    BudgetError
        If it allows none.
    """
    privacy, mechanism = site.privacy, wanted(site, config)
    left = privacy.epsilon_total - charged.epsilon
    visits = visits_within(mechanism, min(privacy.epsilon_of_run, left))
    fewer = Mechanism(**{**asdict(mechanism), "visits": visits})
    if not visits:
        once = epsilon_of(mechanism, 1)
        raise BudgetError(
            f"The privacy budget of this site is spent, or too small for this run: its first visit "
            f"needs epsilon {once:.3g}; epsilon-of-run = {privacy.epsilon_of_run:g}, and of "
            f"epsilon-total = {privacy.epsilon_total:g} earlier runs were charged "
            f"{charged.epsilon:.3g}."
        )
    budget.check_run(privacy, charged, fewer, epsilon_of(fewer))
    return fewer


def reserved(site: SiteFile, state: SiteState, run: str, config: Config) -> Mechanism:
    """Return the mechanism of a run at a site: that of its charge, or else of its roll call.

    A reservation charges nothing, and lapses after a day. It is made anew if recipe or policy have
    changed since.

    Raises
    ------
    PolicyError
        If the budget is in doubt, spent or not started.
    ConfigError
        If dp-accounting is not installed.
    """
    charged = budget.read(site, state)
    check_started(site)
    if run in charged.runs:
        found = charged.runs[run]
        if found.unit_column != site.privacy.unit_column:
            raise PolicyError(
                f"privacy.unit-column was {found.unit_column!r} at the first visit of this run: "
                "set it back, or start a new run."
            )
        return found.mechanism
    now, terms = state.now(), f"{recipe_sha256(config)} {asdict(site.privacy)}"
    with budget.readable("its table of reservations"):
        state.table.execute("delete from reservations where at < ?", (now - DAY_SECONDS,))
        row = state.table.execute(
            "select terms, mechanism from reservations where run = ?", (run,)
        ).fetchone()
    if row is not None and row[0] == terms:
        mechanism = Mechanism(**json.loads(row[1]))
        budget.check_run(site.privacy, charged, mechanism, epsilon_of(mechanism))
        return mechanism
    mechanism = allowed(site, config, charged)
    state.table.execute(
        "insert or replace into reservations values (?, ?, ?, ?)",
        (run, now, terms, json.dumps(asdict(mechanism))),
    )
    return mechanism


def spent(site: SiteFile, state: SiteState, run: str) -> dict[str, int | float | str]:
    """Return what an introduction tells besides the mechanism's numbers: unit, and ε so far."""
    charged = budget.read(site, state).runs.get(run)
    return {
        guarantee.UNIT: site.privacy.unit,
        guarantee.EPSILON: charged.spent if charged else 0.0,
    }


def used(site: SiteFile, state: SiteState, run: str) -> dict[str, int | float]:
    """Return what a reply to `train` tells of the budget, this visit included."""
    charged = budget.read(site, state).runs[run]
    return {guarantee.EPSILON: charged.spent, guarantee.VISITS_LEFT: charged.visits_left}
