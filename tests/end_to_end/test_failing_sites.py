"""Failing sites are reported and counted; the run continues while enough updates are good."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, Context, Message, MessageType
from safetensors.numpy import load_file
from typer.testing import CliRunner

from grandrounds import client_app
from grandrounds.cli import app as command_line
from grandrounds.config import recipes
from grandrounds.errors import RoundError
from tests.end_to_end.sites import Damage, fail_from, spoilt
from tests.runs import GOOD_SITES, Settings, adapter_bytes, metrics_of, options, play, summary_of

ONE_QUICK_ROUND: Settings = {
    "num-server-rounds": 1,
    "strategy.fraction-train": 1.0,
    "train.training-arguments.max-steps": 1,
}


def crash(message: Message, reply: Message) -> Message:
    raise RuntimeError("out of memory")


def not_finite(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    name = next(iter(arrays))
    values = arrays[name].numpy().copy()
    values[0, 0] = np.nan
    arrays[name] = Array(values)
    return reply


def wrong_shape(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(arrays[name].numpy().T.copy())
    return reply


def wrong_type(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(arrays[name].numpy().astype(np.float64))
    return reply


def no_tensors(message: Message, reply: Message) -> Message:
    del reply.content["arrays"]
    return reply


def one_tensor_less(message: Message, reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    del arrays[next(iter(arrays))]
    return reply


def no_metrics(message: Message, reply: Message) -> Message:
    del reply.content["metrics"]
    return reply


def metric(name: str, value: float | None) -> Damage:
    """Return a function that overwrites a metric of a reply; None removes it."""

    def damage(message: Message, reply: Message) -> Message:
        metrics = reply.content.metric_records["metrics"]
        del metrics[name]
        if value is not None:
            metrics[name] = value
        return reply

    return damage


TRAIN_DAMAGE: dict[str, tuple[Damage, str]] = {
    "crash": (crash, "out of memory"),
    "not-finite": (not_finite, "not finite"),
    "wrong-shape": (wrong_shape, "expected float32 of shape"),
    "wrong-type": (wrong_type, "expected float32 of shape"),
    "no-tensors": (no_tensors, "no tensors"),
    "one-tensor-less": (one_tensor_less, "missing"),
    "no-metrics": (no_metrics, "no metrics"),
    "zero-examples": (metric("num-examples", 0), "num-examples is 0"),
    "half-an-example": (metric("num-examples", 0.5), "num-examples is 0.5"),
    "loss-not-finite": (metric("train-loss", math.nan), "train-loss"),
    **{
        f"no-{name}": (metric(name, None), name)  # the reported reason names the missing metric
        for name in (
            "num-examples",
            "train-loss",
            "proximal-penalty",
            "examples",
            "tokens",
            "padding-tokens",
            "seconds",
            "cursor",
            "coverage",
        )
    },
}


GOOD = 4
"""Number of healthy sites; one more site fails in each of the ways under test."""


def play_with_damage(
    federation: Settings, damages: Collection[Damage], kind: str, folder: Path
) -> Path:
    """Play one round with healthy sites and one failing site for each damage."""
    changes: Settings = {
        **ONE_QUICK_ROUND,
        "run-directory": str(folder / "run"),
        "data.num-partitions": GOOD + len(damages),
        "strategy.fraction-evaluate": 1.0,
        "strategy.min-reply-fraction": 0.1,
    }
    damage_of = dict(enumerate(damages, GOOD))

    def damaged(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        if message.metadata.message_type != kind or site < GOOD:
            return GOOD_SITES(message, context)
        return damage_of[site](message, GOOD_SITES(message, context))

    return play(federation, damaged, **changes)


@pytest.fixture(scope="module")
def badly_trained(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one failing site for each kind of unusable training reply."""
    damages = [damage for damage, _ in TRAIN_DAMAGE.values()]
    folder = tmp_path_factory.mktemp("badly-trained")
    return play_with_damage(federation, damages, MessageType.TRAIN, folder)


@pytest.mark.parametrize("damage", TRAIN_DAMAGE)
def test_an_unusable_training_reply_is_reported_with_its_reason(
    badly_trained: Path, damage: str
) -> None:
    site = GOOD + list(TRAIN_DAMAGE).index(damage)
    line = metrics_of(badly_trained)[1]
    assert site in line["cohort"]
    assert site not in line["good"]
    assert TRAIN_DAMAGE[damage][1] in line["failed"][str(site)]


def test_failed_replies_are_counted_and_the_run_completes(badly_trained: Path) -> None:
    line, summary = metrics_of(badly_trained)[1], summary_of(badly_trained)
    assert line["good"] == list(range(GOOD))
    assert len(line["failed"]) == len(TRAIN_DAMAGE)
    assert (summary["status"], summary["failed_replies"]) == ("completed", len(TRAIN_DAMAGE))
    adapter = load_file(badly_trained / "peft_1" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in adapter.values())


