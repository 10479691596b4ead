"""The steps of a visit, connecting Flower's records with the training code."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

import grandrounds
from grandrounds.config.keys import Config
from grandrounds.config.recipes import resolve
from grandrounds.config.strategies import STRATEGIES
from grandrounds.data.on_demand import OnDemand
from grandrounds.data.prompts import prompt_hash
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.errors import DataError, PolicyError
from grandrounds.model import headroom, machine
from grandrounds.model.base import (
    base_commit,
    base_fingerprint,
    base_loads,
    bits_of,
    device_and_dtype,
    quantization_config,
)
from grandrounds.model.devices import processes
from grandrounds.model.lora import check_dequantizes
from grandrounds.model.positions import check_examples, check_length
from grandrounds.model.resident import Resident, adapter_change, adapter_of, set_adapter
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.site import preferences, training
from grandrounds.site.devices import group as devices
from grandrounds.site.exam import score_formulary
from grandrounds.site.local_data import Site, site_of
from grandrounds.site.masks.end import SiteEnd
from grandrounds.site.own_part import OwnPart
from grandrounds.site.private.accountant import epsilon_of
from grandrounds.site.private.bases import check_base
from grandrounds.site.private.coins import Coins, secret_coins
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.private.rehearsal import mechanism_of, told_of
from grandrounds.site.private.units import grouped
from grandrounds.site.private.visit import PrivateSettings, train_private_visit
from grandrounds.site.replay import Shown, replayed
from grandrounds.wire import downlink, messages, uplink
from grandrounds.wire import schedule as sampling
from grandrounds.wire.adapter import (
    EVERYTHING,
    A,
    Adapter,
    B,
    Ranks,
    factor_of,
    kept_ranks,
    rank_index,
    trained_part,
)
from grandrounds.wire.guarantee import EPSILON
from grandrounds.wire.names import NAME
from grandrounds.wire.told import BASE_COMMIT, DATA_COMMIT, DATA_TAG

Batches = list[list[TokenizedExample]]

_CURSOR, _PRIVATE = "grandrounds-cursor", "grandrounds-private"

MOST_ROUNDS = 10**9

PROCESS = int.from_bytes(os.urandom(6))
"""Identifies this process among all processes of all machines."""


@dataclass(frozen=True)
class Chosen:
    """The examples of a visit where the site chooses them, not the run."""

    indices: tuple[int, ...]
    """Positions in `Site.train`, in the order in which they are trained on."""
    given: int
    """Examples given to the run before this visit."""
    seen: int
    """Different examples given to the run, this visit included."""


@dataclass(frozen=True)
class Visit:
    """One message to a site, and everything needed to answer it."""

    content: RecordDict
    """What the server sent."""
    state: RecordDict
    """What the site keeps between messages."""
    config: Config
    """The run's configuration, as far as the site allows."""
    site: Site
    """The site's examples."""
    chosen: Chosen | None = None
    """The examples to train on; None: those that the run's seed and cursor give."""
    mechanism: Mechanism | None = None
    """The visit trains by DP-SGD; None: without a guarantee."""
    coins: Coins | None = None
    """Secret coins of such a visit; None: fresh ones."""
    end: SiteEnd | None = None
    """The site's own end of masked sums; None: that of a rehearsal, if the run is masked."""
    weight: int = 0
    """What its update weighs in a masked sum; 0: its training examples."""
    folder: Path | None = None
    """Where a rehearsal keeps personal adapters; None: in `state`."""

    @classmethod
    def here(cls, content: RecordDict, context: Context) -> Visit:
        """Return a visit to this node's site, on the data that the run names.

        Raises
        ------
        DataError
            If the node has no partition id, or one that the run does not have.
        ConfigError
            If the run is private, and its mechanism cannot be calibrated.
        """
        config = parsed(context.run_config)
        number = partition_id(context.node_config, config)
        mechanism = mechanism_of(config) if config.is_private else None
        examples = site_of(config, number)
        settled = machine.settled(config, messages.instruction_of(content))
        return cls(content, context.state, settled, examples, mechanism=mechanism)

    @property
    def instruction(self) -> ConfigRecord:
        """The server's instruction that comes with the tensors."""
        return messages.instruction_of(self.content)

    @property
    def round(self) -> int:
        """The round of the message, from 1; raises `ReplyError` if it is missing."""
        return messages.whole_number(self.instruction, "round", 1, MOST_ROUNDS)

    @property
    def rate(self) -> float:
        """The learning rate after warm-up; raises `ReplyError` if it is missing or above 1."""
        return messages.real_number(self.instruction, "learning-rate", 0.0, 1.0)

    @cached_property
    def cursor(self) -> int:
        """Examples given to the site in this run before this visit.

        The site's own record where it chooses its examples, or the server sends none.
        """
        return self.chosen.given if self.chosen else self.used

    @property
    def used(self) -> int:
        """Examples given to the site in this run, up to its last reply that the server used.

        The server's value, if it sends one: after a resume it belongs to the resumed round. It
        tells which error memory to go on from.
        """
        if "cursor" in self.instruction:
            return messages.whole_number(self.instruction, "cursor")
        return given_to_run(self.state)

    @property
    def cursor_after(self) -> int:
        """Examples given to the site, this visit included."""
        return self.cursor + sampling.examples_of_a_visit(self.config, len(self.site.train))

    @property
    def seen(self) -> int:
        """Different examples given to the site in this run, this visit included."""
        if self.chosen:
            return self.chosen.seen
        config, num_examples = self.config, len(self.site.train)
        per_visit = sampling.examples_of_a_visit(config, num_examples)
        return self.cursor_after if config.train.dynamic_data_seed else per_visit

    @property
    def trained(self) -> tuple[str, slice]:
        """The factors (`A`, `B` or `AB`) and the ranks that this visit trains."""
        ranks, site = Ranks.of(self.config), self.site.partition_id
        return ranks.trained_factors(self.round), ranks.trained(site, self._received)

    @property
    def sent(self) -> tuple[str, slice]:
        """The factors and the ranks whose change travels; the rest of `trained` stays."""
        ranks, site = Ranks.of(self.config), self.site.partition_id
        return ranks.strategy.trained(self.round), ranks.sent(site, self._received)

    @property
    def _received(self) -> int:
        """The rank of the message, where sites may prune theirs; else 0."""
        if not self.config.strategy.prunes:
            return 0
        return messages.whole_number(self.instruction, "rank", 1, self.config.lora.peft_lora_r)

    @property
    def own_part(self) -> OwnPart:
        """What the site trains in its visits and keeps; only if the run `keeps_a_part`."""
        return OwnPart(self.config, self.site.partition_id, self.state, self.folder)

    def write_cursor(self) -> None:
        """Save the cursor for the next visit in the site's state."""
        self.state.config_records[_CURSOR] = ConfigRecord({"examples": self.cursor_after})
        if self.mechanism:
            self.state.config_records[_PRIVATE] = ConfigRecord({"visits": self.number})

    @cached_property
    def number(self) -> int:
        """Which of the run's private visits to the site this is, from 1.

        By the cursor, or the site's own count if that is larger: a visit whose update the server
        did not use has been spent all the same.
        """
        by_cursor = self.cursor_after // sampling.examples_of_a_visit(self.config, 1)
        own = self.state.config_records.get(_PRIVATE)
        return max(by_cursor, 1 + int(own["visits"]) if own else 1)  # type: ignore[arg-type]


