"""A site answers under its own policy, with its own data, and writes down what left it."""

from __future__ import annotations

import json
import re
import shutil
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, MessageType

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.engines.deployment import admissions, set_up
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import (
    EngineError,
    GrandRoundsError,
    ModelError,
    OwnDataError,
    PolicyError,
    ReplyError,
    RoundError,
)
from grandrounds.server import introductions
from grandrounds.server.listeners.plain import PlainReporter
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import audit, kept_runs, quota
from grandrounds.site.custody.node import SITE
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.wire import messages
from tests.own_sites import sites_of
from tests.runs import GOOD_SITES, Settings, Sites, adapter_bytes, grid_of, metrics_of, play


def grid_of_sites(
    settings: Settings,
    sites: list[SiteFile],
    app: Sites = GOOD_SITES,
) -> InProcessGrid:
    """Return a grid whose nodes name the site.toml of their site."""
    nodes = [
        {
            "partition-id": site.node.partition_id,
            "num-partitions": site.node.num_partitions,
            SITE: str(site.path),
        }
        for site in sites
    ]
    return grid_of(recipes.resolve(settings), app, nodes)


def entries(site: SiteFile, **wanted: Any) -> list[dict[str, Any]]:
    """Return the lines of a site's audit log with these values."""
    lines = audit.read(site.place(site.agent.state))
    return [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]


@pytest.mark.usefixtures("by_the_runs_seed")
def test_sites_with_the_same_rows_learn_the_same_bit_for_bit(
    settings: Settings, tmp_path: Path
) -> None:
    plain = adapter_bytes(play(settings))
    sites = sites_of(settings, tmp_path)
    own = {**settings, "run-directory": str(tmp_path / "own")}
    assert adapter_bytes(play(own, grid=grid_of_sites(own, sites))) == plain


def test_the_audit_log_says_what_was_asked_and_what_left(
    settings: Settings, tmp_path: Path
) -> None:
    sites = sites_of(settings, tmp_path)
    run = play(settings, grid=grid_of_sites(settings, sites))
    metrics = metrics_of(run)
    norms = {
        (m["round"], int(p)): norm for m in metrics for p, norm in m.get("update-norms", {}).items()
    }
    seen = 0
    for p, site in enumerate(sites):
        assert len(entries(site, asked="query", outcome="answered")) == 1
        for line in entries(site, asked="train"):
            assert line["outcome"] == "answered"
            assert line["left"]["norm"] == pytest.approx(norms[line["round"], p], rel=1e-5)
            assert line["left"]["tensors"] == 8
            assert line["left"]["bytes"] == line["bytes-in"] > 0
            assert line["target-modules"] == ["q_proj", "v_proj"]
            assert (line["rank"], line["steps"]) == (4, 2)
            assert line["base"] == settings["model.name"]
            seen += 1
        log = site.place(site.agent.state) / audit.FILE
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert "What helps patient" not in log.read_text()  # no text of the data
    assert seen == 3 * 2


