"""Checks of a run's requests against a site's policy.

`verdicts` says which key of a run's configuration each limit bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from flwr.app import ConfigRecord

from grandrounds.config.digest import recipe_sha256
from grandrounds.config.keys import ALIASES, FIELD_OF_KEY, Config
from grandrounds.config.prompt import KEY, identities, identity_of
from grandrounds.config.values import words_of
from grandrounds.config.words import has_controls
from grandrounds.data.own_prompt import check_prompt
from grandrounds.errors import PolicyError, nearest
from grandrounds.site.custody import agent_key, guarantee
from grandrounds.site.custody.request import TRAINING
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire import messages
from grandrounds.wire.adapter import Ranks
from grandrounds.wire.masks.attempt import KIND_OF
from grandrounds.wire.masks.carried import RECIPE
from grandrounds.wire.personal import PERSONAL
from grandrounds.wire.schedule import examples_of_a_visit, round_learning_rate_of


@dataclass(frozen=True)
class Asked:
    """What a run requests of a site, as far as a policy limits it."""

    base: str
    """`model.name` of the run."""
    quantization: str
    """Bits per weight of the base; 0: not quantised."""
    dtype: str
    """`model.dtype` of the run."""
    prompt_template: str
    """`data.prompt-template` of the run, or the SHA-256 of one of its own."""
    prompt_characters: int
    """Length of what the run adds to the chat template: system prompt and options."""
    strategy: str
    """`strategy.name` of the run."""
    personal_adapter: str
    """`personalisation.name` of the run."""
    target_modules: tuple[str, ...]
    """The adapted modules."""
    rank: int
    """The highest rank of the adapter at the site."""
    scale: float
    """What the product of the factors is multiplied by, at most."""
    least_scale: float
    """The least that it may be multiplied by in any module."""
    rounds: int
    """Rounds of the run."""
    learning_rate: float
    """The highest learning rate of all rounds, and of the training of a personal adapter."""
    least_learning_rate: float
    """The lowest one of all rounds, at the first step of the warm-up."""
    optimizer: str
    """`train.optimizer` of the run."""
    clipping_norm: float
    """L2 norm to which gradients are clipped; infinite: not clipped."""
    weight_decay: float
    """Decoupled weight decay of AdamW."""
    proximal_mu: float
    """FedProx's mu."""
    server_learning_rate: float
    """Step of an adaptive rule at the server; 0 for other rules."""
    sequence_length: int
    """Maximum sequence length in tokens."""
    batch: int
    """Examples per batch."""
    batch_tokens: int
    """Most tokens in a batch."""
    step_examples: int
    """Examples of one optimizer step; the last one of a visit may have fewer."""
    logits_chunk_tokens: float
    """Answer tokens whose logits are held at once; infinite: no limit."""
    steps: int | None = None
    """Optimizer steps of one visit; None if that depends on the number of the site's examples."""
    examples: int | None = None
    """Examples of one visit, counting repeats; None likewise."""
    tail_steps: int = 0
    """Optimizer steps of a personal adapter's own training; 0: the run has none."""
    by_epochs: bool = False
    """Whether these two follow from the number of the site's examples, which is not told."""

    def as_dict(self) -> dict[str, object]:
        """Return the request for the audit log."""
        names = {"learning_rate": "highest-learning-rate"}  # beside the visit's own rate
        described = {
            names.get(name, name.replace("_", "-")): value for name, value in asdict(self).items()
        }
        return {name: None if value == math.inf else value for name, value in described.items()}


