"""Private visits at a site in its own custody: what is charged, what leaves, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_to_proto
from typer.testing import CliRunner

from grandrounds import client_app
from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.errors import BudgetError, ConfigError, OwnDataError, PolicyError
from grandrounds.site.custody import answer as custody
from grandrounds.site.custody import audit, budget, counting, own_data, sequence
from grandrounds.site.custody.approvals import Recipe
from grandrounds.site.custody.node import SITE
from grandrounds.site.custody.site_file import SiteFile, read_site_file
from grandrounds.site.custody.state import SiteState
from grandrounds.site.custody.summary import lines_of as lines_of_recipe
from grandrounds.site.private.coins import KeyedCoins
from grandrounds.site.visit import Visit
from grandrounds.wire import messages
from tests.asking import Asking
from tests.own_sites import sites_of
from tests.runs import Settings, grid_of, metrics_of, play, summary_of

PRIVATE: Settings = {
    "data.num-partitions": 1,
    "strategy.fraction-train": 1.0,
    "strategy.fraction-evaluate": 0.0,
    "num-server-rounds": 3,
    "privacy.unit-guarantee": "example",
    "privacy.noise-multiplier": 4.0,
    "privacy.clipping-norm": 0.1,
}

DECLARED: dict[str, Any] = {"privacy__require": "example", "privacy__declared_units": 100}


@pytest.fixture
def asks(settings: Settings, tmp_path: Path) -> Asking:
    return private_asking(settings, tmp_path)


def private_asking(settings: Settings, folder: Path, **changes: Any) -> Asking:
    settings = {**settings, **PRIVATE}
    changes = {"policy__max_runs_per_day": 9, **DECLARED, **changes}
    return Asking(sites_of(settings, folder, **changes)[0], settings)


def packed(reply: Message) -> bytes:
    content: bytes = recorddict_to_proto(reply.content).SerializeToString(deterministic=True)
    return content


def budget_of(site: SiteFile) -> budget.Budget:
    with closing(SiteState(site.place(site.agent.state))) as state:
        return budget.read(site, state)


# --- The budget -----------------------------------------------------------------------------------


def test_charged_before_trained(asks: Asking) -> None:
    """When the visit begins, its charge is on disk and numbered; a crash gives nothing back."""
    seen: list[tuple[int, Any]] = []

    def crash(visit: Visit) -> RecordDict:
        known = json.loads(sequence.sequence_file(asks.site).read_text())
        seen.append((budget_of(asks.site).runs["ab"].visits, known["number"]))
        raise RuntimeError("out of memory")

    with pytest.raises(OwnDataError):
        asks(function=crash)
    assert seen == [(1, 2)]
    charged = budget_of(asks.site).runs["ab"]
    assert (charged.visits, charged.mechanism.visits) == (1, 3)
    assert charged.epsilon > charged.spent > 0


def test_retry_is_the_same_bytes(asks: Asking) -> None:
    """The coins of a visit come from a key that is kept from its charge to its cached reply."""
    drawn: list[Any] = []

    def draw(visit: Visit) -> RecordDict:
        assert isinstance(visit.coins, KeyedCoins)
        drawn.append(visit.coins.uniforms(3).tolist())
        if len(drawn) == 1:
            raise KeyboardInterrupt  # the process ends between charge and reply
        return asks.note(visit)

    with pytest.raises(KeyboardInterrupt):
        asks(function=draw)
    first = asks(function=draw)
    assert drawn[0] == drawn[1]
    assert packed(asks(function=draw)) == packed(first)
    assert len(drawn) == 2
    assert budget_of(asks.site).runs["ab"].visits == 1
    with closing(SiteState(asks.site.place("state"))) as state:
        assert state.count("select count(*) from coins") == 0
    asks(number=2, function=draw)
    assert drawn[2] != drawn[1]


def test_the_last_reserved_visit_is_answered_and_the_next_one_refused(asks: Asking) -> None:
    for number in (1, 2, 3):
        told = dict(asks(number=number).content.metric_records["metrics"])
        assert told["visits-left"] == 3 - number
    assert told["epsilon"] == pytest.approx(budget_of(asks.site).runs["ab"].epsilon)
    with pytest.raises(BudgetError, match="3 visits"):
        asks(number=3, sent=1)
    assert len(asks.visits) == 3
    assert audit.read(asks.site.place("state"))[-1]["outcome"] == "refused"
    asks(number=3)  # the same request again: its cached reply


def test_a_site_answers_as_many_visits_as_its_run_may_spend(
    settings: Settings, tmp_path: Path
) -> None:
    """ε of one, two and three visits is 0.054, 0.073 and 0.088."""
    asks = private_asking(settings, tmp_path, privacy__epsilon_of_run=0.08)
    asks(kind="query")
    for number in (1, 2):
        asks(number=number)
    assert {visit.mechanism and visit.mechanism.visits for visit in asks.visits} == {2}
    assert budget_of(asks.site).epsilon == pytest.approx(0.0729, abs=1e-4)
    with pytest.raises(BudgetError):
        asks(number=3)


def test_roll_calls_of_any_number_of_runs_burn_no_budget(asks: Asking) -> None:
    from grandrounds.site.custody import guarantee

    config = recipes.resolve(asks.settings)
    with closing(SiteState(asks.site.place("state"))) as state:
        for number in range(1000):
            guarantee.reserved(asks.site, state, f"{number:x}", config)
        found = budget.read(asks.site, state)
        assert (found.epsilon, found.lines) == (0.0, 0)
        assert state.count("select count(*) from reservations") == 1000
        state.table.execute("update reservations set at = at - 86401")
        guarantee.reserved(asks.site, state, "ab", config)
        assert state.count("select count(*) from reservations") == 1
    asks(run="ab")


def test_runs_add_up_until_the_total_is_spent(settings: Settings, tmp_path: Path) -> None:
    """0.088 for three visits, then 0.054 for the one that still fits, and then nothing does."""
    limits = {"privacy__epsilon_total": 0.15, "privacy__epsilon_of_run": 0.1}
    asks = private_asking(settings, tmp_path, **limits)
    asks(run="a1")
    asks(run="a2")
    found = budget_of(asks.site)
    assert [run.mechanism.visits for run in found.runs.values()] == [3, 1]
    assert found.epsilon == pytest.approx(0.0880 + 0.0535, abs=1e-4)
    with pytest.raises(BudgetError, match=r"of epsilon-total = 0\.15 earlier runs were charged"):
        asks(run="a3")
    asks(run="a1", number=2)  # it was charged whole


def test_the_deltas_of_all_runs_stay_below_a_tenth_of_one_unit(
    settings: Settings, tmp_path: Path
) -> None:
    asks = private_asking(settings, tmp_path, privacy__delta=6e-4)
    asks(run="a1", settings={"privacy.delta": 6e-4})
    with pytest.raises(BudgetError, match="deltas of all runs"):
        asks(run="a2", settings={"privacy.delta": 6e-4})


DAMAGES = {
    "no table": "drop table budget",
    "emptied": "delete from budget",
    "cut short": "delete from budget where number = 3",
    "no coins": "drop table coins",
    "changed": "update budget set entry = replace(entry, '\"visits\": 3', '\"visits\": 9')",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_budget_in_doubt_is_refused(asks: Asking, damage: str) -> None:
    asks(number=1)
    asks(number=2)
    with closing(SiteState(asks.site.place("state"))) as state:
        state.table.execute(damage)
    for kind in ("train",) if "coins" in damage else ("query", "train"):
        with pytest.raises(PolicyError, match="in doubt"):
            asks(number=3, kind=kind)
    assert "in doubt" in audit.read(asks.site.place("state"))[-1]["reason"]
    done = CliRunner().invoke(app, ["privacy", "budget", "--site", str(asks.site.path)])
    assert (done.exit_code, "in doubt" in done.stderr) == (1, True)
    assert len(asks.visits) == 2


def test_a_restored_backup_is_refused(asks: Asking, tmp_path: Path) -> None:
    file = asks.site.place("state") / "site.sqlite"
    asks(number=1)
    with closing(SiteState(file.parent)) as state:
        state.table.execute("pragma wal_checkpoint(truncate)")
    backup = file.read_bytes()
    asks(number=2)
    for leftover in file.parent.glob("site.sqlite-*"):
        leftover.unlink()
    file.write_bytes(backup)
    with pytest.raises(PolicyError, match=r"it has 2 lines, but had 3: it was restored"):
        asks(number=2)
    sequence.sequence_file(asks.site).unlink()
    with pytest.raises(PolicyError, match=r"budget\.sequence is missing"):
        asks(number=2)


@pytest.mark.parametrize("loss", ["another folder", "the folder is gone"])
def test_a_budget_does_not_restart_without_a_word(asks: Asking, loss: str) -> None:
    asks()
    site = asks.site
    if loss == "another folder":
        text = site.path.read_text()
        site.path.write_text(text.replace('state = "state"', 'state = "other"'))
        asks.site = site = read_site_file(site.path)
    else:
        shutil.rmtree(site.place("state"))
    for kind in ("query", "train"):
        with pytest.raises(PolicyError, match=r"not been started.*privacy budget --start"):
            asks(run="cd", kind=kind)
    done = CliRunner().invoke(app, ["privacy", "budget", "--site", str(site.path), "--start"])
    assert done.exit_code == 0, done.output
    assert "counts as certain that no private run visited" in done.stdout
    asks(run="cd")
    assert budget_of(site).lines == 2
    done = CliRunner().invoke(app, ["privacy", "budget", "--site", str(site.path), "--start"])
    assert "nothing is changed" in done.stdout
    assert budget_of(site).lines == 2


def test_a_budget_whose_number_is_lost_is_not_started_anew(asks: Asking) -> None:
    asks()
    sequence.sequence_file(asks.site).unlink()
    done = CliRunner().invoke(app, ["privacy", "budget", "--site", str(asks.site.path), "--start"])
    assert done.exit_code == 1
    assert not sequence.sequence_file(asks.site).exists()


@pytest.mark.parametrize("content", ["[]", '{"number": -1, "sha256": "x"}', "", None])
def test_a_number_that_cannot_be_read_is_in_doubt(asks: Asking, content: str | None) -> None:
    file = sequence.sequence_file(asks.site)
    file.unlink()
    file.mkdir() if content is None else file.write_text(content)
    with pytest.raises(PolicyError, match=r"in doubt: budget\.sequence cannot be read"):
        asks()


def test_looking_at_a_budget_makes_no_state(asks: Asking) -> None:
    state = asks.site.place("state")
    arguments = ["privacy", "budget", "--site", str(asks.site.path)]
    done = CliRunner().invoke(app, arguments)
    assert "no state yet" in done.stdout
    assert [file.name for file in state.iterdir()] == ["budget.sequence"]
    shutil.rmtree(state)
    done = CliRunner().invoke(app, arguments)
    assert "no state yet" in done.stdout
    assert "not started" in done.stdout
    assert not state.exists()


def test_no_file_of_the_state_holds_the_key_of_an_answered_visit(
    asks: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = bytes(range(100, 132))
    monkeypatch.setattr(budget.secrets, "token_bytes", lambda count: key)

    def holders() -> list[str]:
        files = asks.site.place("state").glob("site.sqlite*")
        return [file.name for file in files if key in file.read_bytes()]

    seen: list[list[str]] = []

    def look(visit: Visit) -> RecordDict:
        seen.append(holders())
        return asks.note(visit)

    with closing(SiteState(asks.site.place("state"))):  # else the last one to close empties the log
        asks(function=look)
        assert seen[0]
        assert not holders()


def test_a_charge_without_its_number_is_none_that_is_lost(
    asks: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the charge, before its number: the table is ahead, and nothing is amiss."""
    with monkeypatch.context() as cut:
        cut.setattr(counting.budget, "note_sequence", lambda *_: 1 / 0)
        with pytest.raises(OwnDataError):
            asks()
    asks()
    assert budget_of(asks.site).runs["ab"].visits == 1


