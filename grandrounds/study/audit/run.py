"""One audited run: a recipe is trained on a synthetic world with canaries, and attacked.

Everything happens in this process, on invented data: it measures the recipe and the code, not what
some site has given away. For that, a site audits itself (`grandrounds site audit`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from grandrounds import client_app, server_app
from grandrounds.config import recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.config.keys import TRAIN, Config
from grandrounds.data.tokenization import answer_token_ids, end_token_ids, prompt_token_ids
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import ConfigError
from grandrounds.model import machine
from grandrounds.model.resident import set_adapter
from grandrounds.model.saved import WEIGHTS
from grandrounds.model.scoring import generate_greedily, option_log_likelihoods, stop_tokens
from grandrounds.model.tokenizers import run_tokenizer
from grandrounds.server.guarantees import verdict
from grandrounds.server.listeners import Listener
from grandrounds.site.private.accountant import epsilon_of
from grandrounds.site.private.coins import secret_coins
from grandrounds.site.private.mechanism import Mechanism
from grandrounds.site.private.rehearsal import mechanism_of
from grandrounds.study.audit.canaries import (
    SITE,
    Canary,
    fresh_canaries,
    world,
    write_world,
)
from grandrounds.study.audit.extraction import Extraction, extraction, rank_of
from grandrounds.study.audit.mechanism import of_the_product
from grandrounds.study.audit.membership import Membership, auc_of_gaussian, membership
from grandrounds.study.audit.one_run import Bound, most_that_shows, one_run_bound
from grandrounds.study.plan.privacy import gaussian_noise
from grandrounds.study.preflight import check_base
from grandrounds.wire.adapter import Adapter, assemble

Progress = Callable[[str], None]
"""Called with what begins now."""

MECHANISM_CANARIES = 5000
"""Canaries of the audit of clip and noise by themselves."""

DELTA_WITHOUT_CLAIM = 1e-5
"""delta at which a run without a guarantee is audited."""


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    config: Config
    mechanism: Mechanism | None
    """None: the recipe claims nothing."""
    canaries: int
    is_in: int
    bound: Bound
    most_that_shows: float
    """The bound if every guess had been right."""
    told: Membership
    extracted: tuple[Extraction, Extraction]
    """Of the canaries that were in, and of those left out."""
    gradient_bound: Bound | None
    """Of clip and noise by themselves, where the recipe has them."""
    seconds: float

    @property
    def claimed(self) -> float | None:
        """The ε of a site after all its visits."""
        return epsilon_of(self.mechanism) if self.mechanism else None

    @property
    def delta(self) -> float:
        """The delta of claim and bound."""
        return self.mechanism.delta if self.mechanism else DELTA_WITHOUT_CLAIM

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON values: the content of the audit's file."""
        claimed, gradient = self.claimed, self.gradient_bound
        found = {
            "recipe-sha256": recipe_sha256(self.config),
            "claimed-epsilon": claimed,
            "delta": self.delta,
            "unit": "record",
            "at-least-epsilon": self.bound.epsilon,
            "confidence": 0.95,
            "surely-at-least-epsilon": self.bound.sure_epsilon,
            "sure-confidence": 0.999,
            "guesses": self.bound.guesses,
            "correct": self.bound.correct,
            "cuts": self.bound.cuts,
            "most-that-shows": self.most_that_shows,
            "canaries": self.canaries,
            "canaries-in": self.is_in,
            "membership": self.told.as_dict(),
            "auc-of-one-release": claimed and auc_of_gaussian(claimed, self.delta),
            "extraction": {
                "in": self.extracted[0].as_dict(),
                "out": self.extracted[1].as_dict(),
            },
            "mechanism": gradient
            and {
                "canaries": MECHANISM_CANARIES,
                "at-least-epsilon": gradient.epsilon,
                "surely-at-least-epsilon": gradient.sure_epsilon,
            },
            "seconds": self.seconds,
        }
        return {**found, "verdict": verdict(found)}