def asked_of(config: Config, targets: Sequence[str], num_examples: int | None) -> Asked:
    """Return what a run requests of a site.

    Parameters
    ----------
    num_examples : int or None
        Training examples of the site; None while they are not known.
    """
    lora, arguments, strategy = config.lora, config.arguments, config.strategy
    train, length = config.train, config.train.seq_length
    batch, per_step = arguments.per_device_train_batch_size, config.examples_per_step
    examples = None
    if num_examples is not None or arguments.max_steps > 0:
        examples = examples_of_a_visit(config, num_examples or 0)
    least, greatest = lora.scales
    lowest = round_learning_rate_of(config, config.federation.num_server_rounds)
    tail = config.personalisation if config.is_personal else None
    return Asked(
        base=config.model.name,
        quantization=str(config.model.quantization),
        dtype=config.model.dtype,
        prompt_template=identity_of(config.data.prompt_template),
        prompt_characters=len(config.data.system_prompt) + len(config.data.template_options),
        strategy=strategy.name,
        personal_adapter=config.personalisation.name,
        target_modules=tuple(targets),
        rank=max(Ranks.of(config).resident, lora.highest_rank),
        scale=greatest,
        least_scale=least,
        rounds=config.federation.num_server_rounds,
        learning_rate=max(train.learning_rate_max, tail.learning_rate if tail else 0.0),
        least_learning_rate=lowest / (arguments.warmup_steps + 1),
        optimizer=train.optimizer,
        clipping_norm=arguments.max_grad_norm or math.inf,
        weight_decay=arguments.weight_decay,
        proximal_mu=max(strategy.proximal_mu, tail.proximal_mu if tail else 0.0),
        server_learning_rate=strategy.server_step,
        sequence_length=length,
        batch=batch,
        batch_tokens=batch * length,
        step_examples=per_step if examples is None else min(per_step, examples),
        logits_chunk_tokens=train.logits_chunk_tokens or math.inf,
        steps=None if examples is None else math.ceil(examples / per_step),
        examples=examples,
        tail_steps=tail.steps if tail else 0,
        by_epochs=arguments.max_steps < 1,
    )


CHOSEN_BY_BASE = (("auto",), ("all-linear",))
"""Target modules that only the base's architecture names."""

Measure = Callable[[Asked], float | None]


def most_of(steps: int | None, tail_steps: int) -> float | None:
    """Return the steps of the longest training; None while they are not known."""
    return max(steps or 0, tail_steps) or steps


AT_LEAST: dict[str, Measure] = {
    "min-lora-scale": lambda asked: asked.least_scale,
    "min-learning-rate": lambda asked: asked.least_learning_rate,
    "min-clipping-norm": lambda asked: asked.clipping_norm,
    "min-sequence-length": lambda asked: asked.sequence_length,
    "min-examples-per-step": lambda asked: asked.step_examples,
    "min-examples-per-visit": lambda asked: asked.examples,
    "min-logits-chunk-tokens": lambda asked: asked.logits_chunk_tokens,
}
"""Key of the policy → what it is a lower bound of; None while that is not known."""

AT_MOST: dict[str, Measure] = {
    "max-prompt-characters": lambda asked: asked.prompt_characters,
    "max-rank": lambda asked: asked.rank,
    "max-lora-scale": lambda asked: asked.scale,
    "max-rounds": lambda asked: asked.rounds,
    "max-learning-rate": lambda asked: asked.learning_rate,
    "max-server-learning-rate": lambda asked: asked.server_learning_rate,
    "max-weight-decay": lambda asked: asked.weight_decay,
    "max-proximal-mu": lambda asked: asked.proximal_mu,
    "max-sequence-length": lambda asked: asked.sequence_length,
    "max-batch": lambda asked: asked.batch,
    "max-tokens-per-batch": lambda asked: asked.batch_tokens,
    "max-steps-per-visit": lambda asked: most_of(asked.steps, asked.tail_steps),
    "max-examples-per-visit": lambda asked: asked.examples,
}
"""Key of the policy → what it is an upper bound of."""

BY_EPOCHS = (
    "min-examples-per-step",
    "max-steps-per-visit",
    "min-examples-per-visit",
    "max-examples-per-visit",
)
"""Limits of quantities that may follow from the number of the site's examples."""

ONE_OF: dict[str, Callable[[Asked], tuple[str, ...]]] = {
    "prompt-templates": lambda asked: (asked.prompt_template,),
    "target-modules": lambda asked: asked.target_modules,
    "strategies": lambda asked: (asked.strategy,),
    "personal-adapters": lambda asked: (asked.personal_adapter,),
    "optimizers": lambda asked: (asked.optimizer,),
    "dtypes": lambda asked: (asked.dtype,),
    "quantizations": lambda asked: (asked.quantization,),
}
"""Key of the policy, a comma-separated list → what must be in it."""