def test_without_an_accountant_nothing_is_private(
    asks: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grandrounds.site.private import accountant

    def missing() -> Any:
        raise ConfigError("Private visits need dp-accounting")

    monkeypatch.setattr(accountant, "_library", missing)
    accountant.epsilon.cache_clear()
    with pytest.raises(ConfigError, match="dp-accounting"):
        asks(settings={"privacy.noise-multiplier": 3.875})
    assert not asks.visits


# --- What a run may ask for -----------------------------------------------------------------------


def test_the_app_cannot_leave_it_out(settings: Settings, tmp_path: Path) -> None:
    """Neither recipe nor ClientApp decides: the site requires it, and the mechanism is its own."""
    asks = private_asking(settings, tmp_path)
    none = {"privacy.unit-guarantee": "none", "privacy.noise-multiplier": 0.0}
    for kind in ("query", "train", "evaluate"):
        with pytest.raises(PolicyError, match=r"privacy\.require = .example., requested"):
            asks(kind=kind, settings=none)
    own = {"privacy.declared-units": 5, "privacy.delta": 0.019, "privacy.unit-column": "x"}
    asks(settings=own)
    mechanism = asks.visits[-1].mechanism
    assert mechanism is not None
    assert (mechanism.declared_units, mechanism.delta) == (100, 1e-5)
    assert mechanism.sampling_rate == 0.04


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"privacy.sampling-rate": 0.7}, "max-sampling-rate = 0.5, requested 0.7"),
        ({"privacy.clipping-norm": 2e3}, "max-clipping-norm = 1000, requested 2000"),
        ({"train.training-arguments.max-steps": 90, "num-server-rounds": 900}, "max-steps-of-run"),
    ],
)
def test_a_recipe_beyond_the_limits_is_refused(asks: Asking, asked: Settings, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        asks(kind="query", settings=asked)


def test_a_private_recipe_needs_declared_units(settings: Settings, tmp_path: Path) -> None:
    asks = private_asking(settings, tmp_path, privacy__require="none", privacy__declared_units=0)
    with pytest.raises(PolicyError, match=r"declares its number of units under \[privacy\]"):
        asks(kind="query")


def test_the_units_of_the_budget_stay_the_same(asks: Asking) -> None:
    asks()
    text = asks.site.path.read_text()
    asks.site.path.write_text(text.replace('unit-column = ""', 'unit-column = "patient"'))
    for run in ("ab", "cd"):
        with pytest.raises(PolicyError, match=r"unit-column was ''"):
            asks(run=run, number=2)


# --- Units ----------------------------------------------------------------------------------------


def test_held_out_split_is_per_unit(settings: Settings, tmp_path: Path) -> None:
    """One patient more moves no other, and the run's seed and cursor decide nothing."""
    asks = private_asking(
        settings, tmp_path, privacy__unit_column="patient", data__held_out_fraction=0.5
    )
    file = asks.site.path.parent / "cards.jsonl"
    rows = [
        {"input": f"question {i}", "output": f"answer {i}", "patient": f"patient {i // 3}"}
        for i in range(90)
    ]

    def split(kept: list[dict[str, str]]) -> tuple[set[str], set[str]]:
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        found = own_data.own_split(asks.site, private=True)
        return {e.question for e in found.train}, {e.question for e in found.held_out}

    train, held_out = split(rows)
    assert 9 <= len(held_out) <= 81
    fewer = split(rows[3:])
    assert fewer == (
        train - {f"question {i}" for i in range(3)},
        held_out - {f"question {i}" for i in range(3)},
    )
    split(rows)
    asks(said={"cursor": 17}, settings={"seed": 5})
    (visit,) = asks.visits
    assert len(visit.site.units) == len(visit.site.train) == len(train)
    assert sorted(set(visit.site.units)) == list(range(len(train) // 3))
    assert visit.chosen is not None
    assert visit.chosen.indices == ()


def test_a_site_none_of_whose_records_fits_answers_and_trains_noise(asks: Asking) -> None:
    """A refusal would tell for nothing whether any record is shorter than a chosen length."""
    row = {"input": "so long a question " * 5000, "output": "a"}
    (asks.site.path.parent / "cards.jsonl").write_text(json.dumps(row) + "\n")
    for kind in ("query", "train"):
        asks(kind=kind)
    assert [visit.site.units for visit in asks.visits] == [(), ()]
    assert asks.visits[1].mechanism


def test_one_record_does_not_decide_what_others_say(asks: Asking) -> None:
    """An instruction that is the same in all rows is left out only where nothing is private."""
    file = asks.site.path.parent / "cards.jsonl"
    rows = [{"instruction": "Answer.", "input": f"q{i}", "output": f"a{i}"} for i in range(20)]
    more = {"instruction": "Be brief.", "input": "q20", "output": "a20"}

    def split(kept: list[dict[str, str]]) -> tuple[set[str], set[str]]:
        file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        found = own_data.own_split(asks.site, private=True)
        return {e.question for e in found.train}, {e.question for e in found.held_out}

    before, after = split(rows), split([*rows, more])
    assert tuple(side - {"Be brief. q20"} for side in after) == before
    assert "Answer. q0" in before[0] | before[1]


def test_a_charge_by_another_process_meanwhile_is_no_doubt(
    asks: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks()
    read = sequence.storage.read_json
    charging = iter([True])

    def slowly(file: Path) -> Any:
        if next(charging, False):
            asks(number=2)
        return read(file)

    monkeypatch.setattr(sequence.storage, "read_json", slowly)
    assert budget_of(asks.site).runs["ab"].visits == 2


def test_two_processes_do_not_answer_one_request_with_the_same_coins(asks: Asking) -> None:
    inner: list[Message] = []

    def slow(visit: Visit) -> RecordDict:
        inner.append(asks())
        return asks.note(visit)

    with pytest.raises(OwnDataError):
        asks(function=slow)
    assert packed(asks()) == packed(inner[0])
    assert budget_of(asks.site).runs["ab"].visits == 1


def test_a_run_that_was_charged_with_other_noise_meanwhile_is_not_trained(asks: Asking) -> None:
    asks()
    mechanism = budget_of(asks.site).runs["ab"].mechanism
    less = dataclasses.replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
    with closing(SiteState(asks.site.place("state"))) as state, state.lasting():  # noqa: SIM117
        with pytest.raises(PolicyError, match="other noise meanwhile"):
            budget.charge(asks.site, state, budget.Visiting("ab", "digest", 2, less))


# --- What leaves ----------------------------------------------------------------------------------


def test_refusal_texts_have_no_counts(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once data were read, every failure has one text; the audit log has the reason."""
    said: set[bytes] = set()
    reasons: set[str] = set()

    def refused(asks: Asking, kind: str, error: Exception | None) -> None:
        def fail(visit: Visit) -> RecordDict:
            assert error is not None
            raise error

        try:
            asks(kind=kind, function=fail)
        except OwnDataError as told:
            said.add(packed(Message(messages.failure(told), 1, "train")))
        line = audit.read(asks.site.place("state"))[-1]
        reasons.add(f"{line['reason']} {line.get('error')}")

    asks = private_asking(settings, tmp_path / "a")
    for kind, error in (
        ("train", ValueError("non-finite")),
        ("train", MemoryError("34 of 33 bytes")),
        ("query", PolicyError("min-examples = 100, there are 99")),
    ):
        refused(asks, kind, error)
    text = 'identifiers = "report"', 'identifiers = "refuse"'
    asks.site.path.write_text(asks.site.path.read_text().replace(*text))
    (asks.site.path.parent / "cards.jsonl").write_text('{"input": "a", "output": \n')
    refused(asks, "train", None)
    assert len(said) == 1
    assert len(reasons) == 4


def test_min_examples_counts_declared_units(settings: Settings, tmp_path: Path) -> None:
    """A real number below it would be told by the refusal."""
    asks = private_asking(settings, tmp_path, policy__min_examples=100)
    (asks.site.path.parent / "cards.jsonl").write_text('{"input": "a", "output": "b"}\n')
    asks()
    with pytest.raises(PolicyError, match="min-examples = 101, the site declares 100 units"):
        private_asking(settings, tmp_path, policy__min_examples=101)(run="cd")


def test_replies_are_held_to_a_grid(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(custody.time, "sleep", slept.append)
    asks = private_asking(settings, tmp_path, privacy__answer_every_seconds=30)
    asks()
    assert len(slept) == 1
    assert 0 < slept[0] < 30
    asks()  # cached: no data were read for it
    assert len(slept) == 1


def transcript(settings: Settings, folder: Path, changed: bool) -> tuple[list[Any], list[bytes]]:
    """Play a private run of one site; return all that left it: all but arrays, and arrays."""
    [site] = sites_of(settings, folder, **DECLARED, privacy__epsilon_of_run=8.0)
    cards = site.path.parent / "cards.jsonl"
    if changed:
        lines = cards.read_text().splitlines()
        lines[8] = json.dumps({"input": "What helps?", "output": "An apple, and much more of it."})
        cards.write_text("\n".join(lines) + "\n")
    rest: list[Any] = []
    arrays: list[bytes] = []

    def heard(message: Message, context: Context) -> Message:
        reply = client_app.app(message, context)
        content = RecordDict(dict(reply.content))
        for record in reply.content.array_records.values():
            arrays.extend(bytes(array.data) for array in record.values())
            rest.append([(n, a.dtype, a.shape, len(a.data)) for n, a in record.items()])
        content.pop("arrays", None)
        rest.append((message.metadata.message_type, packed(Message(content, 1, "train"))))
        return reply

    grid = grid_of(recipes.resolve(settings), heard, [{SITE: str(site.path)}])
    with pytest.raises(PolicyError):
        custody.answer(
            site.path,
            Message(messages.content(config={"round": 1, "run": "ab"}), 1, "query"),
            Context(1, 1, {SITE: str(site.path)}, RecordDict(), {"privacy.unit-guarantee": "none"}),
            client_app.VISITS["query"],
        )
    play(settings, grid=grid)
    return rest, arrays


def test_only_arrays_depend_on_data(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record changed, the same coins: of all that leaves in a run only arrays differ."""
    from grandrounds.server import lifecycle

    monkeypatch.setattr(budget.secrets, "token_bytes", lambda count: bytes(count))
    monkeypatch.setattr(lifecycle.secrets, "token_hex", lambda count: "ab")
    monkeypatch.setattr("grandrounds.site.custody.order.secret_of", lambda _: bytes(32))
    asked = {
        "num-server-rounds": 2,
        "strategy.fraction-evaluate": 1.0,
        "privacy.sampling-rate": 0.5,
        "privacy.noise-multiplier": 40.0,
    }
    settings = {**settings, **PRIVATE, **asked}
    found = [
        transcript({**settings, "run-directory": str(tmp_path / f"run{i}")}, tmp_path / f"{i}", i)
        for i in (False, True)
    ]
    assert found[0][0] == found[1][0]
    assert len(found[0][1]) == len(found[1][1]) > 0
    assert all(one != other for one, other in zip(found[0][1], found[1][1], strict=True))
    run = tmp_path / "runTrue"
    private = summary_of(run)["privacy"]
    assert private["mode"] == "enforced"
    assert private["unit"] == "record"
    assert private["sites"]["0"]["declared_units"] == 100
    assert private["epsilon"] == private["reserved_epsilon"] > 0
    last = metrics_of(run)[-1]
    assert last["weights"] == {"0": 100}
    assert last["epsilon"]["0"] == private["epsilon"]
    assert last["train-loss"] is None
    assert "held-out-loss" not in last  # nobody tells it, so nobody is asked


@pytest.mark.parametrize(("allowed", "asked"), [(True, True), (True, False), (False, True)])
def test_a_site_tells_a_noised_loss_only_if_policy_and_run_agree(
    settings: Settings, tmp_path: Path, allowed: bool, asked: bool
) -> None:
    settings = {**settings, "privacy.report-train-loss": asked}
    asks = private_asking(settings, tmp_path, privacy__report_train_loss=allowed)

    def talkative(visit: Visit) -> RecordDict:
        content = asks.note(visit)
        content.metric_records[messages.METRICS]["train-loss"] = 1.0
        return content

    told = asks(function=talkative).content.metric_records[messages.METRICS]
    agreed = allowed and asked
    assert ("train-loss" in told) == agreed
    [charged] = budget_of(asks.site).runs.values()
    assert charged.mechanism.tells_loss == agreed


def test_whoever_approves_a_recipe_sees_what_it_guarantees() -> None:
    recipe = Recipe("ab" * 32, recipes.resolve({**PRIVATE}).flat())
    lines = list(lines_of_recipe(recipe, []))
    assert "    private visits: a noise multiplier of 4.0, clipping norm 0.1" in lines
    variant = {"model.lora.peft-use-dora": True, "model.lora.rank-pattern": '{"q_proj": 4}'}
    plain = Recipe("ab" * 32, recipes.resolve(variant).flat())
    told = "\n".join(lines_of_recipe(plain, []))
    assert "DoRA, LoRA of rank 16" in told
    assert 'model.lora.rank-pattern {"q_proj": 4}' in told
    assert not any("private visits" in line for line in lines_of_recipe(plain, []))
