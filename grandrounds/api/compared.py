"""A comparison that was asked for: checked within a second, then trained arm by arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from grandrounds.api.asked import Asked
from grandrounds.api.results import Comparison
from grandrounds.config import recipes
from grandrounds.config.bases import find_base
from grandrounds.config.keys import Config
from grandrounds.config.values import words_of
from grandrounds.quiet import quiet_libraries
from grandrounds.study.comparison import units
from grandrounds.study.sites import names_of_sites

if TYPE_CHECKING:
    from grandrounds.study.comparison.runner import Listener


@dataclass(frozen=True)
class Wanted:
    """Which arms, seeds and sites are compared, and on what besides their held-out examples."""

    arms: Sequence[str] | None = None
    """Some of `units.ARMS`; None: what suits the recipe."""
    seeds: int = 1
    """Number of consecutive seeds."""
    left_out: str = "all"
    """Sites that `leave-one-out` leaves out: `all`, or numbers or names, separated by commas."""
    benchmarks: Sequence[str] = ()
    benchmark_data: Path | None = None
    """Folder of the benchmarks' files."""
    limit: int | None = None
    """Maximum number of items of each benchmark."""
    equal_visits: bool = False
    """Whether `personal` makes no more example visits than the other arms."""


@dataclass(frozen=True)
class Prepared:
    """A comparison whose arms, seeds, sites, base and data are checked."""

    config: Config
    """Of the federated arm."""
    design: units.Design
    warnings: Sequence[str]
    out: Path | None = None
    """Folder of the comparison, new or to continue; None: a new one below `comparisons`."""

    @cached_property
    def folder(self) -> Path:
        """Folder of the comparison."""
        from grandrounds.study.comparison.runner import default_folder

        return self.out or default_folder(self.config)

    def play(self, listener: Listener) -> Comparison:
        """Train and evaluate what is not finished yet.

        Raises
        ------
        GrandRoundsError
            If an arm cannot be trained or evaluated; finished parts are kept.
        """
        quiet_libraries()
        from grandrounds.model.tokenizers import dated
        from grandrounds.study.comparison import runner
        from grandrounds.study.comparison.folder import day_in

        config = dated(self.config, day_in(self.folder))
        return Comparison(self.folder, runner.compare(config, self.design, self.folder, listener))


def prepared(
    asked: Asked, wanted: Wanted, out: Path | None = None, *, option: str = "--sites"
) -> Prepared:
    """Check a comparison; see `grandrounds.compare`.

    Parameters
    ----------
    option : str
        What the caller calls the sites that are left out, for errors.

    Raises
    ------
    GrandRoundsError
        If an arm, a seed, a site, the base or the data cannot be used.
    """
    config = asked.config
    chosen = units.check_arms(units.default_arms(config) if wanted.arms is None else wanted.arms)
    units.check_recipe(chosen, config)
    if wanted.equal_visits:
        units.check_equal_visits(chosen)
    find_base(config.model.name)  # fails now if it is not fetched
    numbers = units.check_seeds(config.federation.seed, wanted.seeds)
    recipes.resolve(config.flat(), {"seed": numbers[-1]})
    words = words_of(wanted.left_out)
    are_named = any(not word.isdigit() for word in words if word != "all")
    called = names_of_sites(config) if are_named else None
    without = units.check_sites(wanted.left_out, config.data.num_partitions, called, option)
    further = wanted.benchmarks, wanted.benchmark_data, wanted.limit, wanted.equal_visits
    design = units.Design(chosen, numbers, without, *further)
    from grandrounds.study import preflight

    return Prepared(config, design, preflight.check(config), out)
