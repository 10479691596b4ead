"""Whole runs whose updates travel masked, in process: the sum of plain ones, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from safetensors.numpy import load_file
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.errors import PolicyError, RoundError, RunDirectoryError
from grandrounds.server import resumption
from grandrounds.server.directory import RunDirectory
from grandrounds.server.listeners.trackers import figures_of
from grandrounds.site.custody import policy
from grandrounds.wire import messages
from grandrounds.wire.ledger import Ledger
from grandrounds.wire.masks.fixed_point import FixedPoint
from tests.end_to_end.sites import spoilt
from tests.masking import chi_square_of
from tests.runs import (
    GOOD_SITES,
    Settings,
    Sites,
    adapter_bytes,
    interrupted_at,
    metrics_of,
    play,
    read_json,
    summary_of,
)
from tests.transcripts import Left, left, with_same_coins

MASKED: Settings = {"secure-aggregation": "masked32", "strategy.fraction-train": 1.0}

ONE_ROUND: Settings = {
    **MASKED,
    "num-server-rounds": 1,
    "train.training-arguments.max-steps": 1,
    "strategy.fraction-evaluate": 0.0,
}

PLAIN: Settings = {
    "secure-aggregation": "none",
    "strategy.fraction-train": 1.0,
    "defence.largest-norm": 0.0,
}


def tensors_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / summary_of(run)["adapter"] / "adapter_model.safetensors")


def furthest(one: Path, other: Path) -> float:
    """Return the largest difference of a value between two adapters."""
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    return float(max(np.abs(a[name] - b[name]).max() for name in a))


def noting(sent: list[Message]) -> Sites:
    """Return sites whose replies are noted."""

    def sites(message: Message, context: Context) -> Message:
        sent.append(reply := GOOD_SITES(message, context))
        return reply

    return sites


PLAIN_VECTORS: list[np.ndarray] = []
"""Of the run `played`: what its sites masked, in the order of their replies."""


@pytest.fixture(scope="module")
def played(
    federation: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Message]]:
    """A masked run of four sites and three rounds, and every message that left a site."""
    folder, sent, encode = (
        tmp_path_factory.mktemp("masked") / "run",
        list[Message](),
        FixedPoint.encode,
    )

    def noted(*given: Any) -> Any:
        PLAIN_VECTORS.append((vector := encode(*given)).copy())
        return vector

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedPoint, "encode", noted)
        run = play({**federation, **MASKED, "run-directory": str(folder)}, noting(sent))
    return run, sent


def test_a_masked_run_is_that_of_plain_updates(
    settings: Settings, played: tuple[Path, list[Message]]
) -> None:
    masked, _ = played
    plain = play({**settings, **PLAIN})
    assert furthest(masked, plain) < 1e-6
    for one, other in zip(metrics_of(masked), metrics_of(plain), strict=True):
        assert one["held-out-loss"] == pytest.approx(other["held-out-loss"], abs=1e-5)
        if one["round"]:  # FedExP's step needs squared lengths
            rate = other["server-learning-rate"]
            assert one["server-learning-rate"] == pytest.approx(rate, rel=1e-5)


def test_the_plan_is_the_ledger_to_the_byte(played: tuple[Path, list[Message]]) -> None:
    run, _ = played
    plan, ledger = read_json(run / "plan.json"), read_json(run / "ledger.json")
    assert plan["totals"] == ledger["totals"]
    counted = Ledger.from_dict(ledger)
    assert {"masks.down", "masks.up"} < counted.totals.keys()


def test_metrics_do_not_bypass_the_mask(played: tuple[Path, list[Message]]) -> None:
    """A masked update comes without any figure of the site's data, and no other reply has one."""
    run, sent = played
    kinds = [m for m in sent if m.metadata.message_type.startswith("train")]
    assert {m.metadata.message_type for m in kinds} == {
        f"train.{exchange}" for exchange in ("keys", "shares", "masked", "confirm", "unmask")
    }
    for message in kinds:
        told = message.content.metric_records.get(messages.METRICS) or {}
        has_vector = message.metadata.message_type == "train.masked"
        assert set(told) == ({"cursor", "base-loads", "process-id"} if has_vector else set())
        assert not message.content.config_records
    for record in metrics_of(run)[1:]:
        assert record["train-loss"] is record["coverage"] is None
        assert not {"update-norms", "update-cosines", "weights"} & record.keys()
        assert record["masked-sum"]["sites"] == 4
        assert record["masked-sum"]["values-cut"] == 0