def test_the_roll_call_tells_the_name_and_the_hash_of_the_base(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All four call themselves `site`; where there is an admission, its name counts. What the run
    prints and writes on its card is of the sites' own data."""
    sites = sites_of(settings, tmp_path)
    consortium = tmp_path / "consortium"
    (consortium / "admissions").mkdir(parents=True)
    (consortium / "consortium.json").write_text("{}")
    admission = {"content": {"partition-id": 2, "name": "st-elsewhere"}}
    (consortium / "admissions" / "st-elsewhere.json").write_text(json.dumps(admission))
    reporter = PlainReporter(recipes.resolve(settings))
    grid = grid_of_sites(settings, sites)
    run = play(settings, grid=grid, listener=reporter, consortium=str(consortium))
    told = json.loads((run / "sites.json").read_text())
    assert [fact["name"] for fact in told] == ["site", "site", "st-elsewhere", "site"]
    [content] = {fact["base-content"] for fact in told}
    assert len(content) == 64
    said = capsys.readouterr().out
    assert re.search(r"data +each site's own, 4 sites\n", said)
    assert "site (site 0), site (site 1), st-elsewhere, site (site 3)" in said
    assert "leaderboard" not in said
    assert "iid" not in said
    assert "--rounds 6 --engine deployment --connection NAME" in said
    card = (run / "peft_3" / "README.md").read_text()
    assert "| data | each site's own, 4 sites |" in card
    assert "st-elsewhere" not in card  # a card may be published
    assert "eaderboard" not in card


FORBIDDEN: dict[str, tuple[Settings, dict[str, Any], str]] = {
    "base": ({}, {"bases": {"another": ""}}, "its bases? .*another|requests the base"),
    "prompt": ({}, {"policy__prompt_templates": "chat"}, "prompt-templates = 'chat'.*'alpaca'"),
    "targets": (
        {"model.lora.target-modules": "q_proj,o_proj"},
        {"policy__target_modules": "q_proj,v_proj"},
        "target-modules = .*requested o_proj",
    ),
    "rank": ({"model.lora.peft-lora-r": 8}, {"policy__max_rank": 4}, "max-rank = 4, requested 8"),
    "steps": (
        {"train.training-arguments.max-steps": 9},
        {"policy__max_steps_per_visit": 8},
        "max-steps-per-visit = 8, requested 9",
    ),
    "epochs": (
        {"train.training-arguments.max-steps": -1},
        {"policy__max_steps_per_visit": 8},
        "max-steps-per-visit = 8, requested",
    ),
    "examples": ({}, {"policy__min_examples": 1000}, "min-examples = 1000, the site has"),
    "one example": (
        {
            "train.training-arguments.max-steps": 1,
            "train.training-arguments.per-device-train-batch-size": 1,
        },
        {"policy__min_examples_per_visit": 32},
        "min-examples-per-visit = 32, requested 1",
    ),
    "batch": (
        {"train.training-arguments.per-device-train-batch-size": 2**40},
        {"policy__max_batch": 64, "policy__max_examples_per_visit": 2**50},
        f"max-batch = 64, requested {2**40}",
    ),
    "flora's stack": (
        {"strategy.name": "flora", "strategy.proximal-mu": 0.0},
        {"policy__max_rank": 16},
        "max-rank = 16, requested 20",
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_the_policy_forbids_is_refused_before_anybody_trains(
    settings: Settings, tmp_path: Path, what: str
) -> None:
    asked, policy, reason = FORBIDDEN[what]
    asking = {**settings, **asked}
    bases = policy.pop("bases", None) if "bases" in policy else None
    sites = sites_of(asking, tmp_path, **policy)
    if bases:
        for site in sites:
            text = site.path.read_text().replace(json.dumps(settings["model.name"]), '"another"', 1)
            site.path.write_text(text)
    with pytest.raises(PolicyError, match=reason) as caught:
        play(asking, grid=grid_of_sites(asking, sites))
    assert "The policy of site 'site' forbids this run" in str(caught.value)
    refused = [line for site in sites for line in entries(site, outcome="refused")]
    assert refused
    assert all(line["reason"] in str(caught.value) for line in refused[:1])
    assert not [line for site in sites for line in entries(site, asked="train")]
    assert not Path(str(settings["run-directory"])).exists()


def test_a_run_on_preferences_is_refused_by_a_site_with_a_policy(
    settings: Settings, tmp_path: Path
) -> None:
    """The site holds cards; the run does not get so far as to ask for both answers."""
    asking = {**settings, "train.objective": "dpo"}
    sites = sites_of(settings, tmp_path)
    with pytest.raises(PolicyError, match="a site with a policy of its own trains on answers only"):
        play(asking, grid=grid_of_sites(asking, sites))
    assert not [line for site in sites for line in entries(site, asked="train")]


def test_a_base_with_other_files_is_refused_with_both_hashes(
    settings: Settings, tmp_path: Path
) -> None:
    sites = sites_of(settings, tmp_path)
    for site in sites:
        site.path.write_text(site.path.read_text() + f'sha256 = "{"ab" * 32}"\n')
    with pytest.raises(PolicyError, match=rf"sha256 = {'ab' * 32}, but the files in .* have"):
        play(settings, grid=grid_of_sites(settings, sites))


def test_more_visits_than_allowed_in_a_day_are_refused_and_the_round_is_told(
    settings: Settings, tmp_path: Path
) -> None:
    sites = sites_of(settings, tmp_path, policy__max_visits_per_day=1)
    with pytest.raises(RoundError, match="max-visits-per-day = 1, but there were 1"):
        play(settings, grid=grid_of_sites(settings, sites))
    assert max(len(entries(s, asked="train", outcome="answered")) for s in sites) == 1


@pytest.mark.usefixtures("by_the_runs_seed")
def test_a_site_that_reports_no_loss_holds_out_all_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    sites = sites_of(settings, tmp_path)
    told = play(settings, grid=grid_of_sites(settings, sites))
    silent = sites_of(settings, tmp_path / "silent")
    for site in silent:
        text = site.path.read_text()
        site.path.write_text(
            text.replace("report-held-out-loss = true", "report-held-out-loss = false")
        )
    quiet = {
        **settings,
        "run-directory": str(tmp_path / "quiet"),
        "strategy.fraction-evaluate": 0.0,
    }
    kept = play(quiet, grid=grid_of_sites(quiet, silent))
    facts = json.loads((kept / "sites.json").read_text())
    before = json.loads((told / "sites.json").read_text())
    assert not any("held-out-examples" in f for f in facts)
    assert [f["train-examples"] for f in facts] == [f["train-examples"] for f in before]
    assert adapter_bytes(kept) == adapter_bytes(told)


def test_one_site_that_forbids_a_run_does_not_stop_the_others_where_some_suffice(
    settings: Settings, tmp_path: Path
) -> None:
    sites = sites_of(settings, tmp_path)
    strict = sites[1]
    strict.path.write_text(strict.path.read_text().replace("max-rank = 64", "max-rank = 1"))
    some = {**settings, "strategy.min-sites": 3, "strategy.fraction-evaluate": 0.0}
    run = play(some, grid=grid_of_sites(some, sites))
    metrics = metrics_of(run)
    assert "max-rank = 1" in metrics[0]["refused"]["node 2"]
    assert not [m for m in metrics[1:] if 1 in m["good"]]
    drawn = [m for m in metrics[1:] if 1 in m["cohort"]]
    assert all(m["failed"]["1"] == "not connected" for m in drawn)


@pytest.mark.usefixtures("by_the_runs_seed")
def test_what_is_remembered_of_a_run_survives_the_process(
    settings: Settings, tmp_path: Path
) -> None:
    """Error memories of a codec: with a new context for each message, as Flower gives one, the run
    is the same as with one that is kept."""
    lossy = {**settings, "communication.uplink-codec": "int4", "num-server-rounds": 3}
    sites = sites_of(lossy, tmp_path)
    grid = grid_of_sites(lossy, sites)

    def forgetful(message: Message, context: Context) -> Message:
        context.state.clear()
        return client_app.app(message, context)

    plain = adapter_bytes(play(lossy))
    own = {**lossy, "run-directory": str(tmp_path / "own")}
    grid = grid_of_sites(own, sites, forgetful)
    assert adapter_bytes(play(own, grid=grid)) == plain
    [run] = {line["run"] for site in sites for line in entries(site)}
    with closing(SiteState(sites[0].place("state"))) as state:
        assert kept_runs.load(state, run).array_records
        assert not kept_runs.load(state, "0123").array_records


def test_a_message_without_a_runs_key_is_refused(settings: Settings, tmp_path: Path) -> None:
    sites = sites_of(settings, tmp_path)
    grid = grid_of_sites(settings, sites)
    for key in ("", "../../etc", "Z" * 4, "a" * 33):
        message = Message(messages.content(config={"round": 0, "run": key}), 1, MessageType.QUERY)
        [reply] = grid.send_and_receive([message])
        with pytest.raises(ReplyError, match="not a key of up to 32 hex digits"):
            messages.raise_failure(reply)
    assert introductions.questions([1], "0")[1].content.config_records["config"]["run"] == "0"


def test_neither_server_nor_journal_learns_anything_of_data_that_cannot_be_read(
    settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is wrong may quote a row: 97ce3f5 wrote it into the audit log."""
    sites = sites_of(settings, tmp_path)
    with (sites[1].path.parent / "cards.jsonl").open("a") as file:
        file.write("Jane Roe, born 1961, asked\n")
    with pytest.raises(OwnDataError) as refused:
        play(settings, grid=grid_of_sites(settings, sites))
    assert "of site 'site' cannot be used: grandrounds site check says why" in str(refused.value)
    [entry] = entries(sites[1], outcome="failed")
    assert entry["error"] == "DataError from JSONDecodeError"
    assert entry["where"][0].startswith("files.py:")
    assert "Jane" not in f"{refused.value} {entry} {capfd.readouterr()}"


def test_the_server_learns_of_no_folder_of_the_site(settings: Settings, tmp_path: Path) -> None:
    """It is told their names, the audit log where they are."""
    shares = {"strategy.fraction-train": 1.0, "strategy.fraction-evaluate": 0.0}
    settings = {**settings, **shares, "data.num-partitions": 1}
    [site] = sites_of(settings, tmp_path)
    name, folder = str(settings["model.name"]), site.path.parent
    gone = json.dumps(str(tmp_path / "gone"))
    text = site.path.read_text().replace(f"path = {json.dumps(name)}", f"path = {gone}")
    for content, told in (
        (text, f"the base {name!r} is not a base model"),
        ("[", "the site's folder/site.toml is not valid TOML"),
    ):
        site.path.write_text(content)
        [reply] = grid_of_sites(settings, [site]).send_and_receive(
            [introductions.questions([1], "ab")[1]]
        )
        with pytest.raises(GrandRoundsError) as refused:
            messages.raise_failure(reply)
        assert told in str(refused.value)
        assert str(tmp_path) not in str(refused.value)
    [entry] = [e for e in audit.read(folder / "state") if e["outcome"] == "failed"]
    assert str(tmp_path / "gone") in entry["reason"]


def test_a_run_takes_no_other_node_for_an_admitted_site(settings: Settings, tmp_path: Path) -> None:
    """In the grid here site 0 is node 1."""
    folder = set_up.init_consortium(tmp_path / "consortium", "trial", "trial.example.org", 8000)
    asks = set_up.init_site(tmp_path / "asks", "st-elsewhere")
    admission = admissions.admit(folder, asks / "request.json", 0, 4)
    settings = {**settings, "consortium": str(folder)}
    admissions.note_node(admission, 77)
    with pytest.raises(EngineError, match="be site 0, which was admitted as node 77"):
        play(settings)
    admissions.note_node(admission, 1)
    assert (play(settings) / "summary.json").is_file()


def test_what_a_run_says_itself_does_not_change_with_what_it_guesses() -> None:
    places = {"/srv/site": "the site's folder", "/srv/site/state": "the agent's state"}
    asked = "/srv/site/x is no base; /srv/site/state/a, /srv/site/b"
    told = custody.without_places(asked, places, ["/srv/site/x", "alpaca"])
    assert told == "/srv/site/x is no base; the agent's state/a, the site's folder/b"


def test_a_base_whose_files_change_under_the_agent_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    """What it told the server, and compared with site.toml, would not be what it trains on."""
    settings = {**settings, "data.num-partitions": 1}
    shares = {"strategy.fraction-train": 1.0, "strategy.fraction-evaluate": 0.0}
    settings = {**settings, **shares}
    copy = tmp_path / "copy"
    shutil.copytree(str(settings["model.name"]), copy)
    [site] = sites_of({**settings, "model.name": str(copy)}, tmp_path)
    grid = grid_of_sites({**settings, "model.name": str(copy)}, [site])
    [reply] = grid.send_and_receive([introductions.questions([1], "ab")[1]])
    messages.raise_failure(reply)
    with (copy / "generation_config.json").open("a") as file:
        file.write("\n")
    [reply] = grid.send_and_receive([introductions.questions([1], "ab")[1]])
    with pytest.raises(ModelError, match=r"have changed since .* Restart the agent"):
        messages.raise_failure(reply)


def test_roll_calls_of_runs_that_never_visit_are_bounded(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in progress has a number of its own: the others cannot use it up."""
    sites = sites_of(settings, tmp_path)
    grid = grid_of_sites(settings, sites)
    monkeypatch.setattr(quota, "MOST_QUESTIONS_OF_OTHERS", 3)
    replies = [
        grid.send_and_receive([introductions.questions([1], f"{i:x}f")[1]])[0] for i in range(4)
    ]
    for reply in replies[:3]:
        messages.raise_failure(reply)
    with pytest.raises(PolicyError, match="at most 3 roll calls in 24 hours of runs that have not"):
        messages.raise_failure(replies[3])
    with closing(SiteState(sites[0].place("state"))) as state:
        quota.count_visit(state, "ab", 1)
    [reply] = grid.send_and_receive([introductions.questions([1], "ab")[1]])
    messages.raise_failure(reply)


@pytest.mark.parametrize("with_text", [False, True])
def test_a_crash_is_written_down_and_server_and_journal_learn_its_kind_only(
    settings: Settings,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    with_text: bool,
) -> None:
    """97ce3f5 logged a traceback with the text to stderr, and so to the journal."""
    sites = sites_of(settings, tmp_path, agent__log_errors_with_text=with_text)
    grid = grid_of_sites(settings, sites)
    message = introductions.questions([1], "ab")[1]

    def crash(*_: Any) -> Message:
        raise ZeroDivisionError("Jane Roe by zero")

    context = grid._contexts[1]
    reply = custody.answer(sites[0].path, message, context, crash)
    assert "crashed (ZeroDivisionError); its own log says where" in str(reply.error.reason)
    [line] = entries(sites[0])
    assert (line["outcome"], line["error"]) == ("crashed", "ZeroDivisionError")
    assert re.fullmatch(r"test_custody.py:\d+ crash", line["where"][0])
    assert ("Jane" in str(line)) == with_text
    assert "Jane" not in f"{reply.error.reason} {capfd.readouterr()} {caplog.text}"
