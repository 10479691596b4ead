"""Whole comparisons on a tiny base: what each arm trains on, what is kept, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.config.keys import Config
from grandrounds.engines.in_process import InProcessGrid
from grandrounds.errors import ConfigError, DataError, GrandRoundsError, RunDirectoryError
from grandrounds.model.base import base_loads
from grandrounds.server.exchange import Exchange
from grandrounds.server.roll_call import Roster
from grandrounds.site import visit as visits
from grandrounds.site.local_data import site_of
from grandrounds.site.visit import Visit
from grandrounds.study.comparison.arms import numbered_without
from grandrounds.study.comparison.exams import exams_of
from grandrounds.study.comparison.results import LOSS
from grandrounds.study.comparison.runner import Comparison, compare
from grandrounds.study.comparison.tables import notes, tables
from grandrounds.study.comparison.units import ARMS, PERSONAL, PRIVATE, Design
from grandrounds.wire.ledger import Ledger
from grandrounds.wire.schedule import cohort_of
from tests.conftest import WORDS

Settings = dict[str, Any]

SEEDS = [42, 43]

WITHOUT_NOISE = tuple(arm for arm in ARMS if arm not in (PRIVATE, PERSONAL))

DESIGN = Design(WITHOUT_NOISE, SEEDS)


def resolved(settings: Settings, **changes: Any) -> Config:
    return recipes.resolve(
        {
            **settings,
            "run-directory": "",
            "data.partitioner": "natural",
            "data.partition-by": "ward",
            "num-server-rounds": 2,
            **changes,
        }
    )


def played(config: Config, out: Path, **changes: Any) -> dict[str, Any]:
    listener = {"listener": changes.pop("listener")} if "listener" in changes else {}
    design = Design(**{"arms": WITHOUT_NOISE, "seeds": SEEDS, "left_out": [1], **changes})
    return compare(config, design, out, **listener)


def figures(content: dict[str, Any]) -> Any:
    """Return what must be the same however often a comparison was stopped."""
    text = json.dumps({k: content[k] for k in ("arms", "without", "gains", "joining", "sites")})

    def without_seconds(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key != "seconds"}

    return json.loads(text, object_pairs_hook=without_seconds)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, set[Any]]]:
    """Return (site, round, examples) of every visit from here on."""
    made: list[tuple[int, int, set[Any]]] = []
    train = visits.train

    def spy(visit: Visit, resident: Any, batches: Any) -> Any:
        examples = {tuple(e.input_ids) for batch in batches for e in batch}
        made.append((visit.site.partition_id, visit.round, examples))
        return train(visit, resident, batches)

    monkeypatch.setattr(visits, "train", spy)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Nothing yet; filled by the first test that needs the comparison."""
    return {"out": tmp_path_factory.mktemp("whole") / "comparison"}


