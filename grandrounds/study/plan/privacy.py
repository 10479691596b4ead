"""What a private recipe spends, how much noise it adds, and what that means; loads no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from statistics import NormalDist
from typing import Any

from grandrounds.config.keys import Config
from grandrounds.config.strategies import STRATEGIES
from grandrounds.config.words import counted, percent
from grandrounds.errors import ConfigError
from grandrounds.model.architectures import adapter_shapes, find_architecture, target_modules
from grandrounds.site.private.accountant import epsilon_of
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.private.rehearsal import mechanism_of
from grandrounds.study.tables import Table, number
from grandrounds.wire.adapter import Shapes, count_parameters, of_factors
from grandrounds.wire.schedule import visits_at_most

DOUBTFUL, HOPELESS = 6.0, 20.0
"""Noise-to-clip ratio above which a run may not learn, and will not: on the embedded base, runs of
60 steps learned at 2.5 and at 6.1."""

FEWEST_SITES = 80
"""Sites a round below which nothing is called private at site level: noise of multiplier 2 on the
mean of 80 updates of 67,584 values, the embedded adapter's B factors, is 6.5 times as long as an
update can be."""

UNITS_UNKNOWN = (
    "how much noise a private run adds depends on the units, records or patients, that a site "
    "declares: give them as grandrounds privacy plan --units N, or --set privacy.declared-units=N"
)
"""Said where a recipe leaves the number to the sites."""

SITE_EPSILON, SITE_DELTA = 8.0, 1e-3
"""Weak guarantee at which a recipe's noise at site level is worked out."""


@dataclass(frozen=True)
class Spent:
    """The ε of a site after some rounds."""

    rounds: int
    visits: int
    """Visits of these rounds to a site that is asked as often as any can be."""
    epsilon: float


@dataclass(frozen=True)
class SiteLevel:
    """What it would take to hide a whole site, which no recipe of this version does."""

    cohort: int
    """Sites that train in a round."""
    releases: int
    """Rounds in which one site may take part: without amplification by the choice of cohorts."""
    noise_multiplier: float
    """For ε = 8 at delta = 1e-3, if each site's update is clipped and the mean noised once."""
    noise_to_clip: float
    """Length of that noise over the largest length of an update."""
    fewest_sites: int
    """Sites a round at which the ratio is at most `DOUBTFUL`, at least `FEWEST_SITES`."""

    @property
    def reason(self) -> str:
        """Why the recipe is not private at site level, in one sentence."""
        needed = (
            f"hiding a whole site among {self.cohort} a round at a weak epsilon = {SITE_EPSILON:g} "
            f"(delta {SITE_DELTA:g}, {counted(self.releases, 'release')} of each site) takes noise "
            f"{number(self.noise_to_clip, 3)} times as long as an update can be"
        )
        if self.cohort < self.fewest_sites:
            return (
                f"{needed}: with this adapter nothing learns below about {self.fewest_sites:,} "
                "sites a round"
            )
        return f"{needed}, and no recipe adds it: what is hidden is a unit, not a site"


@dataclass(frozen=True)
class PrivacyPlan:
    """The guarantee of a private recipe for one unit of one site."""

    config: Config
    mechanism: Mechanism
    num_values: int
    """Values that a visit trains, at most."""

    @property
    def unit(self) -> str:
        """What the guarantee hides: `patient` or `record`."""
        return "patient" if self.config.privacy.unit_column else "record"

    @property
    def noise_to_clip(self) -> float:
        """Length of a step's noise over the largest length of its signal."""
        return self.mechanism.noise_to_clip(self.num_values)

    @cached_property
    def spent(self) -> tuple[Spent, ...]:
        """ε after one round, half of them, and all."""
        rounds = self.config.federation.num_server_rounds
        found = []
        for upto in sorted({1, math.ceil(rounds / 2), rounds}):
            visits = visits_at_most(self.config, upto)
            found.append(Spent(upto, visits, epsilon_of(self.mechanism, visits)))
        return tuple(found)

    @property
    def epsilon(self) -> float:
        """ε after all rounds."""
        return self.spent[-1].epsilon

    @cached_property
    def site_level(self) -> SiteLevel:
        """What a guarantee for whole sites would take."""
        cohort, releases = self.config.cohort_size, self.mechanism.visits
        noise = math.sqrt(releases) * gaussian_noise(SITE_EPSILON, SITE_DELTA)
        length = noise * math.sqrt(self.num_values)
        fewest = max(FEWEST_SITES, math.ceil(length / DOUBTFUL))
        return SiteLevel(cohort, releases, noise, length / cohort, fewest)