def given_to_run(state: RecordDict) -> int:
    """Return how many examples a site has given to a run, by what it keeps of it."""
    record = state.config_records.get(_CURSOR)
    return int(record["examples"]) if record else 0  # type: ignore[arg-type]


def partition_id(node: Mapping[str, Any], config: Config) -> int:
    """Return the site's number from a node's configuration.

    Raises
    ------
    DataError
        If it has none, or one that the run does not have.
    """
    if "partition-id" not in node:
        raise DataError(
            "This node has no partition-id: start it with "
            "--node-config 'partition-id=0 num-partitions=20'."
        )
    number = int(node["partition-id"])
    connected = int(node.get("num-partitions", config.data.num_partitions))
    if connected != config.data.num_partitions or number >= connected:
        raise DataError(
            f"Site {number} of {connected} was asked to join a run with "
            f"data.num-partitions = {config.data.num_partitions}. Start as many nodes "
            f"(--federation-config 'num-supernodes={config.data.num_partitions}'), or set "
            f"data.num-partitions = {connected}."
        )
    return number


def parsed(run_config: Mapping[str, Any]) -> Config:
    """Return the configuration of a run, resolved once per process."""
    return _parsed(tuple(sorted(run_config.items())))


@lru_cache(maxsize=8)
def _parsed(items: tuple[tuple[str, Any], ...]) -> Config:
    return resolve(dict(items))


