"""Honest successors of an adapter are accepted, and what a hostile server made up is not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from grandrounds.config.strategies import STRATEGIES
from grandrounds.errors import PolicyError
from grandrounds.site.custody.reach import Reach, adamw_reach
from grandrounds.site.custody.received import ReceivedAdapter, after_round
from grandrounds.wire.adapter import Adapter, drawn_adapter, factor_of, is_magnitude
from tests.own_sites import sites_of
from tests.runs import Settings, metrics_of, play
from tests.site.custody.honest_runs import RANK, WIDTH, Honest, configured, layout
from tests.site.custody.test_custody import grid_of_sites

MOODS = ("aligned", "random", "sparse", "steady")

LOSSY: list[Settings] = [
    {f"communication.{side}-codec": codec for side in sides}
    for codec in ("float32", "bf16", "int8", "int4", "int2")
    for sides in (("uplink",), ("downlink",), ("uplink", "downlink"))
]
FED_BACK: list[Settings] = [
    *({"communication.uplink-codec": codec} for codec in ("ternary", "sign", "topk")),
    *(
        {
            "communication.downlink": "incremental",
            "communication.downlink-codec": down,
            "communication.uplink-codec": up,
        }
        for down, up in (
            ("ternary", "ternary"),
            ("int4", "ternary"),
            ("topk", "topk"),
            ("sign", "sign"),
            ("int2", "int2"),
        )
    ),
]
"""Codecs that only rules with error feedback take."""

SETTINGS: dict[str, list[Settings]] = {
    "product": [{}, {"strategy.site-ranks": "4,2"}],
    "flora": [{}, {"strategy.max-rank": 8}],
    "hetlora": [{"strategy.site-ranks": "4,2"}, {"strategy.rank-decay": 0.75}],
    "fedtrimmedavg": [{"strategy.trimmed-share": 0.4}],
    "ffa": [{}, {"strategy.outer-nesterov": True}],
    "fedavg": [{}, {"model.lora.peft-use-dora": True}],
    "fedexp": [{}, {"model.lora.peft-use-dora": True}],
    **{
        name: [{}, {"strategy.server-learning-rate": 0.1}]
        for name in ("fedadam", "fedyogi", "fedadagrad")
    },
}
"""Rule → what else it is tried with."""


def honest_runs(name: str) -> Iterator[Honest]:
    """Yield runs of a rule with every codec, mood and three learning rates, in turn."""
    back = FED_BACK if STRATEGIES[name].error_feedback else []
    mu = 0.01 if name == "fedprox" else 0.0
    for number, codecs in enumerate([{}, {}, {}, {}, *LOSSY, *back]):
        for own in SETTINGS.get(name, [{}]):
            rate = (1e-5, 1e-3, 3e-3)[number % 3]
            rates = {"train.learning-rate-max": rate, "train.learning-rate-min": rate / 10}
            chosen = {"strategy.name": name, "strategy.proximal-mu": mu, **rates, **own, **codecs}
            yield Honest(configured(chosen), number, MOODS[number % 4])


EVERY = 6
"""Of the runs of `honest_runs` one in so many is played here, each rule another part of them."""


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.slow
def test_no_honest_successor_is_refused(name: str) -> None:
    """25 messages a run: early and late rounds, sites that join late, evaluations. All runs of all
    rules are 12,000 messages."""
    seen, first = 0, list(STRATEGIES).index(name) % EVERY
    for run in itertools.islice(honest_runs(name), first, None, EVERY):
        for site, _, _, received in run.received():
            received.check(run.states[site])
            received.remember(run.states[site])
            seen += 1
    assert seen >= 75


CUSTODY: dict[str, Settings] = {
    "fedexp int4": {"strategy.name": "fedexp", "communication.uplink-codec": "int4"},
    "ffa ternary incremental": {
        "strategy.name": "ffa",
        "communication.downlink": "incremental",
        "communication.downlink-codec": "ternary",
        "communication.uplink-codec": "ternary",
    },
    "rolora int8": {"strategy.name": "rolora", "communication.downlink-codec": "int8"},
    "flora": {"strategy.name": "flora", "strategy.max-rank": 8},
    "dora int8": {
        "strategy.name": "fedexp",
        "model.lora.peft-use-dora": True,
        "train.training-arguments.weight-decay": 0.1,
        "communication.downlink-codec": "int8",
    },
    "own ranks of modules": {
        "strategy.name": "fedavg",
        "model.lora.rank-pattern": '{"q_proj": 2}',
        "model.lora.alpha-pattern": '{"v_proj": 16}',
    },
    "product of site ranks": {"strategy.name": "product", "strategy.site-ranks": "4,2"},
    "fedsvd int8": {"strategy.name": "fedsvd", "communication.downlink-codec": "int8"},
    "hetlora that prunes": {
        "strategy.name": "hetlora",
        "strategy.site-ranks": "4,2",
        "strategy.rank-decay": 0.75,
        "strategy.rank-penalty": 3.0,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CUSTODY)
def test_honest_runs_pass_in_custody(settings: Settings, tmp_path: Path, name: str) -> None:
    chosen = {**settings, **CUSTODY[name], "num-server-rounds": 5, "strategy.proximal-mu": 0.0}
    sites = sites_of(chosen, tmp_path)
    metrics = metrics_of(play(chosen, grid=grid_of_sites(chosen, sites)))
    assert [m["round"] for m in metrics] == list(range(6))
    assert not any(m.get("failed") or m.get("evaluate-failed") for m in metrics)


# --- Attacks --------------------------------------------------------------------------------------

CONFIG = configured({})
SHAPES = layout(RANK)
START = drawn_adapter(SHAPES, CONFIG.federation.seed)


def honest(kind: str = "train", number: int = 3) -> Adapter:
    """Return what an honest run sends in a round."""
    run = Honest(CONFIG, 0, "steady")
    [found] = [r.adapter for p, k, n, r in run.received() if (k, n) == (kind, number)][:1]
    return found


def checked(adapter: Adapter, state: RecordDict | None = None, number: int = 3) -> None:
    """Check an adapter as it arrives to be trained in a round."""
    steps = CONFIG.arguments.max_steps
    seen = ReceivedAdapter(adapter, CONFIG, SHAPES, after_round("train", number), steps)
    seen.check(RecordDict() if state is None else state)


def with_factor(adapter: Adapter, factor: str, made: Callable[[Any], Any]) -> Adapter:
    """Return an adapter with every tensor of one factor changed."""
    return {
        name: made(tensor).astype(np.float32) if factor_of(name) == factor else tensor
        for name, tensor in adapter.items()
    }


def slices(a: Any) -> Any:
    """Return rows of the identity."""
    return np.eye(WIDTH)[: len(a)]


def rotated(a: Any) -> Any:
    """Return rows of a matrix with the norms of another, in directions of the server's choice."""
    drawn = np.random.default_rng(5).normal(size=a.shape)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True) * np.linalg.norm(a, axis=1)[:, None]


