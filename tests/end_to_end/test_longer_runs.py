"""A run goes on to more rounds than it was started with, after its end or before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from grandrounds import server_app
from grandrounds.api.asked import resolved_run
from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.errors import ApprovalError, PolicyError, RunDirectoryError
from grandrounds.server import resumption
from grandrounds.server.listeners import Listener
from grandrounds.server.listeners.start_rows import recipe_rows
from grandrounds.site.custody.approvals import Approvals, recipe_of
from grandrounds.study.report import one_run
from grandrounds.study.report.read import read_run
from grandrounds.wire.schedule import round_learning_rate
from tests.asking import Asking
from tests.end_to_end.test_resume import outcome
from tests.own_sites import sites_of
from tests.runs import (
    Settings,
    config_of,
    grid_of,
    interrupted_at,
    metrics_of,
    play,
    read_json,
    summary_of,
)
from tests.site.custody.test_custody import grid_of_sites
from tests.site.custody.test_private_visits import budget_of, private_asking


@pytest.fixture(scope="module")
def short(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of two rounds."""
    folder = tmp_path_factory.mktemp("short") / "run"
    steps = {"train.training-arguments.max-steps": 1, "train.save-every-round": 1}
    return play({**federation, **steps, "num-server-rounds": 2, "run-directory": str(folder)})


