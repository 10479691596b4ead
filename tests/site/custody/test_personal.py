"""A site's personal adapter stays in its state, and comes out for the site alone."""

from __future__ import annotations

import stat
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from safetensors.numpy import load_file

from grandrounds import client_app
from grandrounds.config import recipes
from grandrounds.errors import ConfigError, RunDirectoryError
from grandrounds.server.directory import RunDirectory
from grandrounds.server.resumption import examine
from grandrounds.site import personal_files
from grandrounds.site.custody import kept_runs, own_adapter
from grandrounds.site.custody.site_file import SiteFile
from grandrounds.site.custody.state import SiteState
from grandrounds.wire import messages
from grandrounds.wire.personal import FEDERATED_LOSS, PERSONAL
from grandrounds.wire.told import HELD_OUT_LOSS
from tests.own_sites import sites_of
from tests.runs import Settings, play, summary_of
from tests.site.custody.test_custody import entries, grid_of_sites

HOW: Settings = {
    "personalisation.name": "interpolate",
    "personalisation.steps": 3,
    "personalisation.learning-rate": 0.01,
}


def kept_at(site: SiteFile) -> tuple[str, dict[str, np.ndarray]]:
    """Return the run that a site keeps, and its personal adapter, read anew from the disk."""
    with closing(SiteState(site.place(site.agent.state))) as state:
        (run,) = [one.run for one in kept_runs.listed(state)]
        found = personal_files.kept(kept_runs.load(state, run))
    assert found is not None
    return run, {name: np.array(tensor) for name, tensor in found[0].items()}