ATTACKS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "slices of the identity": ("A", slices, "a row of .* is sparse"),
    "small slices of the identity": ("A", lambda a: 0.01 * slices(a), "a row of .* is sparse"),
    "other directions": ("A", rotated, r"a value of .*lora_A differs by .* from the run's start"),
    "parallel rows": ("A", lambda a: a[:1].repeat(len(a), 0), "nearly parallel"),
    "a scaled A": ("A", lambda a: 3 * a, "differs by .* from the run's start"),
    "a vanishing A": ("A", lambda a: 1e-12 * a, "differs by .* from the run's start"),
    "a scaled B": (
        "B",
        lambda b: 30 * b,
        r"a value of .*lora_B differs by .* from the run's start",
    ),
    "B = 0": ("B", lambda b: 0 * b, "its B is zero"),
    "another seed": ("A", lambda a: drawn_like(a, 7), "differs by .* from the run's start"),
}


def drawn_like(a: Any, seed: int) -> Any:
    bound = 1 / math.sqrt(a.shape[1])
    return np.random.default_rng(seed).uniform(-bound, bound, a.shape)


def test_the_adapter_that_the_attacks_change_is_accepted() -> None:
    checked(honest())


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_adapter_that_was_made_up_is_refused(attack: str) -> None:
    factor, made, reason = ATTACKS[attack]
    with pytest.raises(PolicyError, match=reason):
        checked(with_factor(honest(), factor, made))