def introduction(
    site: Site, config: Config, mechanism: Mechanism | None = None
) -> dict[str, int | float | str]:
    """Return a site's introduction at the roll call; loads nothing heavy.

    Under a unit guarantee the site's weight is the number of units that it declares.
    """
    device, dtype = device_and_dtype(config.model.dtype)
    # Fail here, before any training.
    base, adapter = machine.specs(config)
    quantization_config(bits_of(base), dtype)
    check_dequantizes(adapter, bits_of(base), device)
    training.check_optimizer(config.train.optimizer)
    if mechanism:
        check_base(config)
    check_length(config.model.source, config.train.seq_length)
    check_examples(config.model.source, site.tokens())
    name = config.model.source
    commits = {BASE_COMMIT: base_commit(name), DATA_COMMIT: site.data_commit}
    return {
        "partition-id": site.partition_id,
        **({NAME: site.name} if site.name else {}),
        **site.report,
        **(told_of(mechanism, config) if mechanism else {}),
        DATA_TAG: site.tag,
        "version": grandrounds.__version__,
        "base": _fingerprint(name),
        **{key: commit for key, commit in commits.items() if commit},
        "prompt": prompt_hash(config.data.prompt, run_tokenizer(config)),
        "device": _devices(device, processes(config)),
        "precision": machine.precision(config),
        "means": machine.means(config),
        "torch": torch.__version__,
        "python": platform.python_version(),
        messages.THREADS: machine.threads(config),
        messages.CPU_MATMUL: machine.matmul(config),
    }


def _devices(device: torch.device, count: int) -> str:
    """Return what visits train on, in words; GPUs of one machine are taken to be alike."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return name if count == 1 else f"{count} x {name}"


@lru_cache(maxsize=4)
def _fingerprint(name: str) -> str:
    return base_fingerprint(name)


def prepared(config: Config) -> Resident:
    """Return this process's model; the processes of other devices load theirs meanwhile."""
    devices.start(config)
    return machine.prepare_model(config)


def next_batches(visit: Visit) -> Batches:
    """Return the batches of a visit, made of the site's next examples."""
    config, site = visit.config, visit.site
    seed, start = config.federation.seed, visit.cursor
    count = visit.cursor_after - start
    start = start if config.train.dynamic_data_seed else 0
    indices: Sequence[int]
    if visit.chosen:
        indices = visit.chosen.indices
    else:
        indices = sampling.next_examples(seed, site.partition_id, len(site.train), start, count)
    examples = [site.train[i] for i in indices]
    if isinstance(site.train, OnDemand):
        check_examples(config.model.source, (e.input_ids for e in examples))
    size = config.arguments.per_device_train_batch_size
    if machine.forward(config).padding_free or config.train.batching == "padded":
        return [examples[i : i + size] for i in range(0, count, size)]
    generator = sampling.visit_generator(seed, visit.round, site.partition_id)
    groups = sampling.length_grouped_batches([len(e.input_ids) for e in examples], size, generator)
    return [[examples[i] for i in group] for group in groups]


def receive_adapter(
    visit: Visit, resident: Resident, *, trains: bool, alone: bool = False
) -> Adapter:
    """Check the received adapter and copy it into the model; return the resident adapter.

    Parameters
    ----------
    trains : bool
        Whether the site trains; otherwise it only evaluates.
    alone : bool
        Whether what the site keeps of its own is left out.
    """
    config = visit.config
    resident_shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    shapes = Ranks.of(config).configured(resident_shapes)
    magnitudes = resident.magnitudes
    received = downlink.receive(visit.content, visit.state, config, shapes, magnitudes)
    seed, trains_in = config.federation.seed, visit.round if trains else None
    adapter = Ranks.of(config).on_base(received, shapes, seed, trains_in)
    if config.keeps_a_part and not alone:
        number = messages.whole_number(visit.instruction, "round", 0, MOST_ROUNDS)
        has_trained = bool(visit.instruction.get("cursor"))
        adapter = visit.own_part.beside(adapter, shapes, number - trains, has_trained=has_trained)
    set_adapter(resident, adapter)
    return adapter


