"""A site visits only for recipes that its operator approved, if its policy says so."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.config.digest import LEFT_OUT, LEFT_OUT_IF, canonical, recipe_sha256
from grandrounds.config.keys import FIELD_OF_KEY
from grandrounds.engines.deployment import set_up
from grandrounds.engines.deployment.recipes import chosen, deployed
from grandrounds.errors import ApprovalError, ConfigError
from grandrounds.server import roll_call
from grandrounds.site.custody.approvals import MOST_PENDING, Approvals, check_approved, recipe_of
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.summary import lines_of
from tests.own_sites import make_site, sites_of
from tests.places import ROOT
from tests.runs import Settings, config_of, metrics_of, play
from tests.site.custody.test_custody import entries, grid_of_sites

JSL = ROOT / "configs" / "jsl-medllama-3-8b.toml"


@pytest.fixture
def site(tmp_path: Path) -> SiteFile:
    return make_site(tmp_path / "site", {"formulary": ""}, policy__require_approval=True)


def approvals_of(site: SiteFile) -> Approvals:
    return Approvals(site.place(site.agent.state))


def run_cli(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


# --- The hash -------------------------------------------------------------------------------------


def test_the_hash_covers_every_key_but_places_trackers_and_own_data() -> None:
    later = {
        "earlier-schedules": "1/2",
        "model.revision": "v1",
        "data.prompt-template": "chat",
        "data.template-options": '{"enable_thinking": false}',
        "data.system-prompt": "Be brief.",
        "data.train-on": "last",
        "model.lora.use-rslora": True,
        "model.lora.from-adapter-sha256": 64 * "a",
        "model.lora.rank-pattern": '{"q_proj": 4}',
        "model.lora.alpha-pattern": '{"q_proj": 4}',
    }
    private = {
        "privacy.unit-guarantee": "example",
        "privacy.target-epsilon": 4.0,
        "privacy.report-train-loss": True,
    }
    defended = {"defence.preset": "robust"}  # which needs to see honest updates, not their noise
    masked = {"secure-aggregation": "masked32"}  # nor does the server see those
    own = {"train.devices": 2, "personalisation.name": "local-tail", "data.subgroup-columns": "sex"}
    ruled = {"strategy.name": "fedavg", "strategy.outer-nesterov": True, "strategy.ridge": 0.1}
    ruled |= {"strategy.rank-decay": 0.5, "strategy.rank-penalty": 0.5}
    preferred = {"train.objective": "dpo", "train.dpo-beta": 0.5, "train.replay-examples": 0}
    preferred |= {"train.dpo-length-normalised": True, "train.dpo-reference": "received"}
    preferred |= {"static.dataset.name": "formulary-preferences"}
    full = {
        key
        for also in (private, defended, masked, own, ruled, preferred)
        for key in canonical(recipes.resolve({**later, **also, "model.name": "someone/model"}))
    }
    assert full == set(FIELD_OF_KEY) - set(LEFT_OUT)
    of_sections = {key for key in FIELD_OF_KEY if key.startswith(("privacy.", "personalisation."))}
    left_out = {*LEFT_OUT_IF, *of_sections}
    assert set(canonical(recipes.resolve({}))) == full - left_out
    assert set(LEFT_OUT) <= set(FIELD_OF_KEY)


def test_the_text_of_a_template_is_shown_to_who_approves_it(site: SiteFile) -> None:
    text = "Be brief.\u202e\n{{ question }}\n{{ answer }}\n"
    first = recipe_of(recipes.resolve({}))
    recipe = recipe_of(recipes.resolve({"data.prompt-template": text}))
    lines = list(lines_of(recipe, [replace(first, approved="2026-01-01")]))
    name = f"own template {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    assert f"prompt {name}, LoRA" in lines[1]
    assert lines[3:7] == [
        "      | Be brief.\\u202e",
        "      | {{ question }}",
        "      | {{ answer }}",
        "      | ",
    ]
    assert f"data.prompt-template: 'alpaca' → '{name}'" in lines[-1]
    with pytest.raises(ConfigError, match="the place where the answer goes"):
        deployed({"data.prompt-template": "{{ question }}"})


def test_a_recipe_file_has_the_hash_of_its_run_wherever_it_runs(tmp_path: Path) -> None:
    config = deployed(recipes.load_recipe(JSL))
    again = {
        **config.flat(),
        "run-directory": "/srv/first",
        "consortium": "/srv/consortium",
        "train.report-to": "trackio",
        "static.dataset.name": "cards.jsonl",
    }
    assert recipe_sha256(recipes.resolve(again)) == recipe_sha256(config)
    assert recipe_sha256(recipes.resolve(dict(canonical(config)))) == recipe_sha256(config)
    for key, value in (("seed", 43), ("train.learning-rate-max", 2e-5), ("num-server-rounds", 11)):
        assert recipe_sha256(recipes.resolve({**again, key: value})) != recipe_sha256(config)


def test_the_hash_of_a_run_is_that_of_its_directory(settings: Settings, tmp_path: Path) -> None:
    config = recipes.resolve(settings)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(recipes.to_toml(config.recipe()))
    assert recipe_sha256(config_of(folder)) == recipe_sha256(config)


# --- At the site ----------------------------------------------------------------------------------


def test_a_run_waits_for_approval_and_is_then_admitted(settings: Settings, tmp_path: Path) -> None:
    """The server is told in one line; the audit log says since when the recipe is approved."""
    sites = sites_of(settings, tmp_path, policy__require_approval=True)
    short = {**settings, "strategy.connect-timeout-seconds": 0.2}
    with pytest.raises(ApprovalError) as refused:
        play(short, grid=grid_of_sites(short, sites))
    [line] = str(refused.value).splitlines()
    sha256 = recipe_sha256(recipes.resolve(short))
    assert line.startswith("waiting for approval: site 'site' has not approved recipe ")
    assert f"grandrounds site approve {sha256[:12]}" in line
    assert not Path(str(settings["run-directory"])).exists()
    [waiting] = approvals_of(sites[0]).pending()
    assert (waiting.sha256, len(waiting.run)) == (sha256, 16)
    assert {e["outcome"] for e in entries(sites[0])} == {"refused"}
    run_cli("site", "approve", waiting.run, "--config", sites[0].path)
    for site in sites[1:]:
        approvals_of(site).approve(waiting, "")
    run = play(short, grid=grid_of_sites(short, sites))
    assert metrics_of(run)[-1]["round"] == 3
    [answered, *_] = entries(sites[0], outcome="answered")
    assert answered["recipe"] == sha256
    assert answered["approved"].startswith("20")
    assert answered["signed-by"] == ""


def test_a_run_starts_by_itself_once_its_recipe_is_approved(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "APPROVAL_SECONDS", 0.1)
    sites = sites_of(settings, tmp_path, policy__require_approval=True)
    done = threading.Event()

    def operate() -> None:
        while not done.wait(0.05):
            for site in sites:
                for recipe in approvals_of(site).pending():
                    approvals_of(site).approve(recipe, "")

    thread = threading.Thread(target=operate)
    thread.start()
    try:
        run = play(settings, grid=grid_of_sites(settings, sites))
    finally:
        done.set()
        thread.join()
    assert (run / "summary.json").is_file()


def test_without_the_option_the_log_names_the_recipe_all_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    [site] = [make_site(tmp_path, {"formulary": ""})]
    config = recipes.resolve(settings)
    found = check_approved(site, tmp_path / "state", config, "ab")
    assert found == {"recipe": recipe_sha256(config)}
    assert approvals_of(site).all() == []


def test_what_waits_is_listed_once_and_bounded(site: SiteFile) -> None:
    state = site.place("state")
    for seed in (*range(MOST_PENDING), 0, 1):
        with pytest.raises(ApprovalError, match="has not approved recipe"):
            check_approved(site, state, recipes.resolve({"seed": seed}), f"{seed:x}")
    with pytest.raises(ApprovalError, match=f"has {MOST_PENDING} recipes waiting"):
        check_approved(site, state, recipes.resolve({"seed": 99}), "ff")
    assert len(approvals_of(site).pending()) == MOST_PENDING
    approvals_of(site).approve(recipe_of(recipes.resolve({"seed": 99})), "")
    assert "approved" in check_approved(site, state, recipes.resolve({"seed": 99}), "ff")
    assert stat.S_IMODE((state / "recipes").stat().st_mode) == 0o700


def test_a_damaged_file_is_told_and_approves_nothing(site: SiteFile) -> None:
    config = recipes.resolve({})
    approvals_of(site).approve(recipe_of(config), "")
    [file] = (site.place("state") / "recipes").iterdir()
    for text, reason in (("{", "not valid JSON"), ('{"a": 1}', "does not describe a recipe")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            check_approved(site, site.place("state"), config, "ab")


# --- The operator ---------------------------------------------------------------------------------


def test_the_operator_sees_what_a_waiting_run_asks_and_how_it_differs(site: SiteFile) -> None:
    run_cli("site", "approve", JSL, "--set", "model.name=formulary", "--config", site.path)
    other = {"train.training-arguments.max-steps": 8, "model.name": "formulary"}
    changed = deployed(recipes.load_recipe(JSL), other)
    with pytest.raises(ApprovalError):
        check_approved(site, site.place("state"), changed, "ab12")
    told = run_cli("site", "pending", "--config", site.path)
    assert f"recipe {recipe_sha256(changed)}" in told
    assert "asked for by run ab12 at 20" in told
    assert "base formulary, prompt alpaca, LoRA of rank 8 and alpha 32.0 on q_proj,v_proj" in told
    assert "10 rounds of fedprox with 20 sites, learning rate 1e-05 to 1e-06" in told
    assert "visits of 8 steps, 1 x 16 examples a step, at most 512 tokens each" in told
    assert "train.training-arguments.max-steps: 6 → 8" in told
    run_cli("site", "approve", recipe_sha256(changed)[:12], "--config", site.path)
    assert "no recipe waits" in run_cli("site", "pending", "--config", site.path)
    word = recipe_sha256(changed)[:12]
    run_cli("site", "approve", word, "--withdraw", "--config", site.path)
    assert approvals_of(site).find(recipe_sha256(changed)) is None


def test_a_recipe_is_approved_before_any_run_asks(site: SiteFile) -> None:
    """What the policy refuses all the same is told."""
    told = run_cli("site", "approve", JSL, "--config", site.path)
    config = deployed(recipes.load_recipe(JSL))
    assert f"approved: recipe {recipe_sha256(config)}" in told
    assert "warning: The policy of site 'site' forbids this run: it requests the base" in told
    found = check_approved(site, site.place("state"), config, "ab")
    assert found["recipe"] == recipe_sha256(config)


def test_a_word_that_names_no_recipe_is_told_with_those_that_are_known(site: SiteFile) -> None:
    approvals_of(site).approve(recipe_of(recipes.resolve({})), "")
    known = recipe_sha256(recipes.resolve({}))[:12]
    with pytest.raises(ConfigError, match=rf"'beef' names no recipe .* \({known}\)"):
        chosen(site, "beef", {}, site.path)
    with pytest.raises(ConfigError, match="--set has nothing to change"):
        chosen(site, "beef", {"seed": 1}, site.path)


def test_the_key_that_signed_a_recipe_is_in_the_audit_log(site: SiteFile, tmp_path: Path) -> None:
    home = set_up.init_consortium(tmp_path / "trial", "trial", "trial.example.org", 8000)
    file = tmp_path / "jsl.signed.json"
    words: tuple[Any, ...] = ("--out", file, "--dir", home)
    signer = run_cli("consortium", "sign-recipe", JSL, *words).split("signed by ")[1].split(":")
    told = run_cli(
        *("site", "approve", file, "--authority", home / "authority.pub", "--config", site.path)
    )
    assert f"signed by SHA256:{signer[1]}" in told
    config = deployed(recipes.load_recipe(JSL))
    found = check_approved(site, site.place("state"), config, "ab")
    assert found["signed-by"] == f"SHA256:{signer[1]}"


def test_a_recipe_that_was_changed_after_it_was_signed_is_refused(
    site: SiteFile, tmp_path: Path
) -> None:
    home = set_up.init_consortium(tmp_path / "trial", "trial", "trial.example.org", 8000)
    file = tmp_path / "jsl.signed.json"
    run_cli("consortium", "sign-recipe", JSL, "--out", file, "--dir", home)
    whole = json.loads(file.read_text())
    whole["content"]["recipe"]["num-server-rounds"] = 1000
    file.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="is not signed by SHA256:"):
        chosen(site, str(file), {}, home / "authority.pub")
    with pytest.raises(ConfigError, match=r"authority\.pub is missing: give .* --authority"):
        chosen(site, str(file), {}, tmp_path / "authority.pub")


def test_a_site_that_waits_does_not_stop_a_run_that_needs_fewer(
    settings: Settings, tmp_path: Path
) -> None:
    sites = sites_of(settings, tmp_path)
    strict = sites[1]
    text = strict.path.read_text()
    strict.path.write_text(text.replace("require-approval = false", "require-approval = true"))
    some = {
        **settings,
        "strategy.min-sites": 3,
        "strategy.fraction-evaluate": 0.0,
        "strategy.connect-timeout-seconds": 0.1,
    }
    started = time.monotonic()
    run = play(some, grid=grid_of_sites(some, sites))
    assert time.monotonic() - started < 60
    assert "waiting for approval" in metrics_of(run)[0]["refused"]["node 2"]


# --- Damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"values": 5},
        {"values": {"seed": [1]}},
        {"approved": 5},
        {"run": ["ab"]},
        {"sha256": "ab"},
        {"more": ""},
    ],
)
def test_a_file_that_describes_no_recipe_is_told(site: SiteFile, change: dict[str, Any]) -> None:
    kept = approvals_of(site).approve(recipe_of(recipes.resolve({})), "")
    file = site.place("state") / "recipes" / f"{kept.sha256}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match="does not describe a recipe: remove it"):
        approvals_of(site).all()


def test_a_recipe_of_a_version_with_other_keys_is_still_listed(site: SiteFile) -> None:
    """One that lacked a key was a traceback for every recipe that waited."""
    kept = approvals_of(site).approve(recipe_of(recipes.resolve({})), "")
    old = {"approved": "", "values": {"seed": 42, "an-old-key": 1}}
    file = site.place("state") / "recipes" / f"{kept.sha256}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    assert "base not told" in run_cli("site", "pending", "--config", site.path)
    approved = run_cli("site", "approve", kept.sha256, "--config", site.path)
    assert "warning: " in approved
    assert "an-old-key" in approved


def test_a_folder_that_cannot_be_written_is_told(site: SiteFile) -> None:
    approvals = approvals_of(site)
    site.place("state").mkdir(mode=0o700)
    (site.place("state") / "recipes").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: .* as the agent's user"):
        approvals.approve(recipe_of(recipes.resolve({})), "")