def test_magnitudes_that_the_run_cannot_have_are_refused() -> None:
    config = configured({"model.lora.peft-use-dora": True})
    run = Honest(config, 0, "steady")
    arrived = {n: r for p, kind, n, r in run.received() if (p, kind) == (0, "evaluate")}
    for number, reason in ((0, "not the start"), (3, "a value of .*magnitude_vector differs")):
        arrived[number].check(RecordDict())
        changed = {
            name: 1.1 * tensor if is_magnitude(name) else tensor
            for name, tensor in arrived[number].adapter.items()
        }
        with pytest.raises(PolicyError, match=reason):
            run.seen(changed, "evaluate", number).check(RecordDict())


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "B = 0"])
def test_before_training_nothing_but_the_start_is_accepted(attack: str) -> None:
    """With A of slices of the identity and B = 0, an update of B is a slice of the gradient: 31 of
    31 tokens of a row were recovered so."""
    factor, made, _ = ATTACKS[attack]
    checked(START, number=1)
    with pytest.raises(PolicyError, match="not the start that seed 42 gives"):
        checked(with_factor(START, "A", made if factor == "A" else lambda a: 1.001 * a), number=1)


def test_a_site_that_has_seen_a_round_knows_how_far_the_next_can_be() -> None:
    """From the start the run may have come as far as this, but not within a round."""
    state, run = RecordDict(), Honest(CONFIG, 0, "steady")
    arrived = {n: r for p, kind, n, r in run.received() if (p, kind) == (0, "evaluate")}
    arrived[5].check(state)
    arrived[5].remember(state)
    arrived[6].check(state)
    moved = Reach(CONFIG, 4).value("A", 6)
    far = with_factor(arrived[6].adapter, "A", lambda a: a + 0.25 * moved)
    seen = run.seen(far, "evaluate", 6)
    seen.check(RecordDict())
    with pytest.raises(PolicyError, match="that this site accepted after round 5"):
        seen.check(state)


def test_a_rank_one_product_that_no_rule_reaches_is_refused() -> None:
    config = configured({"strategy.name": "product"})
    run = Honest(config, 0, "steady")
    [found] = [r.adapter for p, k, n, r in run.received() if (p, k, n) == (0, "evaluate", 3)]
    run.seen(found, "evaluate", 3).check(RecordDict())
    scaled = with_factor(found, "B", lambda b: 100 * b)
    with pytest.raises(PolicyError, match=r"update of .* has a norm of"):
        run.seen(scaled, "evaluate", 3).check(RecordDict())


# --- Bounds ---------------------------------------------------------------------------------------


def test_the_bound_of_adamw_is_that_of_the_first_steps_by_hand() -> None:
    """Step 1: m / sqrt(v) = g / |g| = 1. Step 2: weights of m 0.09 / 0.19 and 0.1 / 0.19, of v
    0.000999 / 0.001999 and 0.001 / 0.001999, so sqrt(0.2244 / 0.4997 + 0.2770 / 0.5003) = 1.0014.
    """
    assert adamw_reach(0) == 0
    assert adamw_reach(1) == pytest.approx(1)
    assert adamw_reach(2) == pytest.approx(1 + 1.00139, abs=1e-4)
    assert adamw_reach(3000) - adamw_reach(2999) == pytest.approx(math.sqrt(10))


@pytest.mark.parametrize("steps", [1, 6, 40])
def test_no_gradients_move_adamw_beyond_the_bound(steps: int) -> None:
    """Among them the ones that move it most at the last step: g_i proportional to w_i / u_i."""
    draw = np.random.default_rng(0)
    age = np.arange(steps)[::-1]
    worst = 0.9**age / 0.999**age
    for gradients in (np.ones(steps), worst, draw.normal(size=steps), 10.0 ** draw.normal(steps)):
        value = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([value], lr=1.0, eps=1e-30, weight_decay=0.0)
        for gradient in np.broadcast_to(gradients, steps):
            value.grad = torch.full_like(value, float(gradient))
            optimizer.step()
        assert abs(value.item()) <= adamw_reach(steps) * (1 + 1e-9)


def test_a_factor_that_a_rule_does_not_train_cannot_have_moved() -> None:
    for name, trained in (("ffa", "B"), ("rolora", "B")):
        reach = Reach(configured({"strategy.name": name}), 4)
        assert reach.value("A", 1) == 0
        assert reach.value(trained, 1) > 0
    assert Reach(configured({"strategy.name": "ffa"}), 4).value("A", 6) == 0
    assert Reach(configured({"strategy.name": "rolora"}), 4).value("A", 2) > 0
