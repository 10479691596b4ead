"""What a recipe with personal adapters may not contain, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from grandrounds.config.keys import Config
from grandrounds.config.strategies import STRATEGIES

KEY = "personalisation.name"


def personal_contradictions(config: Config) -> Iterator[str]:
    """Yield every setting that does not go with the personal adapters of a recipe."""
    if not config.is_personal:
        return
    how, rule = config.personalisation, config.strategy.name
    for key, value, is_met, why, instead in (
        (
            "strategy.name",
            rule,
            STRATEGIES[rule].stacks,
            "its adapter grows with every round, and a site trains a part of it only",
            "use another rule (fedexp, fedavg, fedprox, product)",
        ),
        (
            "model.lora.peft-use-dora",
            config.lora.peft_use_dora,
            config.lora.peft_use_dora and how.name != "local-tail",
            "DoRA divides by the norm of W + BA, so that two adapters have no exact sum",
            'set false, or personalisation.name = "local-tail"',
        ),
        (
            "personalisation.proximal-mu",
            how.proximal_mu,
            how.proximal_mu > 0 and how.name == "interpolate",
            "the site's adapter starts from the run's start, and not from the federated one",
            'set 0, or personalisation.name = "local-tail"',
        ),
        (
            "personalisation.weights",
            how.weights,
            config.weights[-1] == 0,
            "a weight of 0 alone gives every site the federated adapter",
            'add a weight above 0, or set personalisation.name = "none"',
        ),
    ):
        if is_met:
            shown = repr(value) if isinstance(value, str) else str(value).lower()
            yield (
                f"{key} = {shown} does not go with {KEY} = {how.name!r}: {why}. "
                f"{instead[0].upper()}{instead[1:]}."
            )