ADVICE = {
    "min-learning-rate": "set train.learning-rate-min above 0, and a shorter warm-up",
    "sequence-length-step": "round train.seq-length to a multiple of it",
    "min-clipping-norm": "set train.training-arguments.max-grad-norm higher, or 0",
}
"""Key of the policy → what the run could set instead."""


def check_base(site: SiteFile, name: str, sha256: str) -> None:
    """Raise `PolicyError` if the site's copy of a base differs from the hash in its file."""
    expected = site.bases[name].sha256
    if expected and expected != sha256:
        raise PolicyError(
            f'{_forbids(site)}: bases."{name}".sha256 = {expected}, but the files in '
            f"{site.bases[name].path or 'the package'} have {sha256}. Restore them, or correct "
            f"{site.path.name}."
        )


def check_known(site: SiteFile, name: str) -> None:
    """Raise `PolicyError` if the site has no base of this name."""
    if name not in site.bases:
        raise PolicyError(
            f"{_forbids(site)}: it requests the base {name!r}, but the site's bases are "
            f"{', '.join(map(repr, site.bases))}.{nearest(name, site.bases)}"
        )


def check_recipe(site: SiteFile, config: Config) -> Asked:
    """Return what a run requests, checked as far as that needs neither base nor data.

    Raises
    ------
    PolicyError
        With all reasons, if the site's policy forbids it.
    ConfigError
        If the run's own prompt template is not valid.
    """
    check_known(site, config.model.name)
    lora = config.lora
    if lora.from_adapter and not lora.from_adapter_sha256:
        raise PolicyError(
            f"{_forbids(site)}: it goes on from a saved adapter without its hash. Set "
            "model.lora.from-adapter-sha256; grandrounds run and grandrounds plan print it."
        )
    reasons = [*guarantee.objections(site, config), *agent_key.objections(site, config)]
    if reasons:
        raise PolicyError(f"{_forbids(site)}: {'; '.join(reasons)}.")
    targets = tuple(name.removesuffix("?") for name in words_of(config.lora.target_modules))
    asked = asked_of(config, () if targets in CHOSEN_BY_BASE else targets, None)
    check_run(site, asked, None)
    check_prompt(config.data.prompt_template, config.data.system_prompt)
    return asked


def check_no_masks(config: Config) -> None:
    """Raise `PolicyError` if updates are to be masked, where a site has no agent key."""
    if config.is_masked:
        raise PolicyError(
            f"secure-aggregation = {config.federation.secure_aggregation!r} needs the agent key "
            "and the roster of a site.toml, which this SuperNode has not: start it with agent= or "
            "site= in its --node-config (grandrounds site supernode)."
        )


def check_run(site: SiteFile, asked: Asked, num_examples: int | None) -> None:
    """Check what a run requests, as far as it is known.

    Parameters
    ----------
    num_examples : int or None
        Training examples of the site; None while they are not known.

    Raises
    ------
    PolicyError
        With all reasons, if the site's policy forbids it.
    """
    reasons = list(objections(site, asked))
    if num_examples is not None and num_examples < site.policy.min_examples:
        reasons.append(
            f"min-examples = {site.policy.min_examples}, the site has fewer for training"
        )
    if reasons:
        raise PolicyError(f"{_forbids(site)}: {'; '.join(reasons)}.")


def objections(site: SiteFile, asked: Asked) -> Iterator[str]:
    """Yield the limits of the site's policy that a request exceeds, with both values."""
    for key, values_of in ONE_OF.items():
        words = str(_limit(site, key))
        listed = words_of(words)
        allowed = identities(listed) if key == "prompt-templates" else listed
        if others := [value for value in values_of(asked) if value not in allowed]:
            named = ", ".join(others) if key == "target-modules" else f"{others[0]!r}"
            yield f"{key} = {words!r}, requested {named}"
    for key, measure in {**AT_MOST, **AT_LEAST}.items():
        value, limit = measure(asked), float(_limit(site, key))
        if value is not None and (value > limit if key in AT_MOST else value < limit):
            is_own = asked.by_epochs and key in BY_EPOCHS
            told = ("more" if value > limit else "fewer") if is_own else _text(value)
            yield f"{key} = {_text(limit)}, requested {told}{_advice(key)}"
    step = site.policy.sequence_length_step
    if asked.sequence_length % step:
        key = "sequence-length-step"
        yield f"{key} = {step}, requested {asked.sequence_length}{_advice(key)}"