def test_what_a_server_sees_of_a_site_is_uniform_and_resembles_no_update(
    played: tuple[Path, list[Message]],
) -> None:
    """Pearson's statistic of 256 cells has mean 255 and variance 510; r of d independent pairs has
    a standard deviation of 1 / √d.
    """
    _, sent = played
    vectors = [
        messages.from_payload(message.content.array_records["arrays"], "masked", 10**6)
        for message in sent
        if message.metadata.message_type == "train.masked"
    ]
    seen = np.concatenate(vectors).view("<i4")
    meant = np.concatenate(PLAIN_VECTORS).view("<i4")
    assert abs(chi_square_of(seen.tobytes())) < 5 < chi_square_of(meant.tobytes())
    assert abs(np.corrcoef(seen, meant)[0, 1]) < 4 / math.sqrt(len(meant))


def what_leaves(settings: Settings, cards: Path) -> list[Left]:
    """Return all that leaves the sites while they train for one round."""
    sent: list[Message] = []
    play({**settings, **ONE_ROUND, "static.dataset.name": str(cards)}, noting(sent))
    return [left(m) for m in sent if m.metadata.message_type.startswith("train")]


@pytest.fixture
def same_coins(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what begins the coins of keys, shares and signatures anew."""
    return with_same_coins(monkeypatch)


def test_a_record_changes_nothing_but_one_masked_vector(
    settings: Settings, flashcards: Path, tmp_path: Path, same_coins: Callable[[], None]
) -> None:
    """With the same coins, and another answer in a row of one site, its vector differs alone.

    Order, kinds, sizes, figures and texts of all replies are the same, and so are the arrays of
    keys, shares, confirmations and opened shares.
    """
    settings["train.training-arguments.per-device-train-batch-size"] = 32  # all rows of a site
    lines = flashcards.read_text().splitlines(keepends=True)
    other = tmp_path / "cards.jsonl"
    other.write_text("".join([lines[0].replace("Rest, and", "Walk, and"), *lines[1:]]))
    assert other.read_text() != flashcards.read_text()
    first = what_leaves(settings, flashcards)
    same_coins()
    settings = {**settings, "run-directory": str(tmp_path / "second")}
    second = what_leaves(settings, other)
    assert len(first) == 5 * 4
    assert [one.told for one in first] == [one.told for one in second]
    pairs = zip(first, second, strict=True)
    differing = [one.told[0] for one, two in pairs if one.arrays != two.arrays]
    assert differing == ["train.masked"]


def test_the_plan_of_a_masked_run_tells_what_may_be_lost() -> None:
    words = ["plan", "--plain", "--set", "secure-aggregation=masked16", "--sites-per-round", "5"]
    words += ["--set", "train.training-arguments.weight-decay=0.1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "masked16 up" in done.stdout
    assert "1 site of 5 may be lost in a round" in done.stdout
    assert "with weight decay a value may leave it; sites cut such values" in done.stdout
    assert "defence.largest-norm = 0.0: its default 3.0 does not apply" in done.stdout
    assert "the same run with other codecs" not in done.stdout


def test_report_summary_card_and_trackers_do_without_what_nobody_knows(
    played: tuple[Path, list[Message]], tmp_path: Path
) -> None:
    run, _ = played
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert summary_of(run)["status"] == "completed"
    assert summary_of(run)["train_loss"] is None
    html = page.read_text()
    for gone in (
        "Coverage by site",
        "Norm of each client update",
        "Cosine similarity",
        "Training loss:",
    ):
        assert gone not in html
    assert html.count("the server learned their sum, and no figure of a single one") == 2
    assert "Values that sites cut to the range of the sum: 0." in html
    card = (run / summary_of(run)["adapter"] / "README.md").read_text()
    for told in (html, card):
        assert "secure aggregation (beta, unreviewed), masked32; a rehearsal" in told
    assert "| codecs | masked32 up, none down |" in card
    assert "and its held-out loss (rounded, if its policy lets it); message sizes" in card
    logged = figures_of(metrics_of(run)[-1])
    assert not {"train-loss", "coverage", "examples", "tokens"} & logged.keys()
    assert logged["good-replies"] == 4


@pytest.mark.parametrize(
    "rule",
    [
        "ffa",
        *(
            pytest.param(rule, marks=pytest.mark.slow)
            for rule in ("rolora", "fedsvd", "la-lora", "fedadam")
        ),
    ],
)
def test_functions_of_the_mean_get_it(settings: Settings, tmp_path: Path, rule: str) -> None:
    two = {**settings, "num-server-rounds": 2, "strategy.name": rule}
    masked = play({**two, **MASKED, "run-directory": str(tmp_path / "masked")})
    plain = play({**two, **PLAIN, "strategy.name": rule})
    assert furthest(masked, plain) < 1e-5


def test_16_bits_need_half_the_bytes(settings: Settings, tmp_path: Path) -> None:
    one = {**settings, "num-server-rounds": 1}
    coarse = play({**one, **MASKED, "secure-aggregation": "masked16"})
    fine = play({**one, **MASKED, "run-directory": str(tmp_path / "fine")})
    assert 0 < furthest(coarse, fine) < 1e-4
    up = [
        read_json(run / "ledger.json")["totals"]["train.up"]["tensor_bytes"]
        for run in (coarse, fine)
    ]
    assert up[0] < 0.6 * up[1]


@pytest.mark.slow
def test_private_visits_under_masks(settings: Settings) -> None:
    """B alone, by DP-SGD, and summed: the recipe that hides most."""
    private = {
        "num-server-rounds": 1,
        "privacy.unit-guarantee": "example",
        "privacy.noise-multiplier": 1.0,
        "privacy.declared-units": 27,
        "privacy.delta": 1e-3,
    }
    run = play({**settings, **MASKED, **private})
    [_, record] = metrics_of(run)
    assert record["masked-sum"]["weight"] == 4 * 27
    assert all(value > 0 for value in record["epsilon"].values())


def silent(kind: str, partitions: Collection[int]) -> Sites:
    """Return sites of which some crash at one exchange."""

    def crash(message: Message, reply: Message) -> Message:
        raise RuntimeError("disk broke")

    return spoilt(crash, partitions, f"train.{kind}")


@pytest.mark.parametrize(
    ("kind", "survivors"),
    [("keys", 3), ("shares", 3), ("masked", 3), ("confirm", 4), ("unmask", 4)],
)
def test_a_site_that_is_lost_anywhere_costs_at_most_its_own_update(
    settings: Settings, kind: str, survivors: int
) -> None:
    run = play({**settings, **ONE_ROUND}, silent(kind, [2]))
    record = metrics_of(run)[-1]
    assert record["masked-sum"]["sites"] == survivors
    assert list(record["failed"]) == (["2"] if survivors == 3 else [])


def test_a_round_that_lost_too_many_says_who_and_why(settings: Settings) -> None:
    told = r"Round 1: 2 sites sent their masked vectors, .* needs 3\. .*site 1: .*disk broke"
    with pytest.raises(RoundError, match=told):
        play({**settings, **MASKED}, silent("masked", [1, 2]))


def asked_for(kind: str) -> Sites:
    """Return sites that a server asks for another kind of update than the run's."""

    def sites(message: Message, context: Context) -> Message:
        if message.metadata.message_type in ("train", "train.keys"):
            message.metadata.__dict__["_message_type"] = kind
        return GOOD_SITES(message, context)

    return sites


@pytest.mark.parametrize(("kind", "run"), [("train", MASKED), ("train.keys", PLAIN)])
def test_a_downgrade_to_plain_updates_is_refused(
    settings: Settings, kind: str, run: Settings
) -> None:
    with pytest.raises(RoundError, match="and the server asked for another kind"):
        play({**settings, **run}, asked_for(kind))


@pytest.mark.slow
def test_a_resumed_run_goes_on_masked(settings: Settings, tmp_path: Path) -> None:
    """Each process draws fresh keys; the sum does not depend on them."""
    whole = play({**settings, **MASKED, "run-directory": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        play({**settings, **MASKED}, listener=interrupted_at("round", 2))
    resumed = play({**settings, **MASKED, "resume-from": settings["run-directory"]})
    assert adapter_bytes(resumed) == adapter_bytes(whole)


def test_a_masked_run_of_real_sites_does_not_go_back(
    played: tuple[Path, list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory.open(played[0])
    config = recipes.resolve(recipes.load_recipe(played[0] / "config.toml"))
    found = resumption.examine(directory, config, 2)
    assert found is not None
    assert found.has_later  # a rehearsal does: its sites are new in every process
    monkeypatch.setattr(resumption, "are_real", lambda sites: len(sites) == 4)
    with pytest.raises(RunDirectoryError, match=r"cannot go back to round 2: .*--from-adapter"):
        resumption.examine(directory, config, 2)


def test_a_site_without_an_agent_key_refuses_masked_runs(settings: Settings) -> None:
    config = recipes.resolve({**settings, **MASKED})
    with pytest.raises(PolicyError, match=r"needs the agent key and the roster of a site\.toml"):
        policy.check_no_masks(config)
