"""The mechanism of a run on data that the run itself names, in process or in simulation.

There privacy is a rehearsal: server and sites share a process, so that nothing is hidden from
whoever started it. Noise and choice of units come from secret coins all the same, and what the run
learns is what a deployment would learn.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.metadata import version

from grandrounds.config.keys import Config
from grandrounds.errors import ConfigError
from grandrounds.site.private.accountant import epsilon_of, noise_for
from grandrounds.site.private.mechanism import Mechanism, sampling_rate_of
from grandrounds.wire import guarantee
from grandrounds.wire.schedule import visits_at_most


@lru_cache(maxsize=8)
def mechanism_of(config: Config) -> Mechanism:
    """Return the mechanism of a private recipe; its noise is calibrated once per process.

    Raises
    ------
    ConfigError
        If the recipe declares no units, no noise reaches its target, or dp-accounting is missing.
    """
    privacy, units = config.privacy, config.privacy.declared_units
    if not units:
        raise ConfigError(
            "privacy.declared-units = 0: a private run on data that the run names needs the number "
            "of units of a site, as it would be declared in public. Set it to about the records "
            "(or patients) of one site."
        )
    rate = sampling_rate_of(config, units)
    steps = config.arguments.max_steps
    visits = visits_at_most(config, config.federation.num_server_rounds)
    unknown_noise = Mechanism(
        noise_multiplier=math.inf,
        clipping_norm=privacy.clipping_norm,
        sampling_rate=rate,
        declared_units=units,
        steps=steps,
        visits=visits,
        delta=privacy.delta,
        tells_loss=privacy.report_train_loss,
    )
    return noise_for(privacy, unknown_noise)


def told_of(mechanism: Mechanism, config: Config) -> dict[str, int | float | str]:
    """Return what a site's introduction says of its guarantee: the mechanism, and no data.

    The site weighs as many examples as it declares units.
    """
    return {
        "train-examples": mechanism.declared_units,
        guarantee.UNIT: guarantee.PATIENT if config.privacy.unit_column else guarantee.RECORD,
        guarantee.NOISE_MULTIPLIER: mechanism.noise_multiplier,
        guarantee.CLIPPING_NORM: mechanism.clipping_norm,
        guarantee.SAMPLING_RATE: mechanism.sampling_rate,
        guarantee.DELTA: mechanism.delta,
        guarantee.RESERVED_EPSILON: epsilon_of(mechanism),
        **({guarantee.LOSS_DEVIATION: mechanism.loss_deviation} if mechanism.tells_loss else {}),
        guarantee.DECLARED_UNITS: mechanism.declared_units,
        guarantee.VISIT_STEPS: mechanism.steps,
        guarantee.MOST_VISITS: mechanism.visits,
        guarantee.ACCOUNTANT: f"dp-accounting {version('dp-accounting')}, PLD",
    }
