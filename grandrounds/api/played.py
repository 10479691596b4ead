"""Plays a run that was asked for, in this process or in Flower's simulation."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from grandrounds.config.bases import find_base
from grandrounds.config.keys import Config
from grandrounds.data.own_prompt import check_prompt
from grandrounds.errors import ModelError
from grandrounds.server.listeners import Listener
from grandrounds.server.listeners.trackers import tracked, trackers_of

IN_PROCESS, SIMULATION = "in-process", "simulation"


def checked(config: Config, from_round: int | None = None) -> list[str]:
    """Check within a second what a run on this machine needs; return warnings.

    Raises
    ------
    GrandRoundsError
        If prompt, base, data, run directory or a tracker cannot be used.
    """
    check_here(config)
    from grandrounds.study import preflight

    return preflight.check(config, from_round)


def check_here(config: Config) -> None:
    """Check prompt, base and trackers, which runs of real sites need here too."""
    check_prompt(config.data.prompt_template, config.data.system_prompt)
    find_base(config.model.name)  # fails now if it is not fetched
    trackers_of(config.train.report_to)  # fails now if one is not installed


def with_place(config: Config) -> Config:
    """Return the configuration with its run directory, chosen by time and base if none is set."""
    if config.federation.run_directory or config.federation.resume_from:
        return config
    from grandrounds.server.directory import default_run_directory

    place = str(default_run_directory(config))
    return replace(config, federation=replace(config.federation, run_directory=place))


def place_of(config: Config) -> Path:
    """Return the run directory of a configuration that has one."""
    return Path(config.federation.resume_from or config.federation.run_directory)


def with_day(config: Config, *, at_sites: bool = False) -> Config:
    """Return a new run's configuration with the day that its chat template prints.

    Parameters
    ----------
    at_sites : bool
        Whether the base is at the sites, perhaps only there; they refuse a run that lacks the day.
    """
    if config.data.prompt_template != "chat":
        return config
    from grandrounds.model.tokenizers import dated

    with suppress(*[ModelError] * at_sites):
        return dated(config)
    return config


def play(
    config: Config,
    listener: Listener,
    engine: str = IN_PROCESS,
    client_cpus: int | None = None,
    client_gpus: float | None = None,
) -> None:
    """Play a checked run within its listener's context.

    Raises
    ------
    GrandRoundsError
        If it does not complete; finished rounds are kept.
    """
    if engine == SIMULATION:
        from grandrounds.engines.simulation import default_cpus, default_gpus, simulate

        cpus = client_cpus or default_cpus(config.train.num_threads)
        gpus = default_gpus(config.train.devices) if client_gpus is None else client_gpus
        simulate(config, listener, cpus, gpus)
    else:
        from grandrounds.engines.in_process import run_in_process

        run_in_process(config, tracked(config, listener))