def whole_comparison(whole: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Return one comparison of all arms, made once for this file."""
    if "content" not in whole:
        loads = base_loads()
        whole["content"] = played(resolved(settings), whole["out"])
        whole["loads"] = base_loads() - loads
    return whole["content"]  # type: ignore[no-any-return]


# --- The arms -------------------------------------------------------------------------------------


def test_all_arms_make_the_same_number_of_example_visits(
    whole: dict[str, Any], settings: Settings
) -> None:
    """2 rounds x 2 of 4 sites x 2 steps of 4 examples."""
    content = whole_comparison(whole, settings)
    arms = [*content["arms"].values(), *content["without"].values()]
    visits_of = [run["example-visits"] for arm in arms for run in arm["seeds"].values()]
    assert visits_of == [0, 0, *[32] * 8]
    assert content["budget"]["local-visits"] == 1
    assert content["status"] == "complete"
    assert content["units"] == {"done": 16, "planned": 16}


def test_the_base_is_loaded_at_most_once(whole: dict[str, Any], settings: Settings) -> None:
    whole_comparison(whole, settings)
    assert whole["loads"] <= 1


def test_the_file_is_what_was_returned_and_the_runs_are_run_directories(
    whole: dict[str, Any], settings: Settings
) -> None:
    content = whole_comparison(whole, settings)
    out = whole["out"]
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(content))
    run = out / content["arms"]["federated"]["seeds"]["43"]["run"]
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"
    assert (out / content["without"]["1"]["seeds"]["42"]["run"] / "peft_2").is_dir()
    assert "--sites 1" in content["command"]


def test_training_lowers_the_loss_in_every_arm(whole: dict[str, Any], settings: Settings) -> None:
    arms = whole_comparison(whole, settings)["arms"]
    assert list(arms) == ["base", "federated", "centralised", "local"]
    base, *others = (arm["held-out-loss"]["mean"] for arm in arms.values())
    assert all(loss < base for loss in others)


def test_the_pool_is_the_sites_training_examples_and_nothing_that_is_held_out(
    settings: Settings, tmp_path: Path, trained: list[tuple[int, int, set[Any]]]
) -> None:
    config = resolved(settings, **{"num-server-rounds": 8})
    played(config, tmp_path / "out", arms=["centralised"], seeds=[42])
    sites = [site_of(config, k) for k in range(4)]
    pool = {tuple(e.input_ids) for site in sites for e in site.train}
    held_out = {tuple(e.input_ids) for site in sites for e in site.held_out}
    seen = set[Any]().union(*(examples for _, _, examples in trained))
    assert seen == pool  # 8 rounds x 16 examples are more than the 108 there are
    assert not seen & held_out
    assert [(site, number) for site, number, _ in trained] == [(4, r) for r in range(1, 9)]


def test_a_site_alone_sees_its_own_examples_only(
    settings: Settings, tmp_path: Path, trained: list[tuple[int, int, set[Any]]]
) -> None:
    config = resolved(settings)
    played(config, tmp_path / "out", arms=["local"], seeds=[42])
    for k, number, examples in trained:
        assert number == 1  # one visit, in the middle of two rounds
        assert examples <= {tuple(e.input_ids) for e in site_of(config, k).train}
    assert [k for k, _, _ in trained] == [0, 1, 2, 3]


def test_a_federation_of_one_site_is_that_site_alone(settings: Settings, tmp_path: Path) -> None:
    """The same visits from the same start: training apart from a federation is no other code."""
    one = {
        "data.partitioner": "iid",
        "data.num-partitions": 1,
        "strategy.fraction-train": 1.0,
        "strategy.fraction-evaluate": 1.0,
        "strategy.name": "fedavg",
        "strategy.proximal-mu": 0.0,
        "num-server-rounds": 3,
    }
    config = resolved(settings, **one)
    arms = played(config, tmp_path / "out", arms=WITHOUT_NOISE[:3], seeds=[42], left_out=[])["arms"]
    alone, federated = (arms[arm]["held-out-loss"]["mean"] for arm in ("local", "federated"))
    assert alone == pytest.approx(federated, rel=1e-5)


@pytest.mark.slow
def test_a_private_recipe_is_compared_with_itself_without_noise(
    settings: Settings, tmp_path: Path
) -> None:
    private = {
        "privacy.unit-guarantee": "example",
        "privacy.noise-multiplier": 40.0,
        "privacy.declared-units": 40,
        "privacy.sampling-rate": 1.0,
        "privacy.delta": 1e-4,
        "strategy.name": "ffa",
        "strategy.proximal-mu": 0.0,
        "train.training-arguments.max-grad-norm": 0.0,
        "train.training-arguments.max-steps": 1,
        "data.held-out-fraction": 0.3,
    }
    config = resolved(settings, **private)
    content = played(
        config, tmp_path / "out", arms=["federated", "private", "local"], seeds=[42], left_out=[]
    )
    arms = {name: arm["seeds"]["42"] for name, arm in content["arms"].items()}
    assert list(arms) == ["base", "federated", "private", "local"]
    assert "epsilon" not in arms["federated"]
    run = tmp_path / "out" / arms["private"]["run"]
    told = json.loads((run / "summary.json").read_text())["privacy"]
    assert arms["private"]["epsilon"] == told["epsilon"] > 0
    assert arms["private"]["train-loss"] is None
    assert arms["federated"]["train-loss"] > 0
    tokens = {name: [s["tokens"] for s in arm["sites"].values()] for name, arm in arms.items()}
    assert tokens["federated"] == tokens["private"]  # the same examples are held out
    assert arms["federated"]["held-out-loss"] != arms["private"]["held-out-loss"]
    [shown, *_] = tables(content)
    column = list(shown.columns).index("epsilon")
    spent = {row[0]: row[column] for row in shown.rows}
    assert spent["private"] == f"{told['epsilon']:.2f}"
    assert spent["federated"] == "none"


@pytest.mark.slow
def test_a_masked_recipe_is_compared_and_told_which_arms_are_masked(
    settings: Settings, tmp_path: Path
) -> None:
    """Three of four sites are too few for masks once one is left out: those updates are plain."""
    masked = {
        "secure-aggregation": "masked32",
        "strategy.fraction-train": 0.75,
        "num-server-rounds": 1,
    }
    config = resolved(settings, **masked)
    arms = ["federated", "leave-one-out", "local"]
    content = played(config, tmp_path / "masked", arms=arms, seeds=[42])
    plain = played(
        resolved(settings, **{**masked, "secure-aggregation": "none", "defence.largest-norm": 0.0}),
        tmp_path / "plain",
        arms=arms,
        seeds=[42],
    )
    for one, other in zip(content["joining"], plain["joining"], strict=True):
        assert one["own"][LOSS]["mean"] == pytest.approx(other["own"][LOSS]["mean"], abs=1e-5)
    [said] = [note for note in notes(content) if "masked" in note]
    assert said == (
        "the updates of federated are masked: secure aggregation (beta, unreviewed), a rehearsal; "
        "leave-one-out sums plain ones, which differs by rounding"
    )
    assert not any("masked" in note for note in notes(plain))


def test_the_federation_without_a_site_never_asks_it_and_keeps_its_cohort(
    settings: Settings, tmp_path: Path, trained: list[tuple[int, int, set[Any]]]
) -> None:
    config = resolved(settings, **{"num-server-rounds": 3})
    content = played(config, tmp_path / "out", arms=["leave-one-out"], seeds=[42])
    cohorts = [{k for k, r, _ in trained if r == number} for number in (1, 2, 3)]
    assert set().union(*cohorts) == {0, 2, 3}
    assert [len(cohort) for cohort in cohorts] == [2, 2, 2]
    for k, _, examples in trained:
        assert examples <= {tuple(e.input_ids) for e in site_of(config, k).train}
    assert list(content["without"]["1"]["sites"]) == ["0", "1", "2", "3"]  # all are judged


def test_sites_of_unequal_rank_keep_their_ranks_when_one_is_left_out(
    settings: Settings, tmp_path: Path
) -> None:
    ranks = {"strategy.name": "product", "strategy.site-ranks": "4,2", "num-server-rounds": 1}
    content = played(
        resolved(settings, **ranks), tmp_path / "out", arms=["leave-one-out"], seeds=[42]
    )
    assert content["without"]["1"]["seeds"]["42"]["failed-replies"] == 0


@pytest.mark.parametrize(
    "name", ["flora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ffa", "rolora"))]
)
@pytest.mark.slow
def test_rules_that_change_the_adapter_are_compared_with_ordinary_training(
    settings: Settings, tmp_path: Path, name: str
) -> None:
    config = resolved(settings, **{"strategy.name": name, "strategy.proximal-mu": 0.0})
    content = played(config, tmp_path / "out", arms=["federated", "local"], seeds=[42])
    base = content["arms"]["base"]["held-out-loss"]["mean"]
    for arm in ("federated", "local"):
        assert content["arms"][arm]["held-out-loss"]["mean"] < base


@pytest.mark.slow
def test_visits_in_epochs_are_the_cohorts_in_the_pool_too(
    settings: Settings, tmp_path: Path
) -> None:
    epochs = {
        "train.training-arguments.max-steps": -1,
        "train.training-arguments.num-train-epochs": 0.5,
    }
    config = resolved(settings, **epochs)
    arms = played(config, tmp_path / "out", arms=["federated", "centralised"], seeds=[42])["arms"]
    federated, pooled = (arms[a]["seeds"]["42"] for a in ("federated", "centralised"))
    each = [-(-len(site_of(config, k).train) // 2) for k in range(4)]
    expected = sum(each[k] for number in (1, 2) for k in cohort_of(config, number))
    assert federated["example-visits"] == pooled["example-visits"] == expected


# --- Stopped and gone on with ---------------------------------------------------------------------


def stop_when(event: str, count: int) -> Callable[[str, Any], None]:
    """Return a listener that presses Ctrl-C at the n-th event of a kind."""
    left = [count]

    def listen(told: str, facts: Any) -> None:
        if told == event:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    return listen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "count"),
    [
        ("finished", 3),
        pytest.param("visited", 1, marks=pytest.mark.slow),  # after line 0, the untrained adapter
        ("visited", 3),  # after its second round
    ],
)
def test_a_stopped_comparison_goes_on_to_the_same_figures(
    whole: dict[str, Any], settings: Settings, tmp_path: Path, event: str, count: int
) -> None:
    expected = whole_comparison(whole, settings)
    config = resolved(settings)
    with pytest.raises(KeyboardInterrupt):
        played(config, tmp_path / "out", listener=stop_when(event, count))
    stopped = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert stopped["status"] == "unfinished"
    assert figures(played(config, tmp_path / "out")) == figures(expected)


def test_what_is_finished_is_not_trained_again_and_seeds_may_be_added(
    settings: Settings, tmp_path: Path, trained: list[tuple[int, int, set[Any]]]
) -> None:
    config = resolved(settings)
    played(config, tmp_path / "out", arms=["local"], seeds=[42])
    before = len(trained)
    content = played(config, tmp_path / "out", arms=["local"], seeds=SEEDS)
    assert len(trained) == 2 * before
    assert list(content["arms"]["local"]["seeds"]) == ["42", "43"]


def test_a_folder_of_another_comparison_is_refused_by_key(
    settings: Settings, tmp_path: Path
) -> None:
    played(resolved(settings), tmp_path / "out", arms=["local"], seeds=[42])
    other = resolved(settings, **{"train.learning-rate-max": 0.02})
    with pytest.raises(RunDirectoryError, match=r"train\.learning-rate-max: [\d.]+ → 0\.02"):
        played(other, tmp_path / "out", arms=["local"], seeds=[42])


def test_data_that_changed_are_refused(
    settings: Settings, tmp_path: Path, flashcards: Path
) -> None:
    cards = tmp_path / "cards.jsonl"
    lines = flashcards.read_text().splitlines(keepends=True)
    cards.write_text("".join(lines))
    config = resolved(settings, **{"static.dataset.name": str(cards)})
    played(config, tmp_path / "out", arms=["local"], seeds=[42])
    cards.write_text("".join(lines[:-1]))
    with pytest.raises(RunDirectoryError, match=r"seed 42 in sites\.json site 0: data-tag: was"):
        played(config, tmp_path / "out", arms=["local"], seeds=[42])


def test_a_folder_that_holds_something_else_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirectoryError, match="not empty and holds no comparison"):
        played(resolved(settings), tmp_path)
    with pytest.raises(RunDirectoryError, match="is a file"):
        played(resolved(settings), tmp_path / "notes.txt")


# --- What cannot be compared ----------------------------------------------------------------------


def test_sites_too_small_to_be_judged_are_named_before_anything_is_written(
    settings: Settings, tmp_path: Path, flashcards: Path
) -> None:
    cards = tmp_path / "cards.jsonl"
    lines = flashcards.read_text().splitlines(keepends=True)
    cards.write_text("".join(lines[:7]))  # wards 0 to 3, the last with one card
    config = resolved(settings, **{"static.dataset.name": str(cards)})
    with pytest.raises(DataError, match=r"\(ward 3\): a site needs at least 2 different questions"):
        played(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_held_out_is_told(settings: Settings, tmp_path: Path) -> None:
    nothing = {"data.held-out-fraction": 0.0, "strategy.fraction-evaluate": 0.0}
    with pytest.raises(ConfigError, match=r"data\.held-out-fraction = 0"):
        played(resolved(settings, **nothing), tmp_path / "out")


def test_a_site_that_cannot_answer_the_roll_call_says_why(settings: Settings) -> None:
    """An error that travels as a reply has no partition id to number anew."""
    config = resolved(settings, **{"static.dataset.name": "/nowhere.jsonl"})
    grid = InProcessGrid(numbered_without(0, 4), config.flat(), 3)
    with pytest.raises(GrandRoundsError, match="nowhere"):
        Roster(3).call(Exchange(grid, Ledger(), "0", 10), list(grid.get_node_ids()), 10)


# --- The formulary --------------------------------------------------------------------------------


def test_private_facts_belong_to_sites_only_where_partitions_are_the_formularys() -> None:
    private, public = exams_of(recipes.resolve(), DESIGN)
    assert private.entry() == {
        "title": "private facts of the sites",
        "n": 300,
        "chance": 0.25,
        "measures": "learned",
        "by-site": True,
    }
    assert private.site_of is not None
    assert all(private.site_of.count(site) == 15 for site in range(20))
    assert (public.entry()["n"], public.entry()["by-site"]) == (360, False)
    by_chance, _ = exams_of(recipes.resolve({"data.partitioner": "iid"}), DESIGN)
    assert by_chance.site_of is None


def test_other_data_have_no_private_facts(settings: Settings, flashcards: Path) -> None:
    assert exams_of(resolved(settings), DESIGN) == []
    on_cards = recipes.resolve({"static.dataset.name": str(flashcards)})
    assert [exam.name for exam in exams_of(on_cards, DESIGN)] == ["public"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_the_embedded_world_the_pool_learns_what_no_site_alone_can(tmp_path: Path) -> None:
    config = recipes.resolve(
        {
            "data.partitioner": "natural",
            "data.partition-by": "site",
            "num-server-rounds": 3,
            "train.training-arguments.max-steps": 10,
            "train.num-threads": 1,
        }
    )
    content = played(config, tmp_path / "out", arms=WITHOUT_NOISE[:3], seeds=[42], left_out=[])
    private = {name: arm["accuracy"]["private"]["mean"] for name, arm in content["arms"].items()}
    assert private["base"] < 0.35
    assert private["centralised"] > private["federated"] > private["base"]
    own = [j for j in content["joining"] if j["instead-of"] == "local"]
    assert len(own) == 20
    assert all("private" in j["own"]["accuracy"] for j in own)
    assert (tmp_path / "out" / "units" / "local" / "seed-42" / "site-19.json").is_file()
    everywhere = content["arms"]["local"]["everywhere"]["accuracy"]["private"]["mean"]
    assert everywhere < private["federated"]  # a site alone cannot know what only others know


@pytest.mark.slow
def test_benchmarks_are_asked_of_every_arm_and_must_stay_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    rows = [
        {"question": f"What helps against {word}?", "opa": "tea", "opb": "rest", "opc": "water"}
        | {"opd": "time", "cop": number % 4}
        for number, word in enumerate(WORDS)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "medmcqa.jsonl").write_text(text)
    asked = {"benchmarks": ["medmcqa"], "benchmark_data": tmp_path, "seeds": [42]}
    arms = ["federated", "local"]
    content = played(resolved(settings), tmp_path / "out", arms=arms, **asked)
    assert content["exams"]["medmcqa"]["n"] == len(WORDS)
    assert all("medmcqa" in arm["accuracy"] for arm in content["arms"].values())
    gains = {(gain["over"], gain["measure"]): gain for gain in content["gains"]}
    assert gains["base", "medmcqa"]["over-questions"]["42"]["n"] == len(WORDS)
    assert gains["local", "medmcqa"]["over-questions"] is None
    assert "--benchmarks medmcqa --benchmark-data" in content["command"]
    with pytest.raises(RunDirectoryError, match=r"in exams\.json medmcqa: was"):
        played(resolved(settings), tmp_path / "out", arms=arms, limit=3, **asked)


# --- Personal adapters ----------------------------------------------------------------------------


def test_personal_adapters_are_compared_on_what_no_weight_was_chosen_on(
    settings: Settings, tmp_path: Path
) -> None:
    how = {
        "personalisation.name": "local-tail",
        "personalisation.steps": 2,
        "data.held-out-fraction": 0.3,
        "data.prompt-template": "alpaca",
    }
    config = resolved(settings, **how)
    arms = ("federated", "personal", "local")
    content = played(config, tmp_path / "c", arms=arms, seeds=[42], left_out=[])
    plain = played(
        resolved(settings, **{**how, "personalisation.name": "none"}),
        tmp_path / "p",
        arms=("federated",),
        seeds=[42],
        left_out=[],
    )
    sites = config.data.num_partitions
    seed = content["arms"]["federated"]["seeds"]["42"]["sites"]
    whole = plain["arms"]["federated"]["seeds"]["42"]["sites"]
    assert all(seed[k]["tokens"] < whole[k]["tokens"] for k in seed)
    assert all(
        content["arms"][arm]["seeds"]["42"]["sites"][k]["tokens"] == seed[k]["tokens"]
        for arm in arms
        for k in seed
    )
    matrix = content["matrix"]["personal"][LOSS]
    assert set(matrix["models"]) == {str(k) for k in range(sites)}
    assert matrix["own"] == {k: at[k] for k, at in matrix["models"].items()}
    assert matrix["worst"]["value"] == max(matrix["own"].values())
    assert set(content["matrix"]["federated"][LOSS]["models"]) == {"all"}
    gains = {(g["over"], g["measure"], g["where"]): g for g in content["personal-gains"]}
    over = gains["federated", LOSS, "own"]["over-seeds"]["mean"]
    own, all_own = (content["arms"][a][LOSS]["mean"] for a in ("personal", "federated"))
    assert over == pytest.approx(all_own - own)
    assert any("personal, own" in table.columns for table in tables(content))
    again = played(config, tmp_path / "c", arms=arms, seeds=[42], left_out=[], listener=never)
    assert figures(again) == figures(content)


def test_sites_that_keep_a_part_share_one_run_of_their_own(
    settings: Settings, tmp_path: Path
) -> None:
    how = {"personalisation.name": "dual", "personalisation.steps": 2}
    config = resolved(settings, **how, **{"data.held-out-fraction": 0.3})
    content = played(config, tmp_path / "c", arms=("personal",), seeds=[42], left_out=[])
    run = tmp_path / "c" / "runs" / "personal" / "seed-42"
    told = json.loads((run / "summary.json").read_text())["personal"]["sites"]
    sites = content["arms"]["personal"]["seeds"]["42"]["sites"]
    assert {k: of[LOSS] for k, of in sites.items()} == pytest.approx(
        {k: of["personal"] for k, of in told.items()}, rel=1e-5
    )


@pytest.mark.slow
def test_with_equal_visits_the_tail_comes_out_of_the_rounds(
    settings: Settings, tmp_path: Path
) -> None:
    """4 rounds of 2 sites make 8 visits of 2 steps; 1 step at each of 4 sites makes 4 steps, which
    is one round: 3 rounds are left, with the same sum."""
    how = {
        **{"personalisation.name": "local-tail", "personalisation.steps": 1},
        **{"data.num-partitions": 4, "strategy.fraction-train": 0.5, "num-server-rounds": 4},
        **{"train.training-arguments.max-steps": 2, "data.held-out-fraction": 0.3},
    }
    config, arms = resolved(settings, **how), ("federated", "personal")
    asked = {"arms": arms, "seeds": [42], "left_out": []}
    plain = played(config, tmp_path / "c", **asked)
    content = played(config, tmp_path / "c", **asked, equal_visits=True)
    per_step = config.examples_per_step
    for of, personal in ((plain, 20), (content, 16)):
        made = {arm: of["arms"][arm]["seeds"]["42"]["example-visits"] for arm in arms}
        assert made == {"federated": 16 * per_step, "personal": personal * per_step}
    assert content["arms"]["federated"] == plain["arms"]["federated"]
    [run] = (tmp_path / "c" / "runs").glob("personal-*/seed-42")
    assert run.parent.name == "personal-3-rounds"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4  # with the start's loss
    assert "personal comes after 3 of the 4 rounds" in " ".join(notes(content))
    assert "--equal-visits" in content["command"]
    again = played(config, tmp_path / "c", **asked, equal_visits=True, listener=never)
    assert figures(again) == figures(content)
    for changes, said in (
        ({"personalisation.steps": 4}, r"make \d+ example visits.*leave no round. Set at most 3"),
        ({"personalisation.name": "none"}, "is for the arm 'personal'"),
    ):
        few = resolved(settings, **{**how, **changes})
        some = arms if few.is_personal else arms[:1]
        with pytest.raises(ConfigError, match=said):
            played(few, tmp_path / "d", **{**asked, "arms": some}, equal_visits=True)


def test_equal_visits_leave_as_many_rounds_as_every_seed_can_spare(
    settings: Settings, tmp_path: Path
) -> None:
    """Visits of 48, 10 and 10 examples, one a round. Seed 42 draws 10, 10, 48, 10, 48, 10, of which
    21 of the tails leave 115, four rounds; seed 43 draws 10, 10, 48, 10, 10, 48, and could spare
    five."""
    rows = [(ward, i) for ward, count in (("a", 60), ("b", 12), ("c", 12)) for i in range(count)]
    path = tmp_path / "uneven.jsonl"
    texts = ({"input": f"What is {w}{i}?", "output": f"It is {i}.", "ward": w} for w, i in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    arguments = "train.training-arguments."
    how = {
        **{"static.dataset.name": str(path), "data.held-out-fraction": 0.2},
        **{"data.partitioner": "natural", "data.partition-by": "ward", "data.num-partitions": 3},
        **{"strategy.fraction-train": 0.34, "num-server-rounds": 6},
        **{"personalisation.name": "local-tail", "personalisation.steps": 7},
        **{f"{arguments}max-steps": -1, f"{arguments}per-device-train-batch-size": 1},
        **{f"{arguments}gradient-accumulation-steps": 1, f"{arguments}num-train-epochs": 1},
        "defence.largest-norm": 0.0,
    }
    config = resolved(settings, **how)
    for seeds, rounds in (([43], 5), ([43, 42], 4)):
        design = Design(("federated", "personal"), seeds, equal_visits=True)
        assert Comparison(config, design, tmp_path / str(len(seeds))).rounds == rounds


def never(event: str, facts: Any) -> None:
    """Fail where a finished part is trained again."""
    assert event == "planned"
    assert facts["work"] == 0


@pytest.mark.parametrize(
    ("arms", "changes", "said"),
    [
        (("personal",), {}, "needs a recipe with personal adapters"),
        (("federated",), {"personalisation.name": "local-tail"}, "their arm is 'personal'"),
    ],
)
def test_an_arm_of_personal_adapters_and_such_a_recipe_need_each_other(
    settings: Settings, tmp_path: Path, arms: Any, changes: Settings, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        played(resolved(settings, **changes), tmp_path / "c", arms=arms)
