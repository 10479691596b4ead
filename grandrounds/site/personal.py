"""A site's personal adapter: made after the last round, of the federated one and its own examples.

`local-tail`: the site trains the received adapter F further, to T, and takes F + w (T - F).
Federated averaging followed by local training is FTFA of Cheng, Chadha & Duchi (Fine-tuning is Fine
in Federated Learning, 2021); with a proximal term the training minimises f(v) + mu/2 ||v - F||^2,
the personal objective of Ditto (Li et al., 2021). Interpolation with what was fine-tuned is WiSE-FT
(Wortsman et al., 2022), here of the factors.

`interpolate`: the site trains an adapter L from the run's start on its own examples alone, and
takes the convex combination of products w B_L A_L + (1 - w) B_F A_F, exactly, at twice the rank:
the personal model of APFL (Deng, Kamani & Mahdavi, Adaptive Personalized Federated Learning, 2020),
v = alpha v_i + (1 - alpha) w, and model interpolation of Mansour et al. (Three Approaches for
Personalization, 2020). APFL adapts alpha by gradient steps in every round; here w is chosen from a
list, once.

`shared-a`, `dual`: what the site keeps (`own_part`) is trained further beside the last shared
factors, which stay as they are, and the adapter is the point at w of the way, as for a tail. A site
that never trained in a round starts from none.

The weight w is the one with the lowest loss on every second held-out example; the others alone are
reported. Nothing leaves but figures, and these no further than held-out losses do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grandrounds.config.keys import Config
from grandrounds.data.tokenization import TokenizedExample
from grandrounds.model import headroom, machine
from grandrounds.model.lora import LoraSpec
from grandrounds.model.resident import Resident, adapter_of, resident_model, set_adapter
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.site import steps, training
from grandrounds.site import visit as visits
from grandrounds.site.local_data import Site
from grandrounds.site.visit import Visit
from grandrounds.wire import schedule as sampling
from grandrounds.wire.adapter import (
    Adapter,
    Ranks,
    factor_of,
    rank_index,
    shapes_of,
    started_adapter,
)
from grandrounds.wire.personal import FEDERATED_NLL, WEIGHT, moved, side_by_side


@dataclass(frozen=True)
class Personal:
    """A personal adapter as its site keeps it."""

    adapter: Adapter
    """Its tensors, which are the base's and `lora`'s."""
    lora: LoraSpec
    """How it is applied: that of the run, or as many side by side."""
    facts: Mapping[str, float | int | str]
    """How it was made and what it scores, under the names of messages."""


def halves(
    examples: Sequence[TokenizedExample], weights: Sequence[float]
) -> tuple[tuple[TokenizedExample, ...], tuple[TokenizedExample, ...]]:
    """Return the held-out examples on which a weight is chosen, and those that are reported.

    Every second one, the first of them reported. With a single weight nothing is chosen, and all
    are reported.
    """
    if len(weights) < 2:
        return (), tuple(examples[i] for i in range(len(examples)))
    return (
        tuple(examples[i] for i in range(1, len(examples), 2)),
        tuple(examples[i] for i in range(0, len(examples), 2)),
    )


def tail_config(config: Config) -> Config:
    """Return the configuration of a site's own training after the last round.

    Visits are counted and limited by it: its steps stand in the place of those of a visit.
    """
    arguments = dataclasses.replace(config.arguments, max_steps=config.personalisation.steps)
    return dataclasses.replace(config, arguments=arguments)


def personalised(visit: Visit) -> Personal:
    """Return the personal adapter of a site, made of the received one.

    Raises
    ------
    DataError
        If a loss is not finite.
    """
    config, site = visit.config, visit.site
    resident = machine.prepare_model(config)
    received = visits.receive_adapter(visit, resident, trains=False)
    choosing, reported = halves(site.held_out, config.weights)
    is_mixed = config.personalisation.name == "interpolate"
    if is_mixed:
        seed = config.federation.seed
        start = started_adapter(shapes_of(received), seed, resident.magnitudes)
        set_adapter(resident, start)
    with steps.visiting("personal adapter", site.partition_id):
        taken = _train(visit, resident)
    trained = adapter_of(resident)
    base, lora = machine.specs(config)
    if is_mixed:
        lora = lora.repeated(2)
        resident = resident_model(base, lora)

    shared = received
    if Ranks.of(config).has_private:  # the federated adapter is the shared one alone
        shared = visits.receive_adapter(visit, resident, trains=False, alone=True)

    def mixed(weight: float) -> Adapter:
        if is_mixed:
            return side_by_side([(trained, weight), (received, 1.0 - weight)])
        return moved(received, trained, weight)

    def judged(adapter: Adapter, examples: Sequence[TokenizedExample]) -> tuple[float, int]:
        set_adapter(resident, adapter)
        found = visits.evaluate(resident, _holding(site, examples), config)
        return float(found["nll-sum"]), int(found["tokens"])

    weight = config.weights[-1]
    if choosing:
        weight = min(config.weights, key=lambda one: judged(mixed(one), choosing)[0])
    elif len(config.weights) > 1 and is_mixed:
        weight = config.weights[len(config.weights) // 2]
    facts: dict[str, float | int | str] = {
        "personalisation": config.personalisation.name,
        "round": visit.round,
        "steps": taken,
        WEIGHT: weight,
        "chosen-on": len(choosing),
        "num-examples": len(reported),
    }
    adapter = mixed(weight)
    if reported:
        federated, _ = judged(shared if shared is not received else mixed(0.0), reported)
        own, tokens = judged(adapter, reported)
        facts |= {"nll-sum": own, FEDERATED_NLL: federated, "tokens": tokens}
    return Personal(adapter, lora, facts)


def _holding(site: Site, examples: Sequence[TokenizedExample]) -> Site:
    """Return a site with some of its held-out examples."""
    return dataclasses.replace(site, held_out=tuple(examples))


def _train(visit: Visit, resident: Resident) -> int:
    """Train the resident adapter, or what stays here of it, on the site's next examples.

    Returns
    -------
    The optimizer steps.
    """
    config = tail_config(visit.config)
    how, arguments = config.personalisation, config.arguments
    batches = visits.next_batches(dataclasses.replace(visit, config=config))
    ranks = Ranks.of(config)
    for name, parameter in resident.parameters.items():
        parameter.requires_grad_(not ranks.stays or factor_of(name) in ranks.stays)
    trained = {n: p for n, p in resident.parameters.items() if p.requires_grad}
    parameters, parts = list(trained.values()), None
    if ranks.has_private:
        parts = [rank_index(name, ranks.private) for name in trained]
    number, site = visit.round, visit.site.partition_id
    settings = training.VisitSettings(
        accumulation_steps=arguments.gradient_accumulation_steps,
        schedule=sampling.VisitSchedule(how.learning_rate, 0, "linear"),
        optimizer=config.train.optimizer,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        proximal_mu=how.proximal_mu,
        forward=machine.forward(config),
        replayed=visits.shown_beside(visit, resident, len(batches)),
        seed=sampling.visit_seed(config.federation.seed, number, site),
    )
    pad = run_tokenizer(config).pad_token_id
    result = headroom.run_visit(
        config,
        resident,
        lambda: training.train_visit(resident.model, parameters, batches, settings, pad, parts),
    )
    return result.steps


def told(visit: Visit, personal: Personal) -> dict[str, float | int]:
    """Return the metrics of the reply: of a private run none that depends on the site's data."""
    names: tuple[str, ...] = ("steps",)
    if not visit.config.is_private:
        names += (WEIGHT, "num-examples", "nll-sum", FEDERATED_NLL, "tokens")
    facts = personal.facts
    figures = {name: facts[name] for name in names if name in facts}
    return {**figures, **visits.process_facts()}  # type: ignore[dict-item]