def train(visit: Visit, resident: Resident, batches: Batches) -> training.VisitResult:
    """Run the local steps of a visit on the resident model."""
    config, (_, ranks) = visit.config, visit.trained
    trained, settings = _trained(visit, resident), _settings(visit)
    parts = None if ranks == EVERYTHING else [rank_index(name, ranks) for name in trained]
    pad = run_tokenizer(config).pad_token_id
    shown = shown_beside(visit, resident, len(batches))
    turns = [
        [factor_of(name) in factors for name in trained]
        for factors in Ranks.of(config).turns(visit.round)
    ]
    tails = _tails(config, list(trained), ranks)
    settings = dataclasses.replace(settings, replayed=shown, turns=turns, tails=tails)

    def trained_on_all() -> training.VisitResult:
        group = devices.begun(config, resident, list(trained), pad)
        preferring = None
        if config.is_on_pairs:
            preferring = preferences.against_reference(config, resident, batches)
        return training.train_visit(
            resident.model,
            list(trained.values()),
            batches,
            dataclasses.replace(settings, group=group, preferring=preferring),
            pad,
            parts,
        )

    return headroom.run_visit(config, resident, trained_on_all)


def _tails(config: Config, names: list[str], ranks: slice) -> list[training.Tail]:
    """Return the ranks that a site would prune next, where it may."""
    if not config.strategy.prunes:
        return []
    rank = config.lora.peft_lora_r if ranks == EVERYTHING else ranks.stop
    first = kept_ranks(rank, config.strategy.rank_decay)
    return [
        (names.index(name), names.index(name.removesuffix(A) + B), first, rank)
        for name in names
        if name.endswith(A)
    ]


def shown_beside(visit: Visit, resident: Resident, batches: int) -> list[Shown]:
    """Return what is replayed beside each batch; nothing at a site with a policy of its own."""
    if visit.chosen is not None:  # such a site trains on its own examples alone
        return []
    return replayed(visit.config, resident, visit.round, visit.site.partition_id, batches)


def _trained(visit: Visit, resident: Resident) -> dict[str, torch.nn.Parameter]:
    """Return the factors that a visit trains, and let only them have a gradient."""
    factors, _ = visit.trained
    for name, parameter in resident.parameters.items():
        parameter.requires_grad_(factor_of(name) in factors)
    return {n: p for n, p in resident.parameters.items() if p.requires_grad}


def _settings(visit: Visit) -> training.VisitSettings:
    config, arguments = visit.config, visit.config.arguments
    return training.VisitSettings(
        accumulation_steps=arguments.gradient_accumulation_steps,
        schedule=sampling.VisitSchedule(
            visit.rate, arguments.warmup_steps, arguments.lr_scheduler_type
        ),
        optimizer=config.train.optimizer,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        proximal_mu=config.strategy.proximal_mu,
        rank_penalty=config.strategy.rank_penalty,
        forward=machine.forward(config),
        seed=sampling.visit_seed(config.federation.seed, visit.round, visit.site.partition_id),
        shares=config.train.devices,
    )


def train_privately(visit: Visit, mechanism: Mechanism, resident: Resident) -> float | None:
    """Run the local steps of a private visit on the resident model, with secret coins.

    Returns
    -------
    The noised training loss in nats per answer token, if the site tells one.

    Raises
    ------
    PolicyError
        If the site has already had all visits that the noise is calibrated for.
    ModelError
        If the base is one that a private visit does not cover.
    """
    if visit.number > mechanism.visits:
        raise PolicyError(
            f"Visit {visit.number} of a run whose noise is calibrated for {mechanism.visits} "
            "to a site: one more would spend more than the target ε."
        )
    config, arguments = visit.config, visit.config.arguments
    check_base(config)  # again: no server is bound to call the roll first
    trained = _trained(visit, resident)
    settings = PrivateSettings(mechanism, arguments.per_device_train_batch_size, _settings(visit))
    units = grouped(visit.site.units, visit.site.train)
    pad, coins = run_tokenizer(config).pad_token_id, visit.coins or secret_coins()
    return headroom.run_visit(
        config,
        resident,
        lambda: train_private_visit(
            resident.model, list(trained.values()), units, settings, pad, coins
        ),
    )