def test_a_failed_site_does_not_contribute_to_the_adapter(
    settings: Settings, tmp_path: Path
) -> None:
    """Whatever makes a reply unusable, the average of the others is the same."""
    changes = ONE_QUICK_ROUND
    adapters = {
        adapter_bytes(
            play(
                settings,
                spoilt(TRAIN_DAMAGE[name][0], {1}),
                **changes,
                **{"run-directory": str(tmp_path / name)},
            )
        )
        for name in ("crash", "not-finite", "no-metrics", "half-an-example")
    }
    whole = play(settings, **changes)
    assert len(adapters) == 1
    assert adapter_bytes(whole) not in adapters


EVALUATE_DAMAGE: dict[str, tuple[Damage, str]] = {
    "crash": (crash, "out of memory"),
    "no-metrics": (no_metrics, "no metrics"),
    "loss-not-finite": (metric("nll-sum", math.inf), "nll-sum"),
    "no-loss": (metric("nll-sum", None), "nll-sum"),
    "no-tokens": (metric("tokens", None), "tokens"),
}


@pytest.fixture(scope="module")
def badly_evaluated(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one failing site for each kind of unusable evaluation reply."""
    damages = [damage for damage, _ in EVALUATE_DAMAGE.values()]
    folder = tmp_path_factory.mktemp("badly-evaluated")
    return play_with_damage(federation, damages, MessageType.EVALUATE, folder)


@pytest.mark.parametrize("damage", EVALUATE_DAMAGE)
def test_an_unusable_evaluation_reply_is_reported_with_its_reason(
    badly_evaluated: Path, damage: str
) -> None:
    site = GOOD + list(EVALUATE_DAMAGE).index(damage)
    for line in metrics_of(badly_evaluated):
        assert EVALUATE_DAMAGE[damage][1] in line["evaluate-failed"][str(site)]


def test_the_held_out_loss_is_that_of_the_sites_that_could_evaluate(
    badly_evaluated: Path, settings: Settings
) -> None:
    for line in metrics_of(badly_evaluated):
        assert line["evaluated"] == list(range(GOOD))
        assert len(line["evaluate-failed"]) == len(EVALUATE_DAMAGE)
        assert math.isfinite(line["held-out-loss"])
    assert summary_of(badly_evaluated)["failed_replies"] == 2 * len(EVALUATE_DAMAGE)
    config = recipes.load_recipe(badly_evaluated / "config.toml")
    undamaged = play({**config, "run-directory": settings["run-directory"]})
    assert adapter_bytes(badly_evaluated) == adapter_bytes(undamaged)


def test_too_few_good_replies_fail_the_run_and_keep_finished_rounds(
    settings: Settings,
) -> None:
    sites = fail_from(2, {0, 1, 3})
    changes = {"strategy.fraction-train": 1.0, "train.save-every-round": 1}
    with pytest.raises(RoundError, match=r"Round 2: 1 of 4 .* at least 2 .*site 0: .*disk broke"):
        play(settings, sites, **changes)
    run = Path(settings["run-directory"])
    summary = summary_of(run)
    assert (summary["status"], summary["rounds"]) == ("failed", 1)
    assert "disk broke" in summary["reason"]
    assert summary["adapter"] == "peft_1"
    assert [line["round"] for line in metrics_of(run)] == [0, 1]
    assert [f.name for f in run.glob("peft_*")] == ["peft_1"]


@pytest.mark.parametrize(("fraction", "ends"), [(0.5, "completed"), (0.51, "failed")])
def test_the_required_number_of_good_replies_is_rounded_up(
    settings: Settings, fraction: float, ends: str
) -> None:
    changes = {**ONE_QUICK_ROUND, "num-server-rounds": 2, "strategy.min-reply-fraction": fraction}
    sites = fail_from(2, {0, 3})
    with pytest.raises(RoundError) if ends == "failed" else nullcontext():
        play(settings, sites, **changes)
    assert summary_of(Path(settings["run-directory"]))["status"] == ends


def test_a_failed_run_exits_with_code_1(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_app, "app", fail_from(2, {0, 1, 2, 3}))
    result = CliRunner().invoke(command_line, ["run", *options(settings)])
    assert result.exit_code == 1
    assert result.stderr.startswith("grandrounds: Round 2: 0 of 2 sites returned a valid update")
    assert len(result.stderr.splitlines()) == 1


def test_a_crash_at_roll_call_ends_the_run_and_leaves_no_directory(settings: Settings) -> None:
    def sites(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            raise RuntimeError("no power")
        return GOOD_SITES(message, context)

    with pytest.raises(Exception, match="no power"):
        play(settings, sites)
    assert not Path(settings["run-directory"]).exists()