def gaussian_noise(epsilon: float, delta: float) -> float:
    """Return the noise multiplier at which one Gaussian release has (ε, delta), to 1e-6.

    delta = Phi(1 / (2 z) - ε z) - e^ε Phi(-1 / (2 z) - ε z): Balle and Wang (2018), theorem 8.
    Several releases of multiplier z are one of z / sqrt(their number).
    """
    below = NormalDist().cdf
    low, high = 1e-3, 1e6
    while high / low > 1 + 1e-6:
        z = math.sqrt(low * high)
        spent = below(0.5 / z - epsilon * z) - math.exp(epsilon) * below(-0.5 / z - epsilon * z)
        low, high = (low, z) if spent <= delta else (z, high)
    return high


def privacy_plan(config: Config, shapes: Shapes) -> PrivacyPlan | None:
    """Return what a recipe guarantees at each site.

    None if it is not private, or does not say how many units a site declares.

    Parameters
    ----------
    shapes : mapping
        Of the adapter's tensors.

    Raises
    ------
    ConfigError
        If no noise reaches the target, or dp-accounting is not installed.
    """
    if not config.is_private or not config.privacy.declared_units:
        return None
    return PrivacyPlan(config, mechanism_of(config), trained_values(config, shapes))


def plan_of_recipe(config: Config, architecture: str | None = None) -> PrivacyPlan:
    """Return what a private recipe guarantees at each site.

    Parameters
    ----------
    architecture : str, optional
        A known base with the same shapes, if `model.name` is unknown.

    Raises
    ------
    ConfigError
        As for `privacy_plan`, and if no units are declared.
    ModelError
        If the base's shapes are unknown, or a target is not one of its linear modules.
    """
    if not config.privacy.declared_units:
        raise ConfigError(f"privacy.declared-units = 0: {UNITS_UNKNOWN}.")
    base = find_architecture(architecture or config.model.name)
    targets = target_modules(base, config.lora.target_modules)
    shapes = adapter_shapes(
        base,
        targets,
        config.lora.peft_lora_r,
        rank_pattern=tuple(config.lora.ranks_by_pattern.items()),
    )
    return PrivacyPlan(config, mechanism_of(config), trained_values(config, shapes))


def trained_values(config: Config, shapes: Shapes) -> int:
    """Return how many values a visit trains: of the round in which they are most."""
    rule = STRATEGIES[config.strategy.name]
    return max(count_parameters(of_factors(shapes, part)) for part in (rule.odd, rule.even))


# --- In words and numbers -------------------------------------------------------------------------


def rows(plan: PrivacyPlan) -> list[tuple[str, str]]:
    """Return the guarantee as (item, value)."""
    mechanism = plan.mechanism
    rounds = plan.config.federation.num_server_rounds
    expected = number(mechanism.expected_batch, 3)
    return [
        ("unit", f"{plan.unit}; neighbours differ by one that is added or removed"),
        ("noise multiplier (sigma)", number(mechanism.noise_multiplier)),
        ("clipping norm", f"{mechanism.clipping_norm:g}"),
        (
            "sampling rate",
            f"{number(mechanism.sampling_rate)}: {expected} of {mechanism.declared_units:,} "
            "declared units a step",
        ),
        (
            "steps of a site, at most",
            f"{mechanism.all_steps:,}: {counted(mechanism.visits, 'visit')} x {mechanism.steps}",
        ),
        ("delta", f"{mechanism.delta:g}"),
        *(
            (f"epsilon after {_rounds(one, rounds)}", f"{one.epsilon:.2f}{_visits(one)}")
            for one in plan.spent
        ),
        (
            "noise to clip",
            f"{number(plan.noise_to_clip, 3)} for {plan.num_values:,} trained values",
        ),
        *_loss_row(mechanism),
        ("site level", "not private"),
    ]


def _loss_row(mechanism: Mechanism) -> list[tuple[str, str]]:
    if not mechanism.tells_loss:
        return []
    return [("training loss", f"told, +- {number(mechanism.loss_deviation, 2)} nats a visit")]


def _rounds(spent: Spent, rounds: int) -> str:
    return f"all {rounds} rounds" if spent.rounds == rounds > 1 else counted(spent.rounds, "round")


def _visits(spent: Spent) -> str:
    return f" ({counted(spent.visits, 'visit')})"


def table(plan: PrivacyPlan) -> Table:
    """Return the plan's table on privacy."""
    return Table(("item", "value"), rows(plan), "privacy of one unit at one site")


