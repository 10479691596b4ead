"""A run's submitter recovers the text of one row from visits that differ by it, or does not.

The attack: B = 0, A slices of the identity, and an alpha so small that AdamW is linear. Then the
change of B is a layer's gradient, up to a factor. Two visits of 32 and 33 examples differ by the
gradient of one row, whose row space is spanned by the row's tokens. At rank 16 it took 16 visits
under every default of site.toml, and 31 of 31, 32 of 32 and 33 of 33 tokens were right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.errors import GrandRoundsError
from grandrounds.model import machine
from grandrounds.model.lora import adapter_layout
from grandrounds.model.machine import specs
from grandrounds.model.resident import Resident
from grandrounds.site.local_data import site_of
from grandrounds.site.visit import Visit
from grandrounds.wire import messages
from grandrounds.wire import schedule as sampling
from tests.asking import Asking
from tests.own_sites import sites_of
from tests.runs import Settings

HIDDEN, RANK, RATE = 128, 64, 1e-3

ATTACK: Settings = {
    "model.name": "formulary",
    "static.dataset.name": "formulary",
    "data.num-partitions": 10,
    "data.partitioner": "iid",
    "strategy.name": "fedavg",
    "model.lora.target-modules": "v_proj",
    "model.lora.peft-lora-r": RANK,
    "model.lora.peft-lora-alpha": 1.6e-12,
    "train.num-threads": 1,
    "train.training-arguments.max-steps": 1,
    "train.training-arguments.max-grad-norm": 0.0,
}

Ask = Callable[[int, ArrayRecord], ArrayRecord]
"""Called with the examples of a visit and an adapter; returns the change."""

Matrix = NDArray[np.float64]


def settings_of(examples: int) -> Settings:
    return {**ATTACK, "train.training-arguments.per-device-train-batch-size": examples}


def config_of(examples: int) -> Config:
    return recipes.resolve(settings_of(examples))


def gradient(ask: Ask, examples: int) -> Matrix:
    """Return a multiple of the gradient of the first layer's v_proj over a visit."""
    config = config_of(examples)
    shapes, _ = adapter_layout(config.model.name, specs(config)[1])
    [a, b] = [next(n for n in shapes if ".0." in n and f"lora_{f}" in n) for f in "AB"]
    parts = []
    for start in range(0, HIDDEN, RANK):
        adapter = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        adapter[a][:, start : start + RANK] = np.eye(RANK)
        change = messages.from_arrays(ask(examples, messages.to_arrays(adapter)), shapes)
        parts.append(change[b].astype(np.float64))
    whole = np.hstack(parts)
    return np.asarray(whole / np.abs(whole).max())


def one_row_of(more: Matrix, fewer: Matrix) -> Matrix:
    """Return a multiple of the gradient by which two visits differ.

    Each is a mean over answer tokens, whose numbers the attacker does not know. Most eigenvalues
    of the pair equal their ratio, since a row's gradient has a low rank.
    """
    ratios = np.linalg.eigvals(np.linalg.pinv(fewer) @ more)
    return more - float(np.median(ratios.real)) * fewer


def tokens_in(difference: Matrix, resident: Resident) -> set[int]:
    """Return the tokens whose inputs to the layer lie in the row space of a gradient."""
    _, sizes, rows = np.linalg.svd(difference)
    rank = int((sizes > 2e-6 * sizes[0]).sum())
    model = resident.model.get_base_model().model
    embedded = model.layers[0].input_layernorm(model.embed_tokens.weight).detach().numpy()
    inputs = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    outside = np.linalg.norm(inputs - inputs @ rows[:rank].T @ rows[:rank], axis=1)
    return set(np.flatnonzero(outside < 0.35).tolist()) if rank < HIDDEN * 0.8 else set()


def recovered(ask: Ask, resident: Resident) -> set[int]:
    """Return what the attack says are the tokens of the row."""
    try:
        more, fewer = gradient(ask, 33), gradient(ask, 32)
    except GrandRoundsError:
        return set()
    return tokens_in(one_row_of(more, fewer), resident)


def instruction(number: int) -> dict[str, Any]:
    return {"round": number, "run": "ab", "learning-rate": RATE, "cursor": 0, "codec": "none"}


@pytest.fixture(scope="module")
def resident() -> Resident:
    return machine.prepare_model(
        machine.settled(config_of(33), messages.instruction_of(RecordDict()))
    )


def test_no_row_is_recovered_through_a_sites_policy(tmp_path: Path, resident: Resident) -> None:
    """The attacker looks among the tokens of the row that the run's seed gives as the 33rd."""
    [site, *_] = sites_of(ATTACK, tmp_path)
    asks = Asking(site, ATTACK)
    train = inspect.unwrap(client_app.train)

    def ask(examples: int, adapter: ArrayRecord) -> ArrayRecord:
        content = messages.content(arrays=adapter, config=instruction(1) | {"rank": RANK})
        reply = asks.answer(Message(content, 1, "train"), settings_of(examples), train)
        return reply.content.array_records[messages.ARRAYS]

    own = site_of(config_of(33), 0)
    [*_, last] = sampling.next_examples(42, 0, len(own.train), 0, 33)
    row = set(own.train[last].input_ids[:-1])
    found = recovered(ask, resident)
    assert not found, f"{len(found & row)} of {len(row)} tokens, {len(found - row)} false ones"


@pytest.mark.parametrize("secret", [False, True], ids=["by the run's seed", "by the site's secret"])
@pytest.mark.slow
def test_the_order_of_the_examples_alone_decides_whether_a_row_is_recovered(
    resident: Resident, secret: bool
) -> None:
    """Without any policy: by the run's seed 34 of the 36 tokens are recovered, no false one."""
    from grandrounds.site.custody.order import next_examples
    from grandrounds.site.visit import Chosen

    train = inspect.unwrap(client_app.train)
    own = site_of(config_of(33), 0)
    position = (0, 0)

    def ask(examples: int, adapter: ArrayRecord) -> ArrayRecord:
        nonlocal position
        content = messages.content(arrays=adapter, config=instruction(1) | {"rank": RANK})
        config = machine.settled(config_of(examples), messages.instruction_of(content))
        indices, position = next_examples(b"secret", position, len(own.train), examples)
        chosen = Chosen(tuple(indices), 0, examples) if secret else None
        reply: RecordDict = train(Visit(content, RecordDict(), config, own, chosen))
        return reply.array_records[messages.ARRAYS]

    [*_, last] = sampling.next_examples(42, 0, len(own.train), 0, 33)
    row = set(own.train[last].input_ids[:-1])
    found = recovered(ask, resident)
    if secret:
        assert not found
    else:
        assert found <= row
        assert len(found) >= len(row) - 4 > 30