def test_it_stays_in_the_state_folder_and_only_rounded_figures_leave(
    settings: Settings, tmp_path: Path
) -> None:
    left: list[Message] = []

    def watched(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if message.metadata.message_type == PERSONAL:
            left.append(reply)
        return reply

    own = {**settings, **HOW}
    sites = sites_of(own, tmp_path / "sites")
    run = play(own, grid=grid_of_sites(own, sites, watched))
    assert len(left) == len(sites)
    for reply in left:
        assert not reply.content.array_records
        told = reply.content.metric_records[messages.METRICS]
        assert set(told) == {HELD_OUT_LOSS, FEDERATED_LOSS, "num-examples"}
        assert all(round(float(told[n]), 2) == told[n] for n in (HELD_OUT_LOSS, FEDERATED_LOSS))
    adapters = [kept_at(site)[1] for site in sites]
    name = next(name for name in adapters[0] if name.endswith("lora_A.weight"))
    assert len(adapters[0][name]) == 2 * recipes.resolve(own).lora.peft_lora_r
    assert not np.array_equal(adapters[0][name], adapters[1][name])
    for file in (sites[0].place(sites[0].agent.state) / "states").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not (run / "sites").exists()
    assert len(summary_of(run)["personal"]["sites"]) == len(sites)
    (line,) = entries(sites[0], asked=PERSONAL)
    assert line["left"]["tensors"] == 0
    assert {"nll-sum", "weight", "steps"} <= set(line["kept"])


@pytest.mark.usefixtures("by_the_runs_seed")
@pytest.mark.parametrize("name", ["local-tail", "shared-a", "dual"])
def test_agents_whose_state_is_read_anew_at_each_message_make_the_adapters_of_a_rehearsal(
    settings: Settings, tmp_path: Path, name: str
) -> None:
    own = {**settings, **HOW, "personalisation.name": name}
    rehearsal = play({**own, "run-directory": str(tmp_path / "rehearsal")})
    sites = sites_of(own, tmp_path / "sites")
    play(own, grid=grid_of_sites(own, sites))
    for number, site in enumerate(sites):
        folder = rehearsal / "sites" / f"site-{number}"
        expected = load_file(folder / "adapter_model.safetensors")
        _, adapter = kept_at(site)
        assert adapter.keys() == expected.keys()
        for tensor in expected:
            np.testing.assert_array_equal(adapter[tensor], expected[tensor])


def test_the_same_request_again_leaves_the_same_adapter(settings: Settings, tmp_path: Path) -> None:
    twice: list[tuple[Message, Message]] = []

    def asked_twice(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        if message.metadata.message_type == PERSONAL:
            twice.append((reply, client_app.app(message, context)))
        return reply

    own = {**settings, **HOW}
    sites = sites_of(own, tmp_path / "sites")
    play(own, grid=grid_of_sites(own, sites, asked_twice))
    first, again = twice[0]
    metrics = (messages.metrics_of(reply) for reply in (first, again))
    assert next(metrics) == next(metrics)
    assert len(entries(sites[0], asked=PERSONAL, outcome="answered again")) == 1


def test_export_writes_what_the_site_keeps(settings: Settings, tmp_path: Path) -> None:
    own = {**settings, **HOW}
    site, *_ = sites = sites_of(own, tmp_path / "sites")
    play(own, grid=grid_of_sites(own, sites))
    run, adapter = kept_at(site)
    with closing(SiteState(site.place(site.agent.state))) as state:
        facts = own_adapter.export(site, state, "", tmp_path / "mine")
        assert facts["run"] == run
        with pytest.raises(ConfigError, match="keeps nothing of run 'zz'"):
            own_adapter.export(site, state, "zz", tmp_path / "other")
        with pytest.raises(RunDirectoryError, match="Choose another folder"):
            own_adapter.export(site, state, "", site.path / "mine")
    mine = tmp_path / "mine"
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in mine.iterdir()} == {0o600}
    written = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert written.keys() == adapter.keys()
    for name, tensor in adapter.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_a_site_whose_policy_keeps_losses_chooses_and_tells_none(
    settings: Settings, tmp_path: Path
) -> None:
    own = {**settings, **HOW, "strategy.fraction-evaluate": 0.0}
    sites = sites_of(own, tmp_path / "sites", policy__report_held_out_loss=False)
    run = play(own, grid=grid_of_sites(own, sites))
    assert all(site == {} for site in summary_of(run)["personal"]["sites"].values())
    (line,) = entries(sites[0], asked=PERSONAL)
    assert line["figures"]["tokens"] > 0
    assert "weight" in line["figures"]


@pytest.mark.parametrize(("least", "is_told"), [(6, False), (5, True)])
def test_the_loss_of_fewer_examples_than_the_policy_allows_is_not_told(
    settings: Settings, tmp_path: Path, least: int, is_told: bool
) -> None:
    """A weight is chosen on 5 of 11 held-out examples, and the loss is of the other 6:
    it and the loss of all, which a round asks for, tell that of the 5."""
    own = {**settings, **HOW, "data.num-partitions": 1, "data.held-out-fraction": 0.09}
    own |= {"strategy.fraction-train": 1.0}
    sites = sites_of(own, tmp_path / "sites", tell__min_held_out_examples=least)
    run = play(own, grid=grid_of_sites(own, sites))
    (line,) = entries(sites[0], asked=PERSONAL)
    assert line["figures"]["num-examples"] == 6
    assert ("held-out-loss" in line["left"]["told"]) is is_told
    assert ("personal" in summary_of(run)["personal"]["sites"]["0"]) is is_told


def test_a_run_without_personal_adapters_cannot_ask_for_one(
    settings: Settings, tmp_path: Path
) -> None:
    sites = sites_of(settings, tmp_path / "sites")
    asked: list[Message] = []

    def asking(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate" and not asked:
            other = Message(message.content, message.metadata.dst_node_id, PERSONAL, group_id="1")
            asked.append(client_app.app(other, context))
        return client_app.app(message, context)

    play(settings, grid=grid_of_sites(settings, sites, asking))
    assert 'personalisation.name = "none"' in str(asked[0].content.config_records["config"])


def test_steps_beyond_the_policy_are_refused_before_any_training(
    settings: Settings, tmp_path: Path
) -> None:
    own = {**settings, **HOW, "personalisation.steps": 500}
    sites = sites_of(own, tmp_path / "sites", policy__max_steps_per_visit=50)
    with pytest.raises(Exception, match="max-steps-per-visit = 50"):
        play(own, grid=grid_of_sites(own, sites))
    assert not entries(sites[0], asked="train")


def test_a_policy_refuses_personal_adapters_and_logs_it(settings: Settings, tmp_path: Path) -> None:
    own = {**settings, **HOW}
    sites = sites_of(own, tmp_path / "sites", policy__personal_adapters="none")
    why = "personal-adapters = 'none', requested 'interpolate'"
    with pytest.raises(Exception, match=why):
        play(own, grid=grid_of_sites(own, sites))
    (line,) = entries(sites[0])
    assert (line["asked"], line["outcome"]) == ("query", "refused")
    assert line["reason"].endswith(f"forbids this run: {why}.")


def test_going_back_says_that_the_sites_keep_their_later_parts(
    settings: Settings, tmp_path: Path
) -> None:
    own = {**settings, **HOW, "personalisation.name": "dual", "train.save-every-round": 1}
    sites = sites_of(own, tmp_path / "sites")
    run = play(own, grid=grid_of_sites(own, sites))
    config = recipes.resolve({**own, "run-directory": "", "resume-from": str(run)})
    found = examine(RunDirectory(run), config, from_round=1)
    assert found is not None
    assert "as their later visits left it" in found.notes[-1]
