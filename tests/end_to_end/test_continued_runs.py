"""A run goes on from a saved LoRA adapter, in its own recipe and at its own sites."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Message
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.config.digest import recipe_sha256
from grandrounds.engines.deployment.recipes import deployed
from grandrounds.engines.deployment.set_up import with_value
from grandrounds.errors import (
    ApprovalError,
    ConfigError,
    GrandRoundsError,
    ModelError,
    PolicyError,
    RoundError,
    RunDirectoryError,
)
from grandrounds.server import saved_start
from grandrounds.server.guarantees import not_covered
from grandrounds.site.custody.approvals import Approvals, recipe_of
from grandrounds.site.custody.summary import lines_of
from grandrounds.study.comparison import arms
from grandrounds.study.continued import HASH, KEY, check_start, with_start
from grandrounds.study.report import one_run
from grandrounds.study.report.read import read_run
from grandrounds.wire import messages
from grandrounds.wire.adapter import adapter_sha256
from grandrounds.wire.schedule import cohort_of
from tests.end_to_end.test_resume import outcome
from tests.own_sites import sites_of
from tests.runs import (
    GOOD_SITES,
    Settings,
    adapter_bytes,
    config_of,
    interrupted_at,
    metrics_of,
    play,
    read_json,
    summary_of,
)
from tests.site.custody.test_custody import entries, grid_of_sites

SHORT = {"train.training-arguments.max-steps": 1, "train.save-every-round": 1}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def first(federation: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds."""
    place = {"run-directory": str(tmp_path_factory.mktemp("first") / "run")}
    return play({**federation, **SHORT, **place, "num-server-rounds": 2})


@pytest.fixture
def settings(federation: Settings, first: Path, tmp_path: Path) -> Settings:
    """Settings of a run that goes on from it."""
    place = {"run-directory": str(tmp_path / "run"), KEY: str(first)}
    return {**federation, **SHORT, **place, "num-server-rounds": 2}


@pytest.fixture
def adapter(first: Path, tmp_path: Path) -> Path:
    """A copy of its adapter."""
    return shutil.copytree(first / "peft_2", tmp_path / "adapter")


def sha256_of(run: Path, checkpoint: str = "peft_2") -> str:
    return adapter_sha256(load_file(run / checkpoint / WEIGHTS))