def warnings(plan: PrivacyPlan) -> list[str]:
    """Return what speaks against the recipe: noise that drowns the signal, and a large delta."""
    said, mechanism = [], plan.mechanism
    ratio = number(plan.noise_to_clip, 3)
    less = (
        "declare more units, draw more of them a step, train fewer values (a lower rank, fewer "
        "modules, strategy ffa), or accept a larger epsilon"
    )
    if plan.noise_to_clip > HOPELESS:
        said.append(
            f"will not learn: a step's noise is {ratio} times as long as its signal can be (above "
            f"{HOPELESS:g}); {less}"
        )
    elif plan.noise_to_clip > DOUBTFUL:
        said.append(
            f"may not learn: a step's noise is {ratio} times as long as its signal can be (above "
            f"{DOUBTFUL:g}); {less}"
        )
    if (most := 1 / (10 * mechanism.declared_units)) <= mechanism.delta:
        said.append(
            f"delta = {mechanism.delta:g} is too large for {mechanism.declared_units:,} units: it "
            f"must be below {most:.2g}, or a guarantee that publishes a record would pass"
        )
    return said


def notes(plan: PrivacyPlan) -> list[str]:
    """Return warnings, what the guarantee means for a patient, and what it does not cover."""
    return [
        *warnings(plan),
        meaning(plan.unit, plan.epsilon, plan.mechanism.delta),
        _cohorts(plan),
        f"site level: not private: {plan.site_level.reason}",
        "each site has its own epsilon, and a patient at several sites the sum; a site's policy "
        "may ask for more than the recipe",
    ]


def meaning(unit: str, epsilon: float, delta: float) -> str:
    """Return in one sentence what a guarantee means for a patient.

    A test of size alpha for one unit has a power of at most e^ε alpha + delta and of at most
    1 - e^-ε (1 - delta - alpha) (Kairouz, Oh and Viswanath, 2015, theorem 2.1). Of two equally
    likely cases, it tells the right one with probability at most (e^ε + delta) / (1 + e^ε).
    """
    factor = math.exp(-epsilon)
    right = (1 + delta * factor) / (1 + factor)
    found = min(0.01 / factor + delta if factor > 1e-9 else 1.0, 1 - factor * (0.99 - delta))
    return (
        f"for one {unit}: whoever sees all that leaves the site, and knows every other {unit}, is "
        f"right about whether this one took part in at most {_below_one(right)} of cases (50.0 % "
        f"by guessing), and detects at most {_below_one(found)} of those who did at 1 % false "
        "alarms"
    )


def _below_one(share: float) -> str:
    """Format a share, with so many decimals that only all of it is 100 %."""
    return next((t for d in (1, 2, 3) if (t := percent(share, d)) != percent(1.0, d)), "100 %")


def _cohorts(plan: PrivacyPlan) -> str:
    config, rounds = plan.config, plan.config.federation.num_server_rounds
    drawn, sites = config.strategy.cohorts, config.data.num_partitions
    most = counted(plan.mechanism.visits, "round")
    how = (
        f"a site is asked in at most {most} of {rounds}"
        if drawn == "balanced"
        else f"a site may be asked in every one of {counted(rounds, 'round')}"
    )
    return (
        f"{drawn} cohorts, {config.cohort_size} of {sites}: {how}; the server knows who is asked "
        "when, so that nothing is deducted for the rounds in which a site rests"
    )


def as_dict(plan: PrivacyPlan) -> Mapping[str, Any]:
    """Return the plan as JSON values."""
    mechanism, level = plan.mechanism, plan.site_level
    return {
        "unit": plan.unit,
        "adjacency": "add or remove one unit",
        "delta": mechanism.delta,
        "noise-multiplier": mechanism.noise_multiplier,
        "clipping-norm": mechanism.clipping_norm,
        "sampling-rate": mechanism.sampling_rate,
        "declared-units": mechanism.declared_units,
        "expected-batch": mechanism.expected_batch,
        "steps-per-visit": mechanism.steps,
        "visits-of-a-site": mechanism.visits,
        "epsilon": [
            {"rounds": one.rounds, "visits": one.visits, "epsilon": one.epsilon}
            for one in plan.spent
        ],
        "noise-to-clip": plan.noise_to_clip,
        "trained-values": plan.num_values,
        "train-loss-deviation": mechanism.loss_deviation if mechanism.tells_loss else None,
        "learns": verdict(plan),
        "meaning": meaning(plan.unit, plan.epsilon, mechanism.delta),
        "site-level": {
            "private": False,
            "why": level.reason,
            "noise-to-clip": level.noise_to_clip,
            "fewest-sites-a-round": level.fewest_sites,
        },
        "accountant": f"dp-accounting {version('dp-accounting')}, PLD",
        "warnings": warnings(plan),
    }


def verdict(plan: PrivacyPlan) -> str:
    """Return whether the recipe can learn: `likely`, `doubtful` or `no`."""
    if plan.noise_to_clip > HOPELESS:
        return "no"
    return "doubtful" if plan.noise_to_clip > DOUBTFUL else "likely"