def change_of(visit: Visit, resident: Resident, received: Adapter) -> Adapter:
    """Return the trained part of a visit's change that travels; what stays is kept here."""
    if visit.config.keeps_a_part:
        own = visit.own_part
        own.write(visit.round, own.of(adapter_of(resident)))
    return trained_part(adapter_change(resident, received), *visit.sent)


def encoded(visit: Visit, change: Adapter) -> ArrayRecord:
    """Encode a change; what the codec lost stays in the site's state."""
    config, memory = visit.config, None
    if STRATEGIES[config.strategy.name].error_feedback:
        memory = uplink.ErrorMemory(visit.state, visit.used, visit.cursor_after)
    seed, site = config.federation.seed, visit.site.partition_id
    generator = sampling.uplink_generator(seed, visit.round, site)
    return uplink.encode_change(change, config.communication, memory, generator)


def private_metrics(
    visit: Visit, mechanism: Mechanism, noised_loss: float | None
) -> dict[str, float | int]:
    """Return the metrics of a private visit: but for a noised loss, none depends on the data."""
    return {
        "num-examples": mechanism.declared_units,
        **({} if noised_loss is None else {"train-loss": noised_loss}),
        "steps": mechanism.steps,
        EPSILON: epsilon_of(mechanism, visit.number),
        "cursor": visit.cursor_after,
        **process_facts(),
    }


def train_metrics(
    visit: Visit, result: training.VisitResult, change: Adapter
) -> dict[str, float | int]:
    """Return the metrics of a visit."""
    num_examples = len(visit.site.train)
    return {
        "num-examples": num_examples,
        "train-loss": result.train_loss,
        "proximal-penalty": result.proximal_penalty,
        "steps": result.steps,
        "examples": result.examples,
        "tokens": result.tokens,
        "padding-tokens": result.padding_tokens,
        "seconds": result.seconds,
        messages.UPDATE_NORM: math.sqrt(sum(float(np.vdot(t, t)) for t in change.values())),
        "cursor": visit.cursor_after,
        "coverage": min(1.0, visit.seen / num_examples),
        **process_facts(),
    }


def without_figures(metrics: Mapping[str, float | int]) -> dict[str, float | int]:
    """Return the metrics of a masked visit: no figure of the site's data, unless it is noised.

    The weight travels in the mask.
    """
    noised = ("train-loss",) if EPSILON in metrics else ()
    kept = ("cursor", "base-loads", "process-id", EPSILON, *noised)
    return {name: metrics[name] for name in kept if name in metrics}


def process_facts() -> dict[str, int]:
    """Return this process's id, and how often it has loaded a base."""
    return {"base-loads": base_loads(), "process-id": PROCESS}


def evaluate(resident: Resident, site: Site, config: Config) -> dict[str, float | int]:
    """Return the summed loss in nats of the site's held-out examples, and their answer tokens.

    Of preferences, the summed loss of their pairs, as many `tokens`, and what their margins are.
    """
    nll_sum, tokens = 0.0, 0
    found: dict[str, float | int] = {}
    if config.is_on_pairs:
        found = preferences.judged(resident, site.held_out, config)
        nll_sum, tokens = float(found["nll-sum"]), int(found["tokens"])
    elif site.held_out:
        pad = run_tokenizer(config).pad_token_id
        nll_sum, tokens = training.held_out_loss(
            resident.model,
            site.held_out,
            config.arguments.per_device_train_batch_size,
            pad,
            machine.forward(config),
            devices.begun(config, resident, [], pad),
        )
    if not math.isfinite(nll_sum):
        raise DataError(f"Site {site.partition_id}: the held-out loss is {nll_sum}.")
    return {
        "nll-sum": nll_sum,
        "tokens": tokens,
        **found,
        "num-examples": len(site.held_out),
        **process_facts(),
    }


def examine(resident: Resident, config: Config) -> dict[str, int]:
    """Return the results of the formulary's exam, with and without the adapter."""
    tokenizer = run_tokenizer(config)
    template = config.data.prompt
    tuned = score_formulary(resident.model, tokenizer, template)
    with resident.model.disable_adapter():
        base = score_formulary(resident.model, tokenizer, template)
    counts = {
        f"{kind}-{which}-{count}": number
        for which, scores in (("base", base), ("tuned", tuned))
        for kind, score in scores.items()
        for count, number in score.items()
    }
    return {**counts, **process_facts()}