RULES: dict[str, Settings] = {
    "fedexp": {},
    "ffa": {"strategy.name": "ffa", "strategy.proximal-mu": 0.0},
    "rolora": {"strategy.name": "rolora"},
    "product": {"strategy.name": "product"},
    "flora": {"strategy.name": "flora"},
    "one array": {"communication.downlink-codec": "float32"},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_run_begins_where_the_adapter_was_and_its_plan_is_its_ledger(
    settings: Settings, first: Path, rule: str
) -> None:
    run = play(settings, **RULES[rule])
    before, after = metrics_of(first), metrics_of(run)
    assert after[0]["held-out-loss"] == pytest.approx(before[-1]["held-out-loss"], rel=1e-6)
    assert after[-1]["held-out-loss"] < after[0]["held-out-loss"] < before[0]["held-out-loss"]
    summary = summary_of(run)
    assert summary["communication_mib"] == summary["planned_mib"]


def test_ffa_keeps_the_a_of_the_adapter(settings: Settings, first: Path) -> None:
    """It is sent with B, since no site can draw it."""
    run = play(settings, **RULES["ffa"])
    start, end = (load_file(folder / "peft_2" / WEIGHTS) for folder in (first, run))
    for name in start:
        assert np.array_equal(start[name], end[name]) == (".lora_A." in name), name


def test_flora_stacks_the_adapter_at_the_bottom(settings: Settings, first: Path) -> None:
    run = play(settings, **RULES["flora"])
    start, end = load_file(first / "peft_2" / WEIGHTS), load_file(run / "peft_1" / WEIGHTS)
    for name, tensor in start.items():
        found = end[name][:4] if ".lora_A." in name else end[name][:, :4]
        assert np.array_equal(tensor, found), name
    assert metrics_of(run)[1]["rank"] == 4 + 2 * 4


def test_whatever_a_run_says_names_the_adapter_and_its_hash(
    settings: Settings, first: Path
) -> None:
    sha256 = sha256_of(first)
    run = play(settings)
    assert config_of(run).lora.from_adapter_sha256 == sha256
    assert read_json(run / "plan.json")["from-adapter"] == {
        "place": "run (local)",
        "sha256": sha256,
    }
    assert read_json(run / "environment.json")["from-adapter-sha256"] == sha256
    card = (run / "peft_2" / "README.md").read_text()
    assert f"| continued from | run (local), sha256 {sha256} |" in card
    assert str(first) not in card
    page = repr(one_run.run_page(read_run(run)))
    assert (
        f"Round 0 is the adapter from which the run goes on (run (local), sha256 {sha256})" in page
    )
    assert "continued from a trained adapter" in summary_of(run)["not_comparable_because"]


def test_a_continued_run_resumes_to_the_bit_without_the_place_of_its_adapter(
    settings: Settings, adapter: Path, tmp_path: Path
) -> None:
    settings = {**settings, KEY: str(adapter), HASH: sha256_of(adapter.parent, "adapter")}
    whole = play(settings, **{"run-directory": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("round", 2))
    shutil.rmtree(adapter)
    play(settings, **{"resume-from": settings["run-directory"]})
    run = Path(settings["run-directory"])
    assert outcome(run) == outcome(whole)


def test_a_damaged_copy_of_the_start_is_not_gone_on_from(settings: Settings, first: Path) -> None:
    settings = {**settings, HASH: sha256_of(first)}
    with pytest.raises(KeyboardInterrupt):
        play(settings, listener=interrupted_at("round", 2))
    file = Path(settings["run-directory"]) / "start.safetensors"
    shutil.copyfile(first / "peft_1" / WEIGHTS, file)
    with pytest.raises(RunDirectoryError, match="is not the adapter with the SHA-256"):
        play(settings, **{"resume-from": settings["run-directory"]})


# --- The adapter ----------------------------------------------------------------------------------


def test_a_run_an_adapter_and_a_pickle_of_it_are_the_same_start(first: Path, adapter: Path) -> None:
    """So is a file in another number format, of the same values."""
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save(
        {n: torch.tensor(t).double() for n, t in tensors.items()}, adapter / "adapter_model.bin"
    )
    places = (str(first), str(first / "peft_2"), str(adapter))
    assert {saved_start.read_start(place).sha256 for place in places} == {sha256_of(first)}
    assert saved_start.read_start(str(first / "peft_1")).sha256 == sha256_of(first, "peft_1")


def test_a_hub_repository_is_read_from_the_cache_at_its_revision(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def cached(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(adapter)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    saved = saved_start.read_start("some-one/adapter@v1")
    assert asked == [("some-one/adapter", "v1")]
    assert saved.spec.rank == 4


def altered(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_tensors(adapter: Path, change: Callable[[str, Any], Any]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({n: change(n, t) for n, t in tensors.items()}, adapter / WEIGHTS)


def not_finite(name: str, tensor: Any) -> Any:
    return np.where(tensor == tensor.max(), np.inf, tensor).astype(np.float32)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "infinite": (lambda a: with_tensors(a, not_finite), "holds values that are not finite"),
    "untrained": (lambda a: with_tensors(a, lambda n, t: t * (".lora_A." in n)), "B is zero"),
    "of another rank": (
        lambda a: altered(a, r=8),
        r"peft-lora-r = 4, and it has 8.*--set model.lora.peft-lora-r=8$",
    ),
    "of another scale": (
        lambda a: altered(a, lora_alpha=16),
        r"peft-lora-alpha = 8.0, and it has 16.0.*--set model.lora.peft-lora-alpha=16$",
    ),
    "rsLoRA": (lambda a: altered(a, use_rslora=True), "--set model.lora.use-rslora=true"),
    "of other modules": (
        lambda a: with_tensors(a, lambda n, t: t[:, :8] if "q_proj.lora_A" in n else t),
        "does not fit the base.*has shape 4 x 8, and the base needs 4 x 32",
    ),
    "no LoRA": (lambda a: altered(a, peft_type="LOHA"), "type LOHA, not LORA. Only LoRA and DoRA"),
    "DoRA": (lambda a: altered(a, use_dora=True), "--set model.lora.peft-use-dora=true"),
    "gone": (lambda a: (a / WEIGHTS).unlink(), "has no adapter"),
    "damaged": (lambda a: (a / WEIGHTS).write_bytes(b"x" * 99), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused_before_any_directory_is_made(
    settings: Settings, adapter: Path, damage: str
) -> None:
    make, why = DAMAGES[damage]
    make(adapter)
    config = recipes.resolve({**settings, KEY: str(adapter)})
    for check in (lambda: check_start(config), lambda: play(settings, **{KEY: str(adapter)})):
        with pytest.raises((ConfigError, ModelError), match=why):
            check()
    assert not Path(settings["run-directory"]).exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({KEY: "/nowhere"}, "there is no such folder"),
        ({KEY: "no-one/nothing@v1"}, "not in the cache, and cannot be downloaded"),
        ({HASH: 64 * "a"}, "has the SHA-256 .* is another adapter"),
        ({HASH: "abc"}, "must be a SHA-256 of 64 hex digits"),
        ({KEY: "", HASH: 64 * "a"}, "is set, but not the adapter"),
        ({"communication.downlink-codec": "int8"}, "downlink-codec = 'int8' changes the adapter"),
        (
            {"strategy.name": "product", "strategy.site-ranks": "4,2"},
            "site-ranks = '4,2' gives some sites a part",
        ),
    ],
)
def test_what_no_run_can_go_on_from_is_refused(
    settings: Settings, changes: Settings, why: str
) -> None:
    with pytest.raises(GrandRoundsError, match=why):
        play(settings, **changes)


def test_an_adapter_decides_what_nobody_has_set(
    first: Path, adapter: Path, tiny_base: Path
) -> None:
    altered(adapter, alpha_pattern={"v_proj": 4})
    layers, notes = with_start([("--from-adapter", {KEY: str(adapter)}), ("--set", {"seed": 1})])
    settings = recipes.merged(layers)
    assert settings["model.name"] == str(tiny_base)
    assert settings["model.lora.target-modules"] == "q_proj,v_proj"
    assert settings[HASH] == sha256_of(first)
    [note] = notes
    assert "model.lora.peft-lora-r = 4, model.lora.peft-lora-alpha = 8.0" in note
    config = recipes.resolve(settings)
    assert config.lora.alphas_by_pattern == {"v_proj": 4}
    assert check_start(config) == []
    layers, _ = with_start([("--set", {KEY: str(adapter), "model.lora.peft-lora-r": 2})])
    with pytest.raises(ConfigError, match=r"--set model\.lora\.peft-lora-r=4"):
        check_start(recipes.resolve(recipes.merged(layers)))
    altered(adapter, base_model_name_or_path="some-one/else")
    other = recipes.resolve({**settings, HASH: "", "seed": 2})
    [warning] = check_start(other)
    assert "names the base 'some-one/else'" in warning
    chat = {**settings, KEY: str(first), "model.lora.alpha-pattern": ""}
    [warning] = check_start(recipes.resolve({**chat, "data.prompt-template": "chat"}))
    assert warning.endswith("the adapter was trained with data.prompt-template = 'alpaca'")


def test_the_command_plans_and_tells_what_it_goes_on_from(
    first: Path, flashcards: Path, tmp_path: Path
) -> None:
    data = ["--data", str(flashcards), "--sites", "4", "--from-adapter", str(first)]
    said = CliRunner().invoke(app, ["plan", *data, "--json", str(tmp_path / "plan.json")])
    assert said.exit_code == 0, said.output
    sha256 = sha256_of(first)
    assert sha256 in said.output
    assert read_json(tmp_path / "plan.json")["from-adapter"]["sha256"] == sha256
    with pytest.raises(ConfigError, match="without its hash, which is what sites approve"):
        deployed({KEY: str(first)})


def test_an_arm_starts_from_the_adapter_and_the_base_row_does_not(settings: Settings) -> None:
    config = recipes.resolve(settings)
    for start in ("base", "centralised"):
        kind = {"base": True, "centralised": False}[start]
        resident = arms._start(config, untrained=kind)
        moved = any(bool(p.any()) for n, p in resident.parameters.items() if ".lora_B." in n)
        assert moved is not kind


@pytest.mark.usefixtures("by_the_runs_seed")
def test_a_dora_adapter_goes_on_with_its_magnitudes(
    settings: Settings, first: Path, tmp_path: Path
) -> None:
    """No site is asked for those of the base; sites in custody have the start by its hash."""
    dora = {**settings, KEY: "", "model.lora.peft-use-dora": True, "num-server-rounds": 1}
    before = play(dora, **{"run-directory": str(tmp_path / "dora")})
    again = {**settings, **dora, KEY: str(before), "num-server-rounds": 2}
    again[HASH] = sha256_of(before, "peft_1")
    plain = play(again)
    losses = [metrics_of(run)[i]["held-out-loss"] for run, i in ((before, -1), (plain, 0))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert summary_of(plain)["communication_mib"] == summary_of(plain)["planned_mib"]
    own = {**again, "run-directory": str(tmp_path / "own"), "strategy.fraction-evaluate": 0.25}
    sites = sites_of(own, tmp_path)
    approve(sites, own)
    run = play(own, grid=grid_of_sites(own, sites))
    assert adapter_bytes(run) == adapter_bytes(plain)
    assert summary_of(run)["communication_mib"] == summary_of(run)["planned_mib"]


# --- At sites in their own custody ----------------------------------------------------------------


def approve(sites: list[Any], settings: Settings) -> None:
    for site in sites:
        approvals = Approvals(site.place(site.agent.state))
        approvals.approve(recipe_of(recipes.resolve(settings)), "")


@pytest.mark.usefixtures("by_the_runs_seed")
@pytest.mark.parametrize("rule", ["fedexp", "ffa", "product", "one array"])
def test_sites_in_custody_learn_the_same_from_an_adapter_that_was_approved(
    settings: Settings, first: Path, tmp_path: Path, rule: str
) -> None:
    """Half of them first see the run after its first round: the start comes beside the adapter."""
    changes = {**RULES[rule], HASH: sha256_of(first), "strategy.fraction-evaluate": 0.25}
    plain = play({**settings, **changes})
    own = {**settings, **changes, "run-directory": str(tmp_path / "own")}
    sites = sites_of(own, tmp_path)
    approve(sites, own)
    run = play(own, grid=grid_of_sites(own, sites))
    assert adapter_bytes(run) == adapter_bytes(plain)
    assert summary_of(run)["failed_replies"] == 0
    assert summary_of(run)["communication_mib"] == summary_of(run)["planned_mib"]


def test_a_site_goes_on_from_no_adapter_that_its_operator_has_not_approved(
    settings: Settings, first: Path, tmp_path: Path
) -> None:
    """Not even where the policy asks for no approvals; another adapter is another recipe."""
    short = {**settings, "strategy.connect-timeout-seconds": 0.2, HASH: sha256_of(first)}
    sites = sites_of(short, tmp_path)
    with pytest.raises(ApprovalError, match="has not approved recipe"):
        play(short, grid=grid_of_sites(short, sites))
    [waiting] = Approvals(sites[0].place("state")).pending()
    assert f"    goes on from a saved adapter, SHA-256 {sha256_of(first)}" in lines_of(waiting, [])
    approve(sites, short)
    other = {**short, KEY: str(first / "peft_1"), HASH: sha256_of(first, "peft_1")}
    with pytest.raises(ApprovalError, match="has not approved recipe"):
        play(other, grid=grid_of_sites(other, sites))
    with pytest.raises(PolicyError, match="from a saved adapter without its hash"):
        play({**short, HASH: ""}, grid=grid_of_sites({**short, HASH: ""}, sites))
    fresh = recipes.resolve({**short, KEY: "", HASH: ""})
    assert recipe_sha256(fresh) != waiting.sha256


def test_a_site_that_keeps_its_loss_gets_the_start_with_its_first_visit(
    settings: Settings, first: Path, tmp_path: Path
) -> None:
    """It does not look at the adapter of an evaluation, so that answering one keeps no start."""
    own = {**settings, HASH: sha256_of(first), "strategy.fraction-evaluate": 1.0}
    sites = sites_of(own, tmp_path)
    approve(sites, own)
    [late, *_] = cohort_of(recipes.resolve(own), 2)
    file = sites[late].path
    file.write_text(with_value(file.read_text(), "policy", "report-held-out-loss", False))
    run = play(own, grid=grid_of_sites(own, sites))
    assert summary_of(run)["failed_replies"] == 0
    assert metrics_of(run)[0]["held-out-losses"].keys() == {"0", "1", "2", "3"} - {str(late)}


def made_up(change: Callable[[str, Any], Any], record: str, number: int) -> Callable[..., Message]:
    """Return sites to which a server sends other tensors in a round than it says."""

    def sites(message: Message, context: Context) -> Message:
        said = messages.instruction_of(message.content)
        arrays = message.content.array_records.get(record)
        if message.metadata.message_type == "train" and said["round"] == number and arrays:
            for name in arrays:
                arrays[name] = Array(change(name, arrays[name].numpy()))
        return GOOD_SITES(message, context)

    return sites


def slices(name: str, tensor: Any) -> Any:
    return np.eye(*tensor.shape, dtype=np.float32) if ".lora_A." in name else tensor * 0


def scaled(name: str, tensor: Any) -> Any:
    return (tensor * 1.5).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "record", "number", "why"),
    [
        (slices, messages.ARRAYS, 1, "SHA-256 .* and the server sent one with"),
        (scaled, messages.ARRAYS, 1, "SHA-256 .* and the server sent one with"),
        (scaled, messages.START, 2, "SHA-256 .* and the server sent one with"),
        (scaled, messages.ARRAYS, 2, "differs by .* from the run's start"),
        (slices, messages.ARRAYS, 2, "its B is zero"),
    ],
)
def test_a_server_that_goes_on_from_another_adapter_is_refused(
    settings: Settings, first: Path, tmp_path: Path, change: Any, record: str, number: int, why: str
) -> None:
    low = {"train.learning-rate-max": 1e-5, "train.learning-rate-min": 1e-6}
    own = {**settings, **low, HASH: sha256_of(first), "strategy.fraction-evaluate": 0.25}
    sites = sites_of(own, tmp_path)
    approve(sites, own)
    with pytest.raises(RoundError):
        play(own, grid=grid_of_sites(own, sites, made_up(change, record, number)))
    reasons = [line["reason"] for site in sites for line in entries(site, outcome="refused")]

    assert [reason for reason in reasons if re.search(why, reason)] == reasons != []


def test_a_site_that_got_no_start_takes_no_trained_adapter(
    settings: Settings, first: Path, tmp_path: Path
) -> None:
    own = {**settings, HASH: sha256_of(first), "strategy.fraction-evaluate": 0.25}
    sites = sites_of(own, tmp_path)
    approve(sites, own)

    def without(message: Message, context: Context) -> Message:
        message.content.pop(messages.START, None)
        return GOOD_SITES(message, context)

    with pytest.raises(RoundError, match="has not sent to this site"):
        play(own, grid=grid_of_sites(own, sites, without))


def test_what_an_adapter_had_learned_is_outside_of_a_guarantee() -> None:
    section = {"unit": "example", "continued_from": 64 * "a", "mode": "enforced"}
    assert any("from which the run went on" in line for line in not_covered(section))
