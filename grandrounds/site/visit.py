"""The steps of a visit, between Flower's records and the training code."""

from __future__ import annotations

import math
import os
import platform
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

import grandrounds
from grandrounds.config.keys import Config
from grandrounds.config.recipes import resolve
from grandrounds.config.strategies import STRATEGIES
from grandrounds.data.prompts import prompt_hash
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.errors import DataError
from grandrounds.model import headroom as fitting
from grandrounds.model import machine
from grandrounds.model.base import (
    base_fingerprint,
    base_loads,
    device_and_dtype,
    quantization_config,
)
from grandrounds.model.resident import Resident, adapter_change, set_adapter
from grandrounds.site import training
from grandrounds.site.custody import answer as custody
from grandrounds.site.local_data import Site, open_site, tokenizer_of
from grandrounds.wire import downlink, messages, protocol, slots, uplink
from grandrounds.wire import schedule as sampling
from grandrounds.wire.adapter import Adapter, factor_of
from grandrounds.wire.drawing import drawn_adapter
from grandrounds.wire.schedule import examples_per_visit

Batches = list[list[TokenizedExample]]

_CURSOR = "grandrounds-cursor"

MOST_ROUNDS = 10**9

PROCESS = int.from_bytes(os.urandom(6))
"""Tells this process from all others, those of other machines too."""


def site_of(context: Context) -> tuple[Site, Config]:
    """Return the site that this node is, and the run's configuration, checked.

    Raises
    ------
    DataError
        If the node was given no partition, or one that the run does not have.
    """
    config = _parsed(tuple(sorted(context.run_config.items())))
    node = context.node_config
    if "partition-id" not in node:
        raise DataError(
            "This node has no partition-id: start it with "
            "--node-config 'partition-id=0 num-partitions=20'."
        )
    partition_id = int(node["partition-id"])
    connected = int(node.get("num-partitions", config.data.num_partitions))
    if connected != config.data.num_partitions or partition_id >= connected:
        raise DataError(
            f"Site {partition_id} of {connected} was asked to join a run with "
            f"data.num-partitions = {config.data.num_partitions}. Start as many nodes "
            f"(--federation-config 'num-supernodes={config.data.num_partitions}'), or set "
            f"data.num-partitions = {connected}."
        )
    if custody.SITE in node:
        return custody.site_of_node(node, config), config
    site = open_site(
        config.static.name,
        config.data,
        config.model.name,
        config.train.seq_length,
        config.federation.seed,
        partition_id,
    )
    return site, config


@lru_cache(maxsize=8)
def _parsed(items: tuple[tuple[str, Any], ...]) -> Config:
    return resolve(dict(items))


