"""The roster of a run's masked sums, at its server: that of the consortium when the run began.

The server verifies no signature of it: each site holds the roster that its operator has accepted,
and of another one no key and no signature is valid here.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from grandrounds import storage
from grandrounds.config.keys import Config
from grandrounds.errors import ConfigError
from grandrounds.wire.masks.rehearsal import roster_of_run
from grandrounds.wire.masks.roster import FILE, Roster, roster_of


def check_roster(config: Config) -> None:
    """Raise `ConfigError` if a masked run has a consortium without a roster of all its sites."""
    if not config.is_masked or not config.federation.consortium:
        return
    file = Path(config.federation.consortium) / FILE
    if not file.is_file():
        raise ConfigError(
            f"secure-aggregation = {config.federation.secure_aggregation!r} needs a roster of the "
            f"sites' agent keys, and there is no {file}: sign one with grandrounds consortium "
            "roster, and let every site accept it (grandrounds site accept-roster)."
        )
    known = _read(file).members
    if missing := [str(site) for site in range(config.data.num_partitions) if site not in known]:
        raise ConfigError(
            f"{file} lacks site {', '.join(missing)} of the run's {config.data.num_partitions}: "
            "sign another one with grandrounds consortium roster, and let every site accept it "
            "(grandrounds site accept-roster)."
        )


def keep_roster(config: Config, run: Path) -> None:
    """Copy the consortium's roster into a run directory, unless the run has one.

    A run keeps to its first roster, as its sites do.
    """
    if config.is_masked and config.federation.consortium and not (run / FILE).exists():
        content = storage.read_bytes(Path(config.federation.consortium) / FILE)
        storage.write_bytes(run / FILE, content)


def roster_for(config: Config, run: Path) -> Roster:
    """Return the roster of a run; without a consortium that of a rehearsal.

    Parameters
    ----------
    run : Path
        The run directory.
    """
    if not config.federation.consortium:
        return roster_of_run(config.federation.seed, config.data.num_partitions)
    return _read(run / FILE)


@lru_cache(maxsize=2)
def _read(file: Path) -> Roster:
    return roster_of(storage.read_json(file).get("content"), str(file))
