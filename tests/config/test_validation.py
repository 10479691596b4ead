"""What a configuration may not say, and the words in which it is refused."""

from __future__ import annotations

import pytest

from grandrounds.config.keys import ALIASES, FIELD_OF_KEY, Config
from grandrounds.config.recipes import defaults, resolve
from grandrounds.config.validation import parse
from grandrounds.config.values import Scalar
from grandrounds.errors import ConfigError
from grandrounds.wire.schedule import cohort_of, evaluation_cohort_of

ARGUMENTS = "train.training-arguments."
PRIVATE: dict[str, Scalar] = {"privacy.unit-guarantee": "example", "privacy.target-epsilon": 8.0}


def refused(values: dict[str, Scalar]) -> str:
    """Return the words in which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_packaged_defaults_are_allowed() -> None:
    assert isinstance(parse({}, defaults()), Config)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num-server-round", "num-server-rounds"),
        ("model.lora.peft_lora_r", "model.lora.peft-lora-r"),
        ("strategy.fraction-trian", "strategy.fraction-train"),
        ("train.training-arguments.max-step", "train.training-arguments.max-steps"),
        ("strategy.fraction_fit", "strategy.fraction-fit"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(wrong: str, right: str) -> None:
    message = refused({wrong: 1})
    assert f"Unknown configuration key {wrong!r}." in message
    assert f"Did you mean {right!r}?" in message


def test_an_unknown_key_with_nothing_near_suggests_nothing() -> None:
    assert "Did you mean" not in refused({"zzzzzzzz": 1})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("num-server-rounds", "ten", "an integer"),
        ("num-server-rounds", 10.0, "an integer"),
        ("num-server-rounds", True, "an integer"),
        ("seed", "", "an integer"),
        ("train.learning-rate-max", "5e-5", "a number"),
        ("train.learning-rate-max", False, "a number"),
        ("model.gradient-checkpointing", "true", "one of True, False, 'auto'"),
        ("model.gradient-checkpointing", 1, "one of True, False, 'auto'"),
        ("model.name", 8, "a string"),
        ("model.quantization", "4", "one of 0, 4, 8"),
        ("model.quantization", False, "one of 0, 4, 8"),
        (ARGUMENTS + "gradient-checkpointing", 1, "one of True, False, 'auto', ''"),
        ("strategy.fraction-fit", "all", "a number"),
    ],
)
def test_a_wrong_type_is_named_with_what_is_allowed(key: str, value: Scalar, kind: str) -> None:
    message = refused({key: value})
    assert f"{ALIASES.get(key, key)} = {value!r}" in message
    assert f"must be {kind}." in message


def test_a_whole_number_is_taken_where_a_number_is_asked() -> None:
    config = resolve({"model.lora.peft-lora-alpha": 16, "strategy.fraction-train": 1})
    assert config.lora.peft_lora_alpha == 16.0
    assert type(config.lora.peft_lora_alpha) is float
    assert config.cohort_size == config.data.num_partitions


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("num-server-rounds", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**31, "at most"),
        ("model.quantization", 2, "one of 0, 4, 8"),
        ("model.dtype", "float16", "'float32'"),
        ("model.lora.peft-lora-r", 0, "at least 1"),
        ("model.lora.peft-lora-alpha", 0.0, "more than 0"),
        ("model.lora.dropout", 0.95, "at most 0.9"),
        ("train.learning-rate-max", float("nan"), "more than 0"),
        ("train.learning-rate-max", 0.0, "more than 0"),
        ("train.seq-length", 4, "at least 8"),
        (ARGUMENTS + "per-device-train-batch-size", 0, "at least 1"),
        (ARGUMENTS + "max-steps", -2, "at least -1, or 'auto'"),
        (ARGUMENTS + "max-grad-norm", -1.0, "at least 0"),
        ("strategy.proximal-mu", -0.1, "at least 0"),
        ("strategy.proximal-mu", float("inf"), "at least 0"),
        ("strategy.fraction-train", 1.5, "at most 1"),
        ("strategy.min-reply-fraction", 0.0, "more than 0"),
        ("data.held-out-fraction", 1.0, "at most 0.9"),
        ("data.dirichlet-alpha", 0.0, "more than 0"),
        ("data.prompt-template", "alpacca", "Did you mean 'alpaca'?"),
        ("data.partitioner", "dirichelt", "Did you mean 'dirichlet'?"),
        ("strategy.name", "fedproxy", "Did you mean 'fedprox'?"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(
    key: str, value: Scalar, allowed: str
) -> None:
    message = refused({key: value})
    assert f"{key} = {value!r} is not allowed" in message
    assert allowed in message


def test_a_number_of_four_hundred_digits_is_refused_in_words() -> None:
    refused({"num-server-rounds": 10**400})
    refused({"train.learning-rate-max": 10**400})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"train.learning-rate-max": 1e-6, "train.learning-rate-min": 1e-5},
            ["learning-rate-min = 1e-05 exceeds", "learning-rate-max = 1e-06"],
        ),
        ({"strategy.name": "fedavg", "strategy.proximal-mu": 0.1}, ["does not apply to FedAvg"]),
        ({"strategy.name": "fedprox", "strategy.proximal-mu": 0.0}, ["reduces FedProx to FedAvg"]),
        (
            {"model.gradient-checkpointing": False, ARGUMENTS + "gradient-checkpointing": True},
            ["gradient-checkpointing = True", "contradict"],
        ),
        (
            {"model.gradient-checkpointing": True, ARGUMENTS + "gradient-checkpointing": False},
            ["gradient-checkpointing = False", "contradict"],
        ),
        ({ARGUMENTS + "max-steps": 0}, ["max-steps = 0 would train nothing"]),
        (
            {ARGUMENTS + "warmup-steps": 2, ARGUMENTS + "lr-scheduler-type": "constant"},
            ["warmup-steps = 2 has no effect", "constant_with_warmup"],
        ),
        (
            {
                ARGUMENTS + "warmup-steps": 6,
                ARGUMENTS + "max-steps": 5,
                ARGUMENTS + "lr-scheduler-type": "constant_with_warmup",
            },
            ["warmup-steps = 6 exceeds max-steps = 5"],
        ),
        (
            {"strategy.fraction-evaluate": 0.2, "data.held-out-fraction": 0.0},
            ["needs held-out examples"],
        ),
        ({"data.partitioner": "dirichlet"}, ['"dirichlet" needs data.partition-by']),
        ({"data.partitioner": "natural"}, ['"natural" needs data.partition-by']),
        *(
            ({"model.lora.peft-use-dora": True, "strategy.name": name}, [f"{name!r}: {why}"])
            for name, why in (
                ("ffa", "it freezes a factor"),
                ("rolora", "it freezes a factor"),
                ("product", "it recomputes A and B"),
                ("flora", "it recomputes A and B"),
                ("lora-fair", "it recomputes A and B"),
                ("fedsvd", "it recomputes A and B"),
            )
        ),
        *(
            (
                {"strategy.outer-nesterov": True, "strategy.name": name},
                [f"does not go with strategy.name = {name!r}", "set one of fedavg, fedprox, ffa"],
            )
            for name in ("fedexp", "product", "fedsvd", "fedavgm")
        ),
        (
            {"strategy.name": "la-lora", ARGUMENTS + "max-steps": 1},
            ["max-steps = 1 would train B alone under la-lora"],
        ),
        (
            {"strategy.name": "la-lora", **PRIVATE},
            ["does not go with privacy.unit-guarantee: a private step clips and releases"],
        ),
        (
            {"strategy.name": "lora-fair", **PRIVATE},
            ["does not go with privacy.unit-guarantee: it multiplies the sites' factors"],
        ),
        (
            {"strategy.name": "hetlora", **PRIVATE},
            ["does not go with privacy.unit-guarantee: it weights sites by the norms"],
        ),
        *(
            ({"strategy.name": "hetlora", "strategy.rank-decay": 0.9, **more}, [why])
            for more, why in (
                ({"model.lora.rank-pattern": '{"q_proj": 4}'}, "one rank for all modules"),
                ({"defence.min-cosine": 0.0}, "updates of different ranks"),
                ({"defence.largest-spread": 1.4}, "updates of different ranks"),
                ({"personalisation.name": "local-tail"}, "has the run's rank"),
            )
        ),
        *(
            ({"strategy.name": "hetlora", key: value}, [key, "weighs updates by the norms"])
            for key, value in (("strategy.weighting", "equal"), ("defence.preset", "robust"))
        ),
        ({"strategy.name": "lora-fair", "communication.uplink-codec": "ternary"}, ["lora-fair"]),
        ({"strategy.name": "fedsvd", "communication.uplink-codec": "sign"}, ["fedsvd"]),
        *(
            ({"strategy.name": name, "personalisation.name": "shared-a"}, [name])
            for name in ("lora-fair", "fedsvd")
        ),
        ({"model.name": ""}, ["model.name is empty"]),
        ({"static.dataset.name": ""}, ["static.dataset.name is empty"]),
        ({"model.lora.target-modules": ""}, ["target-modules is empty"]),
        ({"data.answer-column": ""}, ["answer-column is empty"]),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    values: dict[str, Scalar], words: list[str]
) -> None:
    message = refused(values)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "values",
    [
        {"train.learning-rate-max": 1e-5, "train.learning-rate-min": 1e-5},
        {"strategy.name": "fedavg", "strategy.proximal-mu": 0.0},
        {"model.gradient-checkpointing": True, ARGUMENTS + "gradient-checkpointing": True},
        {ARGUMENTS + "max-steps": -1},
        {
            ARGUMENTS + "warmup-steps": 5,
            ARGUMENTS + "max-steps": 5,
            ARGUMENTS + "lr-scheduler-type": "constant_with_warmup",
        },
        {
            ARGUMENTS + "warmup-steps": 5,
            ARGUMENTS + "max-steps": -1,
            ARGUMENTS + "lr-scheduler-type": "constant_with_warmup",
        },
        {"strategy.fraction-train": 0.1, "data.num-partitions": 10},
        {"strategy.fraction-evaluate": 0.0, "data.held-out-fraction": 0.0},
        {"data.partitioner": "natural", "data.partition-by": "ward"},
    ],
)
def test_their_neighbours_are_allowed(values: dict[str, Scalar]) -> None:
    flat = resolve(values).flat()
    for key, value in values.items():
        assert flat[key] == value


@pytest.mark.parametrize(
    ("alias", "value"),
    [
        ("strategy.fraction-fit", 0.5),
        ("train.training-arguments.optim", "paged_adamw_8bit"),
        ("model.lora.use-dora", False),
    ],
)
def test_an_alias_sets_the_key_that_it_stands_for(alias: str, value: Scalar) -> None:
    assert resolve({alias: value}).flat()[ALIASES[alias]] == value


def test_every_alias_is_tested() -> None:
    assert ALIASES.keys() == {
        "strategy.fraction-fit",
        "train.training-arguments.optim",
        "model.lora.use-dora",
    }


def test_an_alias_that_says_the_same_as_its_key_is_allowed() -> None:
    both: dict[str, Scalar] = {"strategy.fraction-fit": 0.5, "strategy.fraction-train": 0.5}
    assert resolve(both).strategy.fraction_train == 0.5


@pytest.mark.parametrize(
    ("alias", "value", "other"),
    [
        ("strategy.fraction-fit", 0.5, 0.4),
        ("train.training-arguments.optim", "paged_adamw_8bit", "adamw_8bit"),
    ],
)
def test_an_alias_that_contradicts_its_key_is_refused(
    alias: str, value: Scalar, other: Scalar
) -> None:
    message = refused({alias: value, ALIASES[alias]: other})
    assert f"{alias} = {value!r} and {ALIASES[alias]} = {other!r} contradict" in message


def test_an_alias_wins_over_a_default_that_is_given_too() -> None:
    """Flower hands over every key, so a default in the values does not mean that it was set."""
    everything = {**defaults(), "strategy.fraction-fit": 0.5}
    assert everything["strategy.fraction-train"] != 0.5
    assert resolve(everything).strategy.fraction_train == 0.5


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (ARGUMENTS + "fp16", True, "bf16 = true"),
        (ARGUMENTS + "output-dir", "/tmp/out", "never writes to a path that it was sent"),
        (ARGUMENTS + "learning-rate", "5e-5", "train.learning-rate-max"),
        (
            ARGUMENTS + "lr-scheduler-type",
            "polynomial",
            "'constant', 'constant_with_warmup', 'linear', 'cosine'",
        ),
        (ARGUMENTS + "optim", "adamw_apex_fused", "one of 'adamw_torch'"),
        ("model.quantization", 2, "one of 0, 4, 8"),
    ],
)
def test_what_flowertune_takes_and_we_cannot_honour_is_an_error_that_says_so(
    key: str, value: Scalar, reason: str
) -> None:
    message = refused({key: value})
    assert "is not allowed" in message
    assert reason in message


def test_every_key_can_be_given_its_default() -> None:
    flat, default = resolve().flat(), defaults()
    for key in FIELD_OF_KEY:
        assert resolve({key: default[key]}).flat() == flat


@pytest.mark.parametrize("ranks", ["4 2", "4;2", "1.5", "-4", "0", "17"])
def test_ranks_that_are_no_list_are_refused(ranks: str) -> None:
    with pytest.raises(ConfigError, match="site-ranks"):
        resolve({"strategy.name": "product", "strategy.site-ranks": ranks})


def test_a_share_that_trims_nobody_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="needs at least 1000000000 updates"):
        resolve({"strategy.name": "fedtrimmedavg", "strategy.trimmed-share": 1e-9})


def test_all_problems_are_told_at_once_in_one_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(
            {
                "lr": 1e-4,
                "num-server-rounds": 0,
                "strategy.name": "fedavg",
                "strategy.proximal-mu": 0.1,
                "strategy.fraction-fit": 0.5,
                "strategy.fraction-train": 0.4,
                "train.learning-rate-max": 2.0,
                "train.learning-rate-min": 0.5,
            }
        )
    head, *lines = str(caught.value).splitlines()
    assert head == "the configuration has 5 problems:"
    starts = [
        "Unknown configuration key 'lr'. Did you mean 'train.learning-rate-max'?",
        "strategy.fraction-fit = 0.5 and strategy.fraction-train = 0.4 contradict",
        "num-server-rounds = 0 is not allowed: it must be at least 1, at most 100000.",
        "train.learning-rate-max = 2.0 is not allowed: it must be more than 0, at most 1.",
        "strategy.proximal-mu = 0.1 does not apply to FedAvg",
    ]
    for number, (line, start) in enumerate(zip(lines, starts, strict=True), 1):
        assert line.startswith(f"  {number}. {start}")


def test_a_small_fraction_selects_one_site() -> None:
    small: dict[str, Scalar] = {"data.num-partitions": 4, "strategy.fraction-train": 1e-3}
    config = resolve({**small, "strategy.fraction-evaluate": 1e-3})
    assert len(cohort_of(config, 1)) == len(evaluation_cohort_of(config)) == 1