def audit(config: Config, count: int, tell: Progress) -> Audit:
    """Train a recipe on a synthetic world with canaries, and attack what comes out.

    Parameters
    ----------
    count : int
        Canaries, each in or out by a coin of the operating system.

    Raises
    ------
    ConfigError
        If the number is not allowed, the recipe cannot be audited, or cannot be calibrated.
    """
    if config.is_on_pairs:
        raise ConfigError(
            'train.objective = "dpo" cannot be audited: the canaries are records with one answer. '
            'Audit the recipe with train.objective = "sft".'
        )
    started = time.perf_counter()
    canaries = fresh_canaries(count, config.data.num_partitions)
    with tempfile.TemporaryDirectory(prefix="grandrounds-audit-") as folder:
        audited = in_world(config, Path(folder))
        check_base(audited)
        mechanism = mechanism_of(audited) if audited.is_private else None
        write_world(
            Path(audited.static.name),
            world(
                canaries,
                audited.data.num_partitions,
                mechanism.declared_units if mechanism else LEAST_RECORDS,
                repeats=mechanism is not None,
            ),
        )
        tell("clip and noise")
        gradients = audit_mechanism(mechanism) if mechanism else None
        tell("training")
        grid = InProcessGrid(client_app.app, audited.flat(), audited.data.num_partitions)
        summary = server_app.federate(grid, audited, Listener())
        tell("attacks")
        adapter = load_file(Path(audited.federation.run_directory) / summary["adapter"] / WEIGHTS)
        scores, greedy, ranks = attacked(audited, adapter, canaries)
    flags = np.array([canary.is_in for canary in canaries])
    delta = mechanism.delta if mechanism else DELTA_WITHOUT_CLAIM
    length = len(canaries[0].options)
    return Audit(
        config=config,
        mechanism=mechanism,
        canaries=count,
        is_in=int(flags.sum()),
        bound=one_run_bound(scores, flags, delta),
        most_that_shows=most_that_shows(count, delta),
        told=membership(scores, flags),
        extracted=(
            extraction(greedy, ranks, length, flags.tolist()),
            extraction(greedy, ranks, length, (~flags).tolist()),
        ),
        gradient_bound=gradients,
        seconds=time.perf_counter() - started,
    )


LEAST_RECORDS = 75
"""Records of a site in the world of a recipe without a guarantee, as many as the formulary's."""


def in_world(config: Config, folder: Path) -> Config:
    """Return a recipe with the synthetic world as its data, and a run directory in a folder."""
    return recipes.resolve(
        config.flat(),
        {
            "static.dataset.name": str(folder / "world.jsonl"),
            "static.dataset.config": "",
            "static.dataset.split": TRAIN,
            "static.dataset.revision": "",
            "data.partitioner": "natural",
            "data.partition-by": SITE,
            "data.question-column": "input",
            "data.answer-column": "output",
            "data.held-out-fraction": 0.0,
            "strategy.fraction-evaluate": 0.0,
            "privacy.unit-column": "",
            "train.save-every-round": config.federation.num_server_rounds,
            "train.report-to": "none",
            "run-directory": str(folder / "run"),
            "resume-from": "",
        },
    )


def attacked(
    config: Config, adapter: Adapter, canaries: Sequence[Canary]
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[bool], list[int]]:
    """Return each canary's score, greedy match and rank under an adapter.

    The score is the loss of the true answer before training less the loss after it, in nats.
    """
    resident = machine.prepare_model(config)
    shapes = {name: tuple(p.shape) for name, p in resident.parameters.items()}
    set_adapter(resident, assemble(shapes, (adapter, 0)))
    model, tokenizer, template = resident.model, run_tokenizer(config), config.data.prompt
    prompts = prompt_token_ids(tokenizer, template, [canary.question for canary in canaries])
    end = end_token_ids(tokenizer, template)
    values = sorted({value for canary in canaries for value in canary.options})
    ids = dict(zip(values, answer_token_ids(tokenizer, template, values), strict=True))
    lists = [[[*ids[value], *end] for value in canary.options] for canary in canaries]
    true = [[options[canary.true]] for options, canary in zip(lists, canaries, strict=True)]
    after = option_log_likelihoods(model, prompts, lists)
    with model.disable_adapter():
        before = option_log_likelihoods(model, prompts, true)
    scores = [a[canary.true] - b[0] for a, b, canary in zip(after, before, canaries, strict=True)]
    stops = stop_tokens(model, tokenizer, end)
    limits = [max(map(len, options)) for options in lists]
    written = generate_greedily(model, prompts, limits, stops)
    greedy = [list(text) == list(ids[c.answer]) for text, c in zip(written, canaries, strict=True)]
    ranks = [rank_of(row, canary.true) for row, canary in zip(after, canaries, strict=True)]
    return np.array(scores), greedy, ranks


def audit_mechanism(mechanism: Mechanism, count: int = MECHANISM_CANARIES) -> Bound:
    """Return the one-run bound of the product's clip and noise at the claimed ε, in one release.

    Canaries are four times as long as the clipping norm, so that a missing clip shows.
    """
    claimed = epsilon_of(mechanism)
    release = Mechanism(
        noise_multiplier=gaussian_noise(claimed, mechanism.delta),
        clipping_norm=mechanism.clipping_norm,
        sampling_rate=1.0,
        declared_units=count,
        steps=1,
        visits=1,
        delta=mechanism.delta,
    )
    coins = secret_coins()
    is_in = coins.uniforms(count) < 0.5
    scores = of_the_product(is_in, release, 4.0, coins)
    return one_run_bound(scores, is_in, mechanism.delta)
