"""What a recipe that trains on preferences may not contain, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from grandrounds.config.automatic import EMBEDDED_DATA
from grandrounds.config.keys import Config
from grandrounds.config.refusals import Contradiction, refused

KEY, DPO = "train.objective", '"dpo"'

PACKAGED = "formulary-preferences"
"""The built-in preferences."""

IDLE_WITHOUT = (("dpo_beta", 0.1), ("dpo_length_normalised", False), ("dpo_reference", "base"))
"""Fields that nobody sets without wanting DPO, with their default."""


def preference_contradictions(config: Config) -> Iterator[str]:
    """Yield every setting that does not go with the objective of a recipe."""
    train, named = config.train, config.static.name
    if not config.is_on_pairs:
        for name, unset in IDLE_WITHOUT:
            if (value := getattr(train, name)) != unset:
                shown = str(value).lower() if isinstance(value, bool) else repr(value)
                yield (
                    f"train.{name.replace('_', '-')} = {shown} has no effect without {KEY} = {DPO}."
                )
        if named == PACKAGED:
            yield (
                f'static.dataset.name = "{named}" holds preferences: set {KEY} = {DPO}; the same '
                'facts with one answer each are "formulary".'
            )
        return
    found: tuple[Contradiction, ...] = (
        (
            "static.dataset.name",
            named,
            named in EMBEDDED_DATA and named != PACKAGED,
            "it has one answer to each question, and DPO trains on a chosen and a rejected one",
            f'set "{PACKAGED}"',
        ),
        (
            "privacy.unit-guarantee",
            config.privacy.unit_guarantee,
            config.is_private,
            "clipping by unit has not been tested on the loss of pairs, and an untested guarantee "
            "is none",
            'set "none", or train.objective = "sft"',
        ),
        (
            "secure-aggregation",
            config.federation.secure_aggregation,
            config.is_masked,
            "masked sums have not been tested with it",
            'set "none", or train.objective = "sft"',
        ),
        (
            "personalisation.name",
            config.personalisation.name,
            config.is_personal,
            "personal adapters are trained and chosen by the loss of answers",
            'set "none"',
        ),
        (
            "data.subgroup-columns",
            config.data.subgroup_columns,
            bool(config.data.subgroup_columns),
            "losses by subgroup are of answers",
            "leave it out",
        ),
        (
            "train.replay-examples",
            train.replay_examples,
            train.replay_examples > 0,
            "what is replayed has one answer, and the reference already holds the model to the "
            "base",
            "set 0",
        ),
        (
            "train.devices",
            train.devices,
            train.devices > 1,
            "its processes share the loss of answers only",
            "set 1",
        ),
        (
            "data.prompt-template",
            config.data.prompt_template,
            config.data.prompt_template == "text",
            "both answers of a preference follow a prompt",
            'set "alpaca" or "chat"',
        ),
        (
            "data.rejected-column",
            config.data.rejected_column,
            not config.data.rejected_column
            or config.data.rejected_column
            in (config.data.question_column, config.data.answer_column),
            "it is needed for the rejected answer, in a column of its own",
            "name that column",
        ),
    )
    yield from refused(f"{KEY} = {DPO}", found)