def _limit(site: SiteFile, key: str) -> str | float:
    """Return the value of a key of the policy."""
    limit: str | float = getattr(site.policy, key.replace("-", "_"))
    return limit


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _advice(key: str) -> str:
    return f" ({ADVICE[key]})" if key in ADVICE else ""


def check_keys(site: SiteFile, keys: Iterable[str]) -> None:
    """Raise `PolicyError` if the configuration of a run has a key that the site does not know."""
    known = {*FIELD_OF_KEY, *ALIASES}
    if strange := sorted(key for key in keys if key not in known):
        named = ", ".join(repr(key[:60]) for key in strange[:10])
        raise PolicyError(
            f"{_forbids(site)}: the site does not know {named}.{nearest(strange[0], known)} "
            "Install the same version of grandrounds everywhere."
        )


MOST_CHARACTERS = 4096
"""Length of a value of a run's configuration. It is kept with the run, and shown to operators."""


def check_texts(site: SiteFile, values: Mapping[str, object]) -> None:
    """Raise `PolicyError` if a text in the configuration of a run is too long or no plain text.

    It would fill the audit log and the state folder, or write to an operator's terminal.
    """
    for key, value in values.items():
        if not isinstance(value, str):
            continue
        if len(value) > MOST_CHARACTERS:
            raise PolicyError(
                f"{_forbids(site)}: {key} has {len(value)} characters, of at most "
                f"{MOST_CHARACTERS}."
            )
        shown = value.replace("\n", "").replace("\t", "") if key == KEY else value
        if has_controls(shown):
            raise PolicyError(f"{_forbids(site)}: {key} contains a control character.")


RATE_TOLERANCE = 1e-6
"""Relative difference between a message's learning rate and the schedule's; both are float64."""


def check_instruction(site: SiteFile, config: Config, kind: str, said: ConfigRecord) -> None:
    """Check that a message instructs what the run's configuration says.

    That a plain update is never asked of a masked run is checked here, before anything is done.

    Parameters
    ----------
    kind : str
        The message's type.
    said
        The instruction: round and learning rate; of a masked sum the recipe's hash too.

    Raises
    ------
    PolicyError
        If the round is not one of the run's, or has another learning rate in its schedule, or the
        run's updates are masked and the message asks for a plain one, or the other way round.
    ReplyError
        If either is missing in a message that trains.
    """
    if kind in ("query", messages.MAGNITUDES):
        return
    of_masks = kind in KIND_OF.values()
    if (kind in TRAINING or of_masks) and of_masks != config.is_masked:
        how = "masked" if config.is_masked else "plain"
        raise PolicyError(
            f"{_forbids(site)}: its updates are {how} (secure-aggregation = "
            f"{config.federation.secure_aggregation!r}), and the server asked for {kind!r}."
        )
    trains = kind in TRAINING or of_masks
    if kind == PERSONAL and not config.is_personal:
        raise PolicyError(
            f"{_forbids(site)}: the server asked for {kind!r}, and the run's configuration has "
            'personalisation.name = "none".'
        )
    number = messages.whole_number(said, "round", int(trains or kind == PERSONAL))
    if number > (rounds := config.federation.num_server_rounds):
        raise PolicyError(f"{_forbids(site)}: round {number} of a run of {rounds} rounds.")
    if kind not in TRAINING:
        return
    if of_masks and said.get(RECIPE) != (own := recipe_sha256(config)):
        raise PolicyError(
            f"{_forbids(site)}: the message is of the recipe {str(said.get(RECIPE))[:64]!r}, and "
            f"the run's configuration here is {own}: all sites of a sum train by one recipe."
        )
    rate = messages.real_number(said, "learning-rate", 0.0, 1.0)
    planned = round_learning_rate_of(config, number)
    if not math.isclose(rate, planned, rel_tol=RATE_TOLERANCE):
        raise PolicyError(
            f"{_forbids(site)}: the learning rate of round {number} is {planned:g} in the run's "
            f"schedule, requested {rate:g}."
        )


def _forbids(site: SiteFile) -> str:
    return f"The policy of site {site.name!r} forbids this run"
