"""What a recipe with personal adapters may not contain, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from grandrounds.config.keys import Config
from grandrounds.config.refusals import Contradiction, refused
from grandrounds.config.strategies import STRATEGIES

KEY = "personalisation.name"


def personal_contradictions(config: Config) -> Iterator[str]:
    """Yield every setting that does not go with the personal adapters of a recipe."""
    if not config.is_personal:
        return
    how, rule = config.personalisation, config.strategy.name
    found: tuple[Contradiction, ...] = (
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
        *_of_parts(config),
    )
    yield from refused(f"{KEY} = {how.name!r}", found)


def _of_parts(config: Config) -> Iterator[Contradiction]:
    """Yield what does not go with a part of the adapter that is trained in visits and stays."""
    if not config.keeps_a_part:
        return
    rule, name = config.strategy.name, config.personalisation.name
    after = 'personalisation.name = "local-tail" or "interpolate", whose training comes afterwards'
    yield (
        "privacy.unit-guarantee",
        config.privacy.unit_guarantee,
        config.is_private,
        "what stays at a site is trained without a guarantee, and what travels follows from it",
        f"set {after}",
    )
    yield (
        "secure-aggregation",
        config.federation.secure_aggregation,
        config.is_masked,
        "masked sums are of whole adapters",
        f"set {after}",
    )
    yield (
        "strategy.name",
        rule,
        not STRATEGIES[rule].averages_tensors and not STRATEGIES[rule].stacks,
        "it decides itself which factors travel, or recomputes both from their products",
        "set fedavg, fedprox, fedexp or another rule that averages each tensor by itself",
    )
    yield (
        "model.lora.from-adapter",
        config.lora.from_adapter or config.lora.from_adapter_sha256,
        config.lora.is_continued,
        "the parts that stay start anew at each site, beside no adapter that all sites have",
        'leave it out, or set personalisation.name = "local-tail"',
    )
    yield (
        "model.lora.rank-pattern",
        config.lora.rank_pattern,
        name == "dual" and bool(config.lora.rank_pattern),
        "the private adapter lies beside the shared one at one rank for all modules",
        'leave it out, or set personalisation.name = "shared-a"',
    )
