"""What a run's submitter did to single patients' rows under the default policy is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MessageType

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import PolicyError
from grandrounds.model.lora import adapter_layout
from grandrounds.model.machine import specs
from grandrounds.server import introductions
from grandrounds.server.exchange import Exchange
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.wire import messages
from grandrounds.wire.adapter import Adapter, Ranks, drawn_adapter
from grandrounds.wire.downlink import Sender
from grandrounds.wire.ledger import Ledger
from grandrounds.wire.schedule import round_learning_rate_of
from tests.own_sites import make_site
from tests.runs import Settings, grid_of

STEPS = "train.training-arguments.max-steps"
BATCH = "train.training-arguments.per-device-train-batch-size"
ALPHA = "model.lora.peft-lora-alpha"


@pytest.fixture
def alone(settings: Settings) -> Settings:
    """A run of one site that the default policy allows."""
    return {
        **settings,
        "data.num-partitions": 1,
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 1.0,
        BATCH: 16,
    }


@pytest.fixture
def site(flashcards: Path, settings: Settings, tmp_path: Path) -> SiteFile:
    """A site of 108 training examples under the policy of the template."""
    base = str(settings["model.name"])
    own = {
        "policy__min_examples": 100,
        "policy__max_rank": 16,
        "policy__min_examples_per_visit": 32,
        "data__held_out_fraction": 0.1,
    }
    return make_site(tmp_path / "site", {base: base}, str(flashcards), **own)


def start_of(settings: Settings) -> Adapter:
    config = recipes.resolve(settings)
    _, lora = specs(config)
    return drawn_adapter(adapter_layout(config.model.name, lora)[0], config.federation.seed)


def request(
    settings: Settings, adapter: Adapter | None = None, number: int = 1, **said: Any
) -> Message:
    """Return a hostile server's message to train, by default with what an honest one says.

    Parameters
    ----------
    adapter
        Sent instead of the run's start.
    """
    config, start = recipes.resolve(settings), start_of(settings)
    seed = config.federation.seed
    sender = Sender(Ranks.of(config), config.communication, start, seed)
    parcel = sender.parcel(number, 0, adapter or start, trains=True)
    exchange = Exchange(InProcessGrid(client_app.app, {}, 1), Ledger(), "ab", 60)
    honest = {"learning-rate": round_learning_rate_of(config, number), "cursor": 0}
    return exchange.message(1, MessageType.TRAIN, number, parcel, {**honest, **said})


def asked(settings: Settings, site: SiteFile, message: Message) -> Message:
    """Return a site's reply; raise the error that it reports."""
    node = {"partition-id": 0, "num-partitions": 1, "site": str(site.path)}
    [reply] = grid_of(recipes.resolve(settings), nodes=[node]).send_and_receive([message])
    messages.raise_failure(reply)
    return reply


def test_an_honest_request_under_the_default_policy_is_answered(
    alone: Settings, site: SiteFile
) -> None:
    asked(alone, site, introductions.questions([1], "ab")[1])
    assert messages.tensor_sizes(asked(alone, site, request(alone)))


def test_a_learning_rate_of_0_does_not_tell_the_exact_loss_of_a_training_row(
    alone: Settings, site: SiteFile
) -> None:
    """It told 6 of 6 members from 228 candidates."""
    with pytest.raises(PolicyError, match=r"learning rate of round 1 is 0\.00\d+ .* requested 0"):
        asked(alone, site, request(alone, **{"learning-rate": 0.0}))
    still = {**alone, "num-server-rounds": 1, "train.learning-rate-min": 0.0}
    with pytest.raises(PolicyError, match="min-learning-rate = 1e-08, requested 0"):
        asked(still, site, request(still))


def test_steps_of_one_example_are_refused(alone: Settings, site: SiteFile) -> None:
    """32 of them satisfied `min-examples-per-visit = 32`; each is one row's gradient."""
    single = {**alone, BATCH: 1, STEPS: 32}
    with pytest.raises(PolicyError, match="min-examples-per-step = 4, requested 1"):
        asked(single, site, request(single))


@pytest.mark.parametrize("length", [40, 41, 42, 43])
def test_a_sequence_length_that_isolates_rows_is_refused(
    alone: Settings, site: SiteFile, length: int
) -> None:
    """The counts of rows at 40, 41, 42 and 43 tokens told single rows by their length."""
    short = {**alone, "train.seq-length": length}
    with pytest.raises(PolicyError, match=f"min-sequence-length = 128, requested {length}"):
        asked(short, site, introductions.questions([1], "ab")[1])


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        (ALPHA, 1.6e-12, "min-lora-scale"),
        ("train.training-arguments.max-grad-norm", 1e-12, "min-clipping-norm"),
    ],
)
def test_what_makes_adamw_linear_is_refused(
    alone: Settings, site: SiteFile, key: str, value: float, limit: str
) -> None:
    """With a gradient far below AdamW's epsilon, two visits that differ in one row differed by
    that row's gradient, and 31 of 31 tokens of the row were recovered."""
    linear = {**alone, key: value}
    with pytest.raises(PolicyError, match=limit):
        asked(linear, site, request(linear))


@pytest.mark.parametrize(
    ("number", "reason"), [(1, "not the start that seed 42 gives"), (2, "its B is zero")]
)
def test_an_adapter_that_reads_off_gradients_is_refused(
    alone: Settings, site: SiteFile, number: int, reason: str
) -> None:
    """With B = 0 and A of slices of the identity, 31 of 31 tokens of a row were recovered from 16
    pairs of visits, each with the next slice."""
    slices = {
        name: np.eye(*tensor.shape, dtype=np.float32) if ".lora_A." in name else 0 * tensor
        for name, tensor in start_of(alone).items()
    }
    with pytest.raises(PolicyError, match=reason):
        asked(alone, site, request(alone, slices, number))
