"""The design of a comparison: its arms, their units of work and the visits of each.

docs/compare.md describes the arms. A unit is the piece of work that a stopped comparison either
has finished or repeats: one federation, one centralised run or one site alone, for one seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grandrounds.config.keys import PLACES, Config
from grandrounds.config.values import words_of
from grandrounds.errors import ConfigError, nearest
from grandrounds.wire.names import SiteNames

BASE, FEDERATED, PERSONAL, PRIVATE, CENTRALISED, LOCAL, LEAVE_ONE_OUT = (
    "base",
    "federated",
    "personal",
    "private",
    "centralised",
    "local",
    "leave-one-out",
)

ARMS = (FEDERATED, PERSONAL, PRIVATE, CENTRALISED, LOCAL, LEAVE_ONE_OUT)
"""Arms to choose from; `base` is always evaluated too."""

FEDERATIONS = (FEDERATED, PRIVATE, LEAVE_ONE_OUT)
"""Arms whose units are whole runs."""

BY_SITE = (PERSONAL, LOCAL)
"""Arms with an adapter for each site."""


@dataclass(frozen=True)
class Unit:
    """One adapter to train and evaluate."""

    arm: str
    """`base`, or one of `ARMS`."""
    seed: int
    site: int | None = None
    """The site trained alone, left out, or whose personal adapter it is; None in other arms."""

    @property
    def name(self) -> str:
        """Its path below `units` and `runs`: `local/seed-42/site-3`."""
        parts = [self.arm, f"seed-{self.seed}"]
        return "/".join(parts if self.site is None else [*parts, f"site-{self.site}"])

    def title(self, names: SiteNames) -> str:
        """Return its name in messages: `local, seed 42, Ward B`."""
        site = "" if self.site is None else f", {names[self.site]}"
        return f"{self.arm}, seed {self.seed}{site}"


@dataclass(frozen=True)
class Design:
    """What a comparison consists of, besides the configuration of the federated arm."""

    arms: Sequence[str]
    """Some of `ARMS`, as `check_arms` returns them."""
    seeds: Sequence[int]
    left_out: Sequence[int] = ()
    """Sites that `leave-one-out` leaves out, one per federation."""
    benchmarks: Sequence[str] = ()
    """Benchmarks to evaluate in addition to the formulary."""
    benchmark_data: Path | None = None
    """Folder with the files of the benchmarks; None: from the hub."""
    limit: int | None = None
    """Evaluate only the first so many items of each benchmark."""
    equal_visits: bool = False
    """Whether `personal` follows a federation of fewer rounds, so that both make no more example
    visits than the other arms."""

    def units(self, num_sites: int) -> Iterator[Unit]:
        """Yield every unit, seed by seed, so that results of the first seed come early."""
        for seed in self.seeds:
            yield Unit(BASE, seed)
            for arm in self.arms:
                if arm in BY_SITE:
                    yield from (Unit(arm, seed, site) for site in range(num_sites))
                elif arm == LEAVE_ONE_OUT:
                    yield from (Unit(arm, seed, site) for site in self.left_out)
                else:
                    yield Unit(arm, seed)

    def options(self) -> list[str]:
        """Return the options of `grandrounds compare` that give this design."""
        words = ["--arms", ",".join(self.arms), "--seeds", str(len(self.seeds))]
        if self.equal_visits:
            words += ["--equal-visits"]
        if LEAVE_ONE_OUT in self.arms:
            words += ["--sites", ",".join(map(str, self.left_out))]
        if self.benchmarks:
            words += ["--benchmarks", ",".join(self.benchmarks)]
            words += ["--benchmark-data", str(self.benchmark_data)] if self.benchmark_data else []
            words += ["--limit", str(self.limit)] if self.limit else []
        return words


def default_arms(config: Config) -> tuple[str, ...]:
    """Return the arms that are trained where none is asked for."""
    if config.is_private:
        return FEDERATED, PRIVATE
    personal = (PERSONAL,) if config.is_personal else ()
    return (FEDERATED, *personal, CENTRALISED, LOCAL)


def check_arms(names: Sequence[str]) -> tuple[str, ...]:
    """Return the arms in the order of `ARMS`, each once.

    Raises
    ------
    ConfigError
        If there is none, or one is unknown; the message suggests the nearest name.
    """
    for name in names:
        if name not in ARMS:
            hint = " It is always evaluated." if name == BASE else nearest(name, ARMS)
            raise ConfigError(f"unknown arm {name!r}; allowed: {', '.join(ARMS)}.{hint}")
    if not names:
        raise ConfigError(f"--arms is empty; allowed: {', '.join(ARMS)}.")
    return tuple(arm for arm in ARMS if arm in names)


def check_seeds(first: int, count: int) -> list[int]:
    """Return `count` seeds, starting at `first`; raise `ConfigError` for a count below 1."""
    if type(count) is not int or count < 1:
        raise ConfigError(f"--seeds = {count}: at least 1 seed is required, and 2 for intervals.")
    return list(range(first, first + count))


def check_sites(
    text: str, num_sites: int, names: SiteNames | None = None, option: str = "--sites"
) -> list[int]:
    """Return the sites named by `all`, `3`, `0,3,5` or `ward b,0`.

    Parameters
    ----------
    names : SiteNames, optional
        What the sites are called; upper and lower case are the same.
    option : str
        What the caller calls the text, for errors.

    Raises
    ------
    ConfigError
        If there is no such site.
    """
    if text.strip() == "all":
        return list(range(num_sites))
    labels = names.labels if names else {}
    by_name = {name.casefold(): site for site, name in labels.items()}

    def number(word: str) -> int | None:
        is_number = word.isascii() and word.isdigit() and int(word) < num_sites
        return int(word) if is_number else by_name.get(word.casefold())

    words = list(words_of(text))
    found = {word: number(word) for word in words}
    wrong = [word for word in words if found[word] is None]
    if wrong or not words:
        called = f", or names: {', '.join(labels.values())}" if labels else ""
        raise ConfigError(
            f"{option} {text!r}: {wrong[0] if wrong else 'nothing'} is not a site; allowed: "
            f"all, or numbers from 0 to {num_sites - 1}, separated by commas{called}."
        )
    return sorted({site for site in found.values() if site is not None})


def check_recipe(arms: Sequence[str], config: Config) -> None:
    """Check that a recipe has no place of a single run, and that personal adapters or a guarantee
    are compared as such, by their arm.

    Raises
    ------
    ConfigError
        If it has one, and as `check_personal` and `check_private`.
    """
    for key in PLACES:
        if config.flat()[key]:
            raise ConfigError(f"{key} is for single runs: give the comparison's folder as --out.")
    check_personal(arms, config)
    check_private(arms, config)


def check_personal(arms: Sequence[str], config: Config) -> None:
    """Check that a recipe with personal adapters is compared as `personal`, and only such a one is.

    Raises
    ------
    ConfigError
        If it is not, or its other arms differ in more than the personal adapters.
    """
    if PERSONAL in arms and not config.is_personal:
        raise ConfigError(
            "arm 'personal' needs a recipe with personal adapters, which the other arms then go "
            "without: --set personalisation.name=local-tail."
        )
    if config.is_personal and PERSONAL not in arms:
        raise ConfigError(
            f"the recipe has personal adapters (personalisation.name = "
            f"{config.personalisation.name!r}): their arm is 'personal', and every other arm goes "
            "without. Add it: --arms federated,personal,local."
        )
    if PERSONAL in arms and config.is_private:
        raise ConfigError(
            "arm 'personal' is not compared with a private recipe, whose sites tell no held-out "
            "loss: leave privacy.unit-guarantee or personalisation.name out."
        )


def check_equal_visits(arms: Sequence[str]) -> None:
    """Raise `ConfigError` if visits are to be made equal without the arm whose visits differ."""
    if PERSONAL not in arms:
        raise ConfigError(
            "--equal-visits is for the arm 'personal', whose federation then has fewer rounds; all "
            f"other arms make equally many visits as it is. Asked for: {', '.join(arms)}."
        )


def check_private(arms: Sequence[str], config: Config) -> None:
    """Check that a private recipe is compared as `private`, and only such a one is.

    Raises
    ------
    ConfigError
        If it is not, or a site is to be left out of it.
    """
    if PRIVATE in arms and not config.is_private:
        raise ConfigError(
            "arm 'private' needs a recipe with a guarantee, which the other arms then go without: "
            "--set privacy.unit-guarantee=example --set privacy.target-epsilon=4."
        )
    if not config.is_private:
        return
    if PRIVATE not in arms:
        raise ConfigError(
            "the recipe is private (privacy.unit-guarantee): its arm is 'private', and every other "
            "arm goes without noise. Add it: --arms federated,private."
        )
    if LEAVE_ONE_OUT in arms:
        raise ConfigError(
            "arm 'leave-one-out' is not compared with a private recipe: without a site, the others "
            "are visited more often, and spend more. Leave it out."
        )


def check_leave_one_out(config: Config) -> None:
    """Raise `ConfigError` if no site would be left."""
    if config.data.num_partitions < 2:
        raise ConfigError(
            "arm 'leave-one-out' needs at least 2 sites, but data.num-partitions = "
            f"{config.data.num_partitions}."
        )
