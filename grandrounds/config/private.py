"""What a recipe with a unit guarantee may not contain, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grandrounds.config.keys import Config, PrivacyConfig
from grandrounds.config.values import words_of

LEAST_NOISE = 0.3
"""Noise multiplier below which nothing is called private: ε would exceed 40 within a few steps."""

INFLATED = "its step grows with the length of the updates, which is mostly noise"
QUADRATIC = "it multiplies the sites' factors, and so their noise with itself"
CHOOSES = (
    "it chooses among updates by the distances between them, which are those of their noise, and "
    "leaves out the averaging that takes noise away"
)
IN_TURN = "a private step clips and releases the gradients of A and B together, not in turn"
BY_NORM = "it weights sites by the norms of their models, which are mostly noise"
ADAPTIVE = "its step divides by a running root of squares, to which noise adds and signal does not"

REFUSED_RULES = {
    "fedexp": INFLATED,
    "fedadam": ADAPTIVE,
    "fedyogi": ADAPTIVE,
    "fedadagrad": ADAPTIVE,
    "krum": CHOOSES,
    "multikrum": CHOOSES,
    "bulyan": CHOOSES,
    "product": QUADRATIC,
    "flora": QUADRATIC,
    "lora-fair": QUADRATIC,
    "la-lora": IN_TURN,
    "hetlora": BY_NORM,
}
"""Rule → why not. `fedavg`, `fedprox`, `fedavgm`, `ffa`, `fedsvd` and `rolora` are linear in the
updates, so that noise averages out, also under `outer-nesterov`; `fedmedian` and `fedtrimmedavg`
average most of each coordinate. ffa is the default: B alone has half of the values, and so less
noise."""

INSTEAD = (
    "use ffa (the default of private runs), fedsvd, rolora, fedavg, fedprox, fedavgm, fedmedian or "
    "fedtrimmedavg"
)

IDLE_WITHOUT = (
    ("target_epsilon", 0),
    ("noise_multiplier", 0),
    ("sampling_rate", 0),
    ("declared_units", 0),
    ("unit_column", ""),
    ("report_train_loss", False),
)
"""Fields that nobody sets without wanting privacy, with their value when unset."""


@dataclass(frozen=True)
class Refusal:
    """A setting that a private visit cannot honour."""

    key: str
    value: object
    is_met: bool
    """Whether the recipe has it."""
    why: str
    instead: str

    def __str__(self) -> str:
        shown = repr(self.value) if isinstance(self.value, str) else str(self.value).lower()
        return (
            f"{self.key} = {shown} does not go with privacy.unit-guarantee: {self.why}. "
            f"{self.instead[0].upper()}{self.instead[1:]}."
        )


def refusals(config: Config) -> Iterator[Refusal]:
    """Yield every setting that a private visit cannot honour, met or not."""
    train, arguments, strategy = config.train, config.arguments, config.strategy
    privacy, a = config.privacy, "train.training-arguments."
    yield Refusal(
        "strategy.name",
        strategy.name,
        strategy.name in REFUSED_RULES,
        REFUSED_RULES.get(strategy.name, ""),
        INSTEAD,
    )
    yield Refusal(
        "defence.min-cosine",
        config.defence.min_cosine,
        config.defence.min_cosine > -1,
        "the updates of honest sites point in the directions of their noise",
        "set -1",
    )
    yield Refusal(
        "defence.largest-spread",
        config.defence.largest_spread,
        config.defence.largest_spread > 0,
        "the updates of honest sites are spread by their noise",
        "set 0",
    )
    yield Refusal(
        f"{a}max-steps",
        arguments.max_steps,
        arguments.max_steps == -1,
        "steps counted in epochs would tell the number of records, and ε follows from the steps",
        "set a number of steps",
    )
    yield Refusal(
        f"{a}max-grad-norm",
        arguments.max_grad_norm,
        arguments.max_grad_norm > 0,
        "privacy.clipping-norm clips the gradient of each unit instead",
        "set 0",
    )
    yield Refusal(
        f"{a}torch-compile",
        arguments.torch_compile,
        arguments.torch_compile,
        "compiled layers would hold the factors' gradients of a whole batch",
        "set false",
    )
    yield Refusal(
        f"{a}gradient-accumulation-steps",
        arguments.gradient_accumulation_steps,
        arguments.gradient_accumulation_steps > 1 and privacy.sampling_rate > 0,
        "privacy.sampling-rate already gives the expected batch of a step",
        "set 1, or privacy.sampling-rate = 0",
    )
    yield Refusal(
        "model.quantization",
        config.model.quantization,
        config.model.quantization == 8 and arguments.per_device_train_batch_size > 1,
        "LLM.int8 takes the columns that are outliers in any record of a batch out of all of them",
        f"set 4, or {a}per-device-train-batch-size = 1 with {a}gradient-accumulation-steps = "
        f"{config.examples_per_step}",
    )
    yield Refusal(
        "train.batching",
        train.batching,
        train.batching == "length-grouped",
        "each step draws its records at random, and they are not reordered",
        'set "auto", "padding-free" or "padded"',
    )
    yield Refusal(
        "train.devices",
        train.devices,
        train.devices > 1,
        "a visit's gradients of single units stay in the process that clips them and adds noise",
        "set 1",
    )
    yield Refusal(
        "train.dynamic-data-seed",
        train.dynamic_data_seed,
        not train.dynamic_data_seed,
        "each step draws its records anew, and amplification by sampling counts on it",
        "set true",
    )
    yield Refusal(
        "train.replay-examples",
        train.replay_examples,
        train.replay_examples > 0,
        "the step is divided by the expected batch of the site's own records",
        "set 0",
    )
    yield Refusal(
        "model.lora.dropout",
        config.lora.dropout,
        config.lora.dropout > 0,
        "the masks of a batch are drawn in a row by the run's seed, so that one record changes "
        "those of the others",
        "set 0",
    )
    yield Refusal(
        "model.lora.peft-use-dora",
        config.lora.peft_use_dora,
        config.lora.peft_use_dora,
        "the gradient of each unit is known for A and B, not for DoRA's magnitudes",
        "set false",
    )
    yield Refusal(
        "communication.entropy-coding",
        config.communication.entropy_coding,
        config.communication.entropy_coding,
        "the size of a message would depend on what it says",
        "set false",
    )


def privacy_contradictions(config: Config) -> Iterator[str]:
    """Yield what is wrong with the keys of `privacy.`, by themselves and beside the others."""
    privacy, declared = config.privacy, config.privacy.declared_units
    if not config.is_private:
        for name, unset in IDLE_WITHOUT:
            if (value := getattr(privacy, name)) != unset:
                key = PrivacyConfig.prefix + name.replace("_", "-")
                yield (
                    f"{key} = {value!r} has no effect, and guarantees nothing, without "
                    'privacy.unit-guarantee = "example".'
                )
        return
    if not privacy.target_epsilon and not privacy.noise_multiplier:
        yield (
            "privacy.target-epsilon and privacy.noise-multiplier are both 0: set one of them; a "
            "target of 8 is common, 1 is strong."
        )
    if privacy.target_epsilon and privacy.noise_multiplier:
        yield (
            f"privacy.target-epsilon = {privacy.target_epsilon:g} and privacy.noise-multiplier = "
            f"{privacy.noise_multiplier:g} contradict each other: each follows from the other. Set "
            "one of them to 0."
        )
    if 0 < privacy.noise_multiplier < LEAST_NOISE:
        yield (
            f"privacy.noise-multiplier = {privacy.noise_multiplier:g} is not called private: use "
            f"at least {LEAST_NOISE:g}."
        )
    if declared and privacy.delta >= 1 / (10 * declared):
        yield (
            f"privacy.delta = {privacy.delta:g} with privacy.declared-units = {declared}: "
            "publishing a few records whole would satisfy it. It must be below 1 / (10 x declared "
            f"units) = {1 / (10 * declared):.2g}."
        )
    if declared and not privacy.sampling_rate and config.examples_per_step > declared:
        yield (
            f"privacy.declared-units = {declared} is below the expected batch of "
            f"{config.examples_per_step} units, per-device-train-batch-size x "
            "gradient-accumulation-steps: lower these, or set privacy.sampling-rate."
        )
    texts = words_of(f"{config.data.question_column},{config.data.answer_column}")
    if privacy.unit_column in texts:
        yield (
            f"privacy.unit-column = {privacy.unit_column!r} is the text that is trained on: name "
            "the column of the patient, or leave it empty for records as units."
        )
    yield from (str(refusal) for refusal in refusals(config) if refusal.is_met)