def introduction(site: Site, config: Config) -> dict[str, int | str]:
    """Return what a site says at roll call; nothing heavy is loaded for it."""
    device, dtype = device_and_dtype(config.model.dtype)
    # These fail here, before anybody trains.
    quantization_config(config.model.quantization, dtype)
    training.check_optimizer(config.train.optimizer)
    name = config.model.name
    template = config.data.prompt_template
    return {
        "partition-id": site.partition_id,
        **site.report,
        "version": grandrounds.__version__,
        "base": _fingerprint(name),
        "prompt": prompt_hash(template, tokenizer_of(name)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "precision": machine.precision(config),
        "means": machine.means(config),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": machine.threads(config),
    }


@lru_cache(maxsize=4)
def _fingerprint(name: str) -> str:
    return base_fingerprint(name)


def read_cursor(state: RecordDict, instruction: ConfigRecord) -> int:
    """Return how many examples this site has been given.

    The site's own record, unless the server says otherwise: after a resume it sends the cursor that
    belongs to the round from which the run goes on.
    """
    if "cursor" in instruction:
        return messages.whole_number(instruction, "cursor")
    if _CURSOR in state.config_records:
        return int(state.config_records[_CURSOR]["examples"])  # type: ignore[arg-type]
    return 0


def write_cursor(state: RecordDict, cursor: int) -> None:
    """Keep the cursor for the next visit; it never leaves the site's record."""
    state.config_records[_CURSOR] = ConfigRecord({"examples": cursor})


def receive_adapter(
    resident: Resident,
    message: Message,
    config: Config,
    context: Context,
    trains_in_round: int | None = None,
) -> Adapter:
    """Check the adapter that came, copy it into the model, and return it as it lies there.

    Parameters
    ----------
    trains_in_round : int or None
        The round, if the site is to train; None if it judges what came.
    """
    rule, rank, seed = config.strategy.name, config.lora.peft_lora_r, config.federation.seed
    resident_shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    shapes = protocol.at_rank(resident_shapes, rank)
    parts = [(downlink.receive(message, config, context, shapes), 0)]
    if rule == "flora" and trains_in_round is not None:
        parts.append((drawn_adapter(shapes, seed, trains_in_round), config.max_rank))
    elif len(parts[0][0]) < len(shapes):
        parts.insert(0, (drawn_adapter(shapes, seed), 0))
    adapter = slots.place(resident_shapes, *parts)
    set_adapter(resident, adapter)
    return adapter


def next_batches(
    site: Site, config: Config, instruction: ConfigRecord, cursor: int
) -> tuple[Batches, int]:
    """Return the batches of this visit and the cursor after it."""
    arguments = config.arguments
    count = examples_per_visit(
        arguments.max_steps,
        arguments.num_train_epochs,
        config.examples_per_step,
        len(site.train),
    )
    seed = config.federation.seed
    start = cursor if config.train.dynamic_data_seed else 0
    indices = sampling.next_examples(seed, site.partition_id, len(site.train), start, count)
    examples = [site.train[i] for i in indices]
    size = arguments.per_device_train_batch_size
    if machine.forward(config).padding_free or config.train.batching == "padded":
        return [examples[i : i + size] for i in range(0, count, size)], cursor + count
    generator = sampling.visit_generator(seed, round_of(instruction), site.partition_id)
    groups = sampling.length_grouped_batches([len(e.input_ids) for e in examples], size, generator)
    return [[examples[i] for i in group] for group in groups], cursor + count


def round_of(instruction: ConfigRecord) -> int:
    """Return the round that a message belongs to; raise `ReplyError` if it tells none."""
    return messages.whole_number(instruction, "round", 1, MOST_ROUNDS)


def train(
    resident: Resident, batches: Batches, config: Config, instruction: ConfigRecord, site: Site
) -> training.VisitResult:
    """Run the local steps of this visit on the resident model."""
    arguments = config.arguments
    factors, ranks = trained_part(config, site.partition_id, round_of(instruction))
    for name, parameter in resident.parameters.items():
        parameter.requires_grad_(factor_of(name) in factors)
    trained = {n: p for n, p in resident.parameters.items() if p.requires_grad}
    settings = training.VisitSettings(
        accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=messages.real_number(instruction, "learning-rate", 0.0, 1.0),
        warmup_steps=arguments.warmup_steps,
        optimizer=config.train.optimizer,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        proximal_mu=config.strategy.proximal_mu,
        forward=machine.forward(config),
        seed=sampling.visit_seed(config.federation.seed, round_of(instruction), site.partition_id),
    )
    parts = None if ranks == slots.EVERYTHING else [slots.of_ranks(n, ranks) for n in trained]
    pad = tokenizer_of(config.model.name).pad_token_id
    return fitting.run_visit(
        config,
        resident,
        lambda: training.train_visit(
            resident.model, list(trained.values()), batches, settings, pad, parts
        ),
    )


def trained_part(config: Config, partition_id: int, round_number: int) -> tuple[str, slice]:
    """Return the factors and the ranks that a visit trains."""
    rule, rank = config.strategy.name, config.lora.peft_lora_r
    site_rank = protocol.site_rank(config.site_ranks, partition_id, rank)
    ranks = slots.trained_ranks(rule, rank, config.max_rank, site_rank)
    return STRATEGIES[rule].trained(round_number), ranks


def change_of(
    resident: Resident, received: Adapter, config: Config, instruction: ConfigRecord, site: Site
) -> Adapter:
    """Return what the visit changed, as far as it was trained."""
    factors, ranks = trained_part(config, site.partition_id, round_of(instruction))
    return slots.take(adapter_change(resident, received), factors, ranks)


def encoded(
    change: Adapter,
    config: Config,
    context: Context,
    instruction: ConfigRecord,
    site: Site,
    cursors: tuple[int, int],
) -> ArrayRecord:
    """Return a change as it travels.

    Parameters
    ----------
    cursors : (int, int)
        Examples given to the site before and after the visit.
    """
    number = round_of(instruction)
    return uplink.encode_change(change, config, context, number, site.partition_id, *cursors)


def train_metrics(
    site: Site, result: training.VisitResult, cursor: int, config: Config, change: Adapter
) -> dict[str, float | int]:
    """Return what a site reports of a visit."""
    seen = cursor if config.train.dynamic_data_seed else result.examples
    return {
        "num-examples": len(site.train),
        "train-loss": result.train_loss,
        "proximal-penalty": result.proximal_penalty,
        "steps": result.steps,
        "examples": result.examples,
        "tokens": result.tokens,
        "padding-tokens": result.padding_tokens,
        "seconds": result.seconds,
        messages.UPDATE_NORM: math.sqrt(sum(float(np.vdot(t, t)) for t in change.values())),
        "cursor": cursor,
        "coverage": min(1.0, seen / len(site.train)),
        "base-loads": base_loads(),
        "process-id": PROCESS,
    }


def evaluate(resident: Resident, site: Site, config: Config) -> dict[str, float | int]:
    """Return the summed loss of the site's held-out examples, and over how many tokens."""
    nll_sum, tokens = 0.0, 0
    if site.held_out:
        nll_sum, tokens = training.held_out_loss(
            resident.model,
            site.held_out,
            config.arguments.per_device_train_batch_size,
            tokenizer_of(config.model.name).pad_token_id,
            resident.device,
            machine.forward(config),
        )
    if not math.isfinite(nll_sum):
        raise DataError(f"Site {site.partition_id}: the held-out loss is {nll_sum}.")
    return {
        "nll-sum": nll_sum,
        "tokens": tokens,
        "num-examples": len(site.held_out),
        "base-loads": base_loads(),
        "process-id": PROCESS,
    }


def examine(resident: Resident, config: Config) -> dict[str, int]:
    """Return correct answers and questions of the formulary, with the adapter and without."""
    from grandrounds.site.exam import score_formulary

    tokenizer = tokenizer_of(config.model.name)
    template = config.data.prompt_template
    tuned = score_formulary(resident.model, tokenizer, template)
    with resident.model.disable_adapter():
        base = score_formulary(resident.model, tokenizer, template)
    counts = {
        f"{kind}-{which}-{count}": number
        for which, scores in (("base", base), ("tuned", tuned))
        for kind, score in scores.items()
        for count, number in score.items()
    }
    return {**counts, "base-loads": base_loads(), "process-id": PROCESS}
