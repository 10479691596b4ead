"""What a masked recipe may not contain, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from grandrounds.config.keys import Config
from grandrounds.config.refusals import Contradiction, refused

KEY = "secure-aggregation"

LEAST_COHORT, MOST_SITES = 3, 256
"""Sites in the smallest sum, and the most sites of a run: as in `grandrounds/wire/masks`."""

EACH = "it needs each site's update, and the server has their sum only"
PRODUCTS = "the product of two factors is not linear in them, so that it cannot be summed masked"

PRODUCT_RULES = ("product", "flora", "lora-fair")

EACH_RULE = (
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "bulyan",
    "geomedian",
    "nnm",
    "hetlora",
)

REFUSED_RULES = dict.fromkeys(PRODUCT_RULES, PRODUCTS) | dict.fromkeys(EACH_RULE, EACH)
"""Rule → why not. The others are functions of the mean, and fedexp of the sum of squares too."""

INSTEAD = (
    "use fedexp (the default), fedprox, ffa, fedsvd, rolora, la-lora, fedavg, fedavgm or fedadam"
)


def masked_contradictions(config: Config) -> Iterator[str]:
    """Yield every setting that a masked sum cannot honour."""
    if not config.is_masked:
        return
    strategy, defence, how = config.strategy, config.defence, config.communication
    found: tuple[Contradiction, ...] = (
        (
            "strategy.name",
            strategy.name,
            strategy.name in REFUSED_RULES,
            REFUSED_RULES.get(strategy.name, ""),
            INSTEAD,
        ),
        *(
            (f"defence.{key}", has, has != off, EACH, f"set {off}")
            for key, has, off in (
                ("update-norm-bound", defence.update_norm_bound, 0),
                ("largest-norm", defence.largest_norm, 0),
                ("min-cosine", defence.min_cosine, -1),
                ("largest-spread", defence.largest_spread, 0),
            )
        ),
        (
            "communication.uplink-codec",
            how.uplink_codec,
            how.uplink_codec != "none",
            "block scales and supports are a site's own, and masked vectors have a codec of theirs",
            'set "none"',
        ),
        (
            "communication.downlink",
            how.downlink,
            how.downlink == "incremental",
            "every site must receive the same message, to which the masks are bound",
            'set "complete"',
        ),
        (
            "communication.entropy-coding",
            how.entropy_coding,
            how.entropy_coding,
            "masked vectors are random to whoever compresses them",
            "set false",
        ),
        (
            "train.training-arguments.max-steps",
            config.arguments.max_steps,
            config.arguments.max_steps == -1,
            "the range of a value must be known before anybody trains, and steps counted in epochs "
            "differ from site to site",
            "set a number of steps",
        ),
        (
            "model.lora.peft-use-dora",
            config.lora.peft_use_dora,
            config.lora.peft_use_dora,
            "the range of its magnitudes is not that of the factors",
            "set false",
        ),
        (
            "data.num-partitions",
            config.data.num_partitions,
            config.data.num_partitions > MOST_SITES,
            "every site holds a share of every other one's secrets",
            f"use at most {MOST_SITES} sites",
        ),
    )
    yield from refused(KEY, found)
    if config.cohort_size < LEAST_COHORT:
        yield (
            f"{KEY} = {config.federation.secure_aggregation!r} with {config.cohort_size} sites a "
            f"round: of a sum of two, each site knows the other's update. Let at least "
            f"{LEAST_COHORT} take part (strategy.fraction-train, --sites-per-round)."
        )