@pytest.fixture
def run(short: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(short, tmp_path / "run")


def longer(run: Path, rounds: int | None = None, from_round: int | None = None) -> Config:
    settings: Settings = {"num-server-rounds": rounds} if rounds else {}
    return resolved_run(None, settings, run, from_round, {})


def go_on(config: Config, listener: Listener | None = None) -> Path:
    server_app.federate(grid_of(config), config, listener or Listener())
    return Path(config.federation.resume_from)


def rates(run: Path) -> list[float]:
    return [record["learning-rate"] for record in metrics_of(run)[1:]]


def expected(config: Config, *totals: int) -> list[float]:
    """Return the rates of rounds 1, 2, ... in schedules of these totals."""
    high, low = config.train.learning_rate_max, config.train.learning_rate_min
    return [round_learning_rate(n, total, high, low) for n, total in enumerate(totals, 1)]


def test_a_completed_run_goes_on_in_the_schedule_of_its_new_total_and_says_so(run: Path) -> None:
    before, first = metrics_of(run), summary_of(run)
    config = longer(run, 4)
    go_on(config)
    assert metrics_of(run)[:3] == before  # line 0 and two rounds
    assert rates(run) == expected(config, 2, 2, 4, 4)
    summary = summary_of(run)
    assert (summary["status"], summary["rounds"], summary["adapter"]) == ("completed", 4, "peft_4")
    assert summary["earlier_schedules"] == "2/2"
    assert read_json(run / "summary-2.json") == first
    assert config_of(run).federation.length == ("2/2", 4)
    said = "rounds 1 to 2 followed the schedule of 2 rounds"
    assert said in (run / "peft_4" / "README.md").read_text()
    assert said not in (run / "peft_2" / "README.md").read_text()
    assert said in dict(recipe_rows(config_of(run)))["learning rate"]
    assert said in repr(one_run.run_page(read_run(run)))
    with pytest.raises(RunDirectoryError, match=r"nothing to resume.*--resume .* --rounds 8$"):
        go_on(longer(run))


@pytest.mark.parametrize(("event", "count"), [("plan", 1), ("reply", 1), ("round", 1)])
def test_an_extension_that_is_interrupted_resumes_to_the_bit(
    run: Path, tmp_path: Path, short: Path, event: str, count: int
) -> None:
    """Without --rounds: config.toml names both lengths, even before a further round was played."""
    with pytest.raises(KeyboardInterrupt):
        go_on(longer(run, 4), interrupted_at(event, count))
    assert config_of(run).federation.length == ("2/2", 4)
    go_on(longer(run))
    whole = go_on(longer(shutil.copytree(short, tmp_path / "whole"), 4))
    assert outcome(run) == outcome(whole)


def test_a_run_grows_more_than_once_and_goes_back_to_any_schedule(run: Path) -> None:
    go_on(longer(run, 3))
    config = longer(run, 5)
    go_on(config)
    assert rates(run) == expected(config, 2, 2, 3, 5, 5)
    kept = {n: (run / f"peft_{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2)}
    back = longer(run, from_round=1)
    assert resumption.check(back, 1) == []
    resumption.prepare(back, 1)
    go_on(longer(run))
    assert rates(run) == expected(config, 2, 2, 3, 5, 5)
    for number, content in kept.items():
        assert (run / f"peft_{number}" / "adapter_model.safetensors").read_bytes() == content
    other = longer(run, 4, from_round=1)
    assert other.federation.length == ("1/2", 4)
    resumption.prepare(other, 1)
    go_on(longer(run))
    assert rates(run) == expected(config, 2, 4, 4, 4)


def test_an_interrupted_run_can_be_made_longer_or_shorter(
    federation: Settings, tmp_path: Path
) -> None:
    for rounds in (2, 6):
        place = {"run-directory": str(tmp_path / f"{rounds}"), "num-server-rounds": 4}
        with pytest.raises(KeyboardInterrupt):
            play({**federation, **place}, listener=interrupted_at("round", 2))
        run = tmp_path / f"{rounds}"
        config = longer(run, rounds)
        go_on(config)
        assert rates(run) == expected(config, 4, *[rounds] * (rounds - 1))
        assert not list(run.glob("summary-*"))  # it had not come to its end


def test_a_flower_run_takes_its_total_from_the_run_config(run: Path) -> None:
    """As `flwr run . --run-config` gives it: every key, with resume-from and the new total."""
    flat = {**config_of(run).flat(), "resume-from": str(run), "num-server-rounds": 3}
    config = resumption.continued(recipes.resolve(flat), patience_seconds=5)
    assert config.federation.length == ("2/2", 3)
    assert resumption.check(config) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num-server-rounds": 2}, "completed run of 2 rounds; there is nothing to resume"),
        ({"num-server-rounds": 1}, "has played 2 rounds of 2.*give at least --rounds 3"),
        ({"num-server-rounds": 4, "seed": 1}, "another configuration: seed: 42 → 1"),
        ({"num-server-rounds": 4, "earlier-schedules": "1/2"}, "another configuration: num-server"),
    ],
)
def test_a_length_that_the_run_cannot_have_is_refused(
    run: Path, changes: dict[str, Any], why: str
) -> None:
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with pytest.raises(RunDirectoryError, match=why):
        resumption.check(resolved_run(None, changes, run, None, {}))
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_state_that_was_played_in_another_schedule_is_not_taken_for_this_one(run: Path) -> None:
    config = config_of(run)
    flat = {**config.flat(), "num-server-rounds": 4, "earlier-schedules": "1/2"}
    (run / "config.toml").write_text(recipes.to_toml({**flat, "resume-from": ""}))
    with pytest.raises(RunDirectoryError, match="was changed since the run started: num-server"):
        resumption.check(longer(run))


# --- At sites in their own custody ----------------------------------------------------------------


@pytest.mark.usefixtures("by_the_runs_seed")
def test_sites_in_custody_take_a_longer_run_for_the_recipe_that_it_is(
    federation: Settings, tmp_path: Path
) -> None:
    """The changed recipe waits for approval; then the same key and memory go on."""
    settings = {
        **federation,
        "num-server-rounds": 1,
        "run-directory": str(tmp_path / "run"),
        "strategy.connect-timeout-seconds": 0.2,
        "train.training-arguments.max-steps": 1,
    }
    sites = sites_of(settings, tmp_path, policy__require_approval=True)
    known = [Approvals(site.place(site.agent.state)) for site in sites]
    for approvals in known:
        approvals.approve(recipe_of(recipes.resolve(settings)), "")
    play(settings, grid=grid_of_sites(settings, sites))
    config = longer(tmp_path / "run", 3)
    grid = grid_of_sites(config.flat(), sites)
    with pytest.raises(ApprovalError, match="has not approved recipe"):
        server_app.federate(grid, config, Listener())
    config = longer(tmp_path / "run")
    assert config.federation.length == ("1/1", 3)
    [waiting] = known[0].pending()
    assert waiting.values["earlier-schedules"] == "1/1"
    for approvals in known:
        approvals.approve(waiting, "")
    server_app.federate(grid, config, Listener())
    assert rates(tmp_path / "run") == expected(config, 1, 3, 3)


def test_a_site_keeps_to_the_rates_that_it_has_seen(settings: Settings, tmp_path: Path) -> None:
    asks = Asking(sites_of(settings, tmp_path)[0], settings)
    for number in (1, 2):
        asks(number=number)
    asks(number=3, settings={"num-server-rounds": 5, "earlier-schedules": "2/3"})
    for changed in (
        {"num-server-rounds": 6},  # as if rounds 1 and 2 had followed it
        {"num-server-rounds": 6, "earlier-schedules": "1/3"},
        {"num-server-rounds": 6, "earlier-schedules": "3/5"},
        {"num-server-rounds": 3},  # the first configuration, after a round of the second
        {"num-server-rounds": 6, "earlier-schedules": "2/3,3/5", "seed": 1},
    ):
        with pytest.raises(PolicyError, match="has changed since its first visit here"):
            asks(number=4, settings=changed)
    asks(number=4, settings={"num-server-rounds": 6, "earlier-schedules": "2/3,3/5"})
    assert len(asks.visits) == 4


def test_a_private_run_gets_no_visit_beyond_those_reserved(
    settings: Settings, tmp_path: Path
) -> None:
    """Its server refuses to go on; a site refuses a server that goes on all the same."""
    asks = private_asking(settings, tmp_path)
    asks()
    before = budget_of(asks.site)
    more = {"num-server-rounds": 9, "earlier-schedules": "1/3"}
    with pytest.raises(PolicyError, match="has changed since its first visit"):
        asks(number=2, settings=more)
    assert budget_of(asks.site) == before
    asks(number=2)
    asks(number=3)
    with pytest.raises(PolicyError):
        asks(number=4, settings=more)
    assert budget_of(asks.site).runs["ab"].visits == 3


def test_a_private_run_is_not_made_longer(short: Path, tmp_path: Path) -> None:
    run = shutil.copytree(short, tmp_path / "run")
    private = {
        "strategy.name": "ffa",
        "strategy.proximal-mu": 0.0,
        "train.training-arguments.max-grad-norm": 0.0,
        "privacy.unit-guarantee": "example",
        "privacy.noise-multiplier": 4.0,
    }
    config = recipes.resolve({**config_of(run).flat(), **private})
    (run / "config.toml").write_text(recipes.to_toml(config.recipe()))
    for rounds, why in ((4, "has 2 rounds, and not 4. The noise"), (2, "The noise of a private")):
        with pytest.raises(RunDirectoryError, match=why):
            resumption.check(longer(run, rounds))
