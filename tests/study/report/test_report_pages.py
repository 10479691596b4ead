"""What a page says of a run: completed, failed, still going, foreign, huge."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from grandrounds.config import recipes
from grandrounds.config.keys import PLACES
from grandrounds.errors import ConfigError, DataError, RunDirectoryError
from grandrounds.study.report import client_updates, cost, learning
from grandrounds.study.report.comparison_file import read_comparison
from grandrounds.study.report.comparison_page import comparison_page
from grandrounds.study.report.figures import Page, Section
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.page import html, numeric_columns, template, write_page
from grandrounds.study.report.provenance import differing, repeat_command, value_text
from grandrounds.study.report.read import read_run
from grandrounds.study.report.several_runs import names, several_page
from grandrounds.study.tables import Table, decimals_of, duration, fixed, mib, number, percent
from tests.runs import Settings
from tests.study.report.run_files import comparison, estimate, evaluation, write, write_run


def page_of(path: Path) -> Page:
    return run_page(read_run(path))


def section(page: Page, key: str) -> Section:
    return next(s for s in page.sections if s.key == key)


def table_of(page: Page, key: str) -> Table:
    return next(f.table for f in page.figures if f.key == key)


def tile(page: Page, name: str) -> str:
    return next(t.value for t in page.tiles if t.name == name)


def commands(run: Path) -> list[tuple[str, str]]:
    return [*section(page_of(run), "repeat").commands]


def set_metrics(path: Path, **changes: Any) -> None:
    """Change keys of every training line."""
    file = path / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for each in lines[1:]:
        each |= {key.replace("_", "-"): value for key, value in changes.items()}
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))


# --- One run --------------------------------------------------------------------------------------


def test_a_completed_run_has_every_figure(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert [f.key for f in page.figures] == [
        "loss",
        "communication",
        "seconds",
        "participation",
        "coverage",
        "update-norms",
        "update-cosines",
        "aggregation-error",
        "proximal-penalty",
    ]
    assert (page.mood, page.status, page.story) == ("good", "Completed: 4 rounds", [])
    assert page.title == "Embedded base tuned on the formulary at 6 sites"
    assert page.outcome == (
        "After 4 rounds, the held-out loss fell from 2.000 to 0.400 nats per answer token."
    )
    assert tile(page, "held-out loss") == "2.000 → 0.400"
    # 3 sites a round: 4 x 3 messages down, as many up, 2 x 5 judged; half a MiB each
    assert tile(page, "communication") == "17.00 MiB"
    assert tile(page, "visits used") == "11 of 12"


def test_a_failed_run_says_what_failed_and_where(tmp_path: Path) -> None:
    reason = "Round 5: 1 of 3 sites replied well. site 2: CUDA out of memory"
    run = write_run(tmp_path / "run", planned=8, status="failed", reason=reason)
    page = page_of(run)
    assert (page.mood, page.status) == ("bad", "Failed after 4 of 8 rounds")
    assert page.story[0] == reason
    assert page.story[1].endswith("grandrounds run --resume run")  # and not where it lies
    assert page.failures == ["round 2, site 1, training: no reply within 5 s"]


def test_rounds_that_did_not_finish_are_shown_and_their_failures_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", planned=8, status="failed", reason="Round 5: no power")
    lost = {
        "after-round": 4,
        "reason": "Round 5: no power",
        "cohort": [0, 1, 2],
        "good": [0],
        "failed": {"1": "no power", "2": "no power"},
        "communication-mib": 1.25,
        "totals": {"train.down": {"messages": 3, "tensor_bytes": 1310720, "key_bytes": 0}},
        "seconds": 90.0,
    }
    (run / "unfinished.jsonl").write_text(json.dumps(lost) + "\n" + '{"after-round": 4}\n')
    page = page_of(run)
    assert "unfinished.jsonl was damaged after its first 1 line" in page.story[0]
    shown = {t.name: (t.value, t.note) for t in page.tiles}
    assert shown["visits used"] == ("11 of 15", "3 failed, 1 in rounds that did not finish")
    assert shown["wall-clock time"][1].endswith("and 1 min 30 s in rounds that did not finish")
    assert page.failures[1] == "round 5, which did not finish, site 1, training: no power"
    table = next(t for t in section(page, "cost").tables if t.title == "Rounds that did not finish")
    assert table.rows == [("4", "1.25", "2", "90.00", "Round 5: no power")]
    figure = next(f for f in page.figures if f.key == "participation")
    assert figure.note.endswith("3 failed, 2 of them in rounds that did not finish.")
    assert [row[4] for row in figure.table.rows] == ["0", "2", "1", "0", "0", "0"]
    assert "site 2, round 5: failed: no power" in figure.svg


def test_the_end_of_a_summary_without_a_reason_is_told(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", planned=8, status="stopped"))
    assert page.status == "Stopped after 4 of 8 rounds"
    assert page.story[0] == "Round 5: no reason was recorded"


def test_a_run_that_still_goes_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", planned=8, status=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "held-out')  # being written
    page = page_of(run)
    assert (page.mood, page.status) == ("going", "In progress: 4 of 8 rounds")
    assert "no summary yet" in page.story[0]
    assert len(page.figures) == 9


def test_a_run_before_its_first_round_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status=None)
    for name in ("metrics.jsonl", "sites.json", "ledger.json", "plan.json", "environment.json"):
        (run / name).unlink()
    page = page_of(run)
    assert page.status == "In progress: 0 of 4 rounds"
    assert not page.figures
    assert "<h1>Embedded base tuned on the formulary at 6 sites</h1>" in html(page)
    assert page.outcome == ""


def test_only_round_0_is_drawn_where_nothing_was_trained(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", rounds=0, planned=4, status=None))
    assert [f.key for f in page.figures] == ["loss", "communication", "seconds"]


def test_numbers_that_are_none_or_not_finite_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    set_metrics(run, train_loss=float("nan"), held_out_loss=None, coverage=None)
    page = page_of(run)
    assert table_of(page, "loss").rows == [("0", "2.000", "-")]
    assert ">nan<" not in html(page)


def test_uploads_are_split_by_replies_unless_they_were_recorded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    # 12 messages of half a MiB in the ledger, 11 replies with an update, 2 of them in round 2
    shares = [6 * n / 11 for n in (0, 3, 5, 8, 11)]
    assert [v for _, v in cost.uploaded(read_run(run))] == pytest.approx(shares)
    file = run / "metrics.jsonl"
    up = ', "communication-up-mib": 1.5}\n'
    file.write_text(file.read_text().replace("}\n", up))
    assert cost.uploaded(read_run(run)) == [(r, 1.5) for r in range(5)]


def test_the_plan_ends_at_its_total(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    plan = cost.planned(run)
    assert plan[0] == (0, 1.0)  # two sites judge the base
    assert plan[-1] == (4, run.plan["total-mib"])


def test_participation_names_who_trained_and_who_failed(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    rows = {row[0]: row[1:] for row in table_of(page, "participation").rows}
    assert rows["1"] == ("71", "4", "1", "1")  # rounds 2 and 4; round 2 failed
    svg = next(f.svg for f in page.figures if f.key == "participation")
    assert "site 1, round 2: failed: no reply within 5 s" in svg
    assert svg.count('class="cross"') == 1


def test_a_site_that_was_never_drawn_is_named(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", rounds=1, planned=9, status=None))
    note = next(f.note for f in page.figures if f.key == "coverage")
    assert note == (
        "Share of the training examples seen at least once. Overall: 50.0 %. "
        "Not visited yet: 0, 1, 2."
    )


# --- Updates --------------------------------------------------------------------------------------


def test_an_update_that_stands_out_is_named_and_ringed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=1)
    norms = {"3": 1.0, "4": 6.0, "5": 1.2}
    set_metrics(run, update_norms=norms, update_cosines={"3": 0.6, "4": -0.3, "5": 0.5})
    length, direction = client_updates.update_figures(read_run(run))
    assert length.note.startswith("Outliers: site 4 in round 1 (5 times the median).")
    assert direction.note.startswith("Outliers: site 4 in round 1 (cosine -0.3).")
    for figure in (length, direction):
        assert figure.svg.count('class="ring"') == 1
        assert '<text x="' in figure.svg
        assert 'class="flag">site 4</text>' in figure.svg


def test_an_update_that_a_screen_rejected_is_named_and_ringed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=1)
    set_metrics(run, update_cosines={"3": 0.6, "4": 0.069, "5": 0.5}, failed={"4": "its update"})
    [_, direction] = client_updates.update_figures(read_run(run))
    assert direction.note.startswith("Rejected by the screen: site 4 in round 1 (cosine 0.069).")
    assert direction.note.endswith("or rejected.")
    assert direction.svg.count('class="ring"') == 1


def test_updates_that_are_alike_do_not_stand_out(tmp_path: Path) -> None:
    for figure in client_updates.update_figures(read_run(write_run(tmp_path / "run"))):
        assert figure.note.startswith("No outliers.")
        assert "ring" not in figure.svg


def test_of_two_updates_neither_stands_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=1)
    set_metrics(run, update_norms={"3": 1.0, "4": 9.0})
    [length, _] = client_updates.update_figures(read_run(run))
    assert length.note.startswith("No outliers.")


def test_what_a_rule_cuts_and_the_rank_it_keeps_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", strategy__name="flora")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for each in lines[1:]:
        del each["product-error-of-update"]
        each |= {"truncation-error": 0.2, "rank": 16 * each["round"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    page = page_of(run)
    assert table_of(page, "aggregation-error").columns == ("round", "rank truncation")
    assert table_of(page, "rank").rows[-1] == ("4", "64")


# --- Accuracy -------------------------------------------------------------------------------------


def test_accuracy_is_drawn_by_checkpoint_with_the_base_across(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write(run / "evaluation/evaluation.json", evaluation())
    (run / "peft_2").mkdir()
    write(run / "peft_2/evaluation/evaluation.json", evaluation("peft_2", 55))
    page = page_of(run)
    [figure] = [f for f in page.figures if f.key == "accuracy-1"]
    assert [row[1:4] for row in figure.table.rows] == [
        ("base", "50/100", "50.0 %"),
        ("peft_4", "60/100", "60.0 %"),
        ("peft_2", "55/100", "55.0 %"),
    ]
    assert figure.svg.count('class="whisker"') == 2
    assert figure.svg.count('class="band"') == 1
    assert tile(page, "private facts") == "50.0 → 60.0 %"


def test_the_only_checkpoint_that_was_asked_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write(run / "evaluation/evaluation.json", evaluation())
    note = next(f.note for f in page_of(run).figures if f.key == "accuracy-1")
    said = "Only the checkpoint of round 4 (peft_4) was evaluated"
    assert note.endswith(f"{said}; the run directory holds no other.")
    (run / "peft_2").mkdir()
    note = next(f.note for f in page_of(run).figures if f.key == "accuracy-1")
    assert note.endswith(f"{said}. To evaluate another: grandrounds evaluate run/peft_2")


def test_both_protocols_have_a_figure_each(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    other = {**evaluation(), "protocol": "flowertune"}
    both = {"protocol": "all", "evaluations": [evaluation(), other]}
    write(run / "evaluation/evaluation.json", both)
    assert [f.key for f in page_of(run).figures][1:3] == ["accuracy-1", "accuracy-2"]


def test_without_an_evaluation_the_runs_own_questions_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    asked = {"private": {"base": {"correct": 69, "n": 300}, "tuned": {"correct": 119, "n": 300}}}
    write(run / "summary.json", {"status": "completed", "formulary": asked})
    [base, tuned] = learning.scores(read_run(run))
    assert tuned.round == 4
    assert base.interval == pytest.approx((0.186, 0.281), abs=5e-4)  # as grandrounds run prints it


# --- Words ----------------------------------------------------------------------------------------


def test_the_command_to_repeat_means_the_same_configuration(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        model__name="my models/a 'base'",
        static__dataset__name="true",
        communication__uplink_codec="int4",
    )
    config = read_run(run).config
    words = shlex.split(repeat_command(config))
    assert words[:2] == ["grandrounds", "run"]
    assert words[2::2] == ["--set"] * len(differing(config))
    again = recipes.resolve(recipes.parse_overrides(words[3::2]))
    assert again.flat() == config.flat()
    first = shlex.split(commands(run)[0][1])
    assert first == ["grandrounds", "run", "--config", "run/config.toml"]


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, []),
        ({"data.partitioner": "iid"}, ["--set", "data.partitioner=iid"]),
        ({"static.dataset.name": "cards.csv"}, ["--set", "static.dataset.name=cards.csv"]),
    ],
)
def test_what_auto_stands_for_is_no_change_of_a_default(changes: Settings, more: list[str]) -> None:
    config = recipes.resolve(changes)
    assert shlex.split(repeat_command(config)) == ["grandrounds", "run", *more]


def test_a_run_of_real_sites_is_repeated_with_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sites = json.loads((run / "sites.json").read_text())
    (run / "sites.json").write_text(json.dumps([{**s, "base-content": "ab"} for s in sites]))
    for _, command in commands(run):
        assert command.endswith(" --engine deployment --connection NAME")


def test_the_recipe_tells_first_what_is_not_as_packaged(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", seed=7))
    _, other, rest = section(page, "recipe").tables
    assert ("seed", "7", "42") in other.rows
    assert len(other.rows) + len(rest.rows) == len(recipes.resolve().flat()) - len(PLACES)
    assert [value_text(v) for v in (True, "", 5e-3, 16, 0.1 + 0.2)] == [
        "true",
        '""',
        "0.005",
        "16",
        "0.30000000000000004",
    ]


def test_versions_and_hashes_are_listed(tmp_path: Path) -> None:
    versions, at_sites, hashes = section(page_of(write_run(tmp_path / "run")), "environment").tables
    assert ("bitsandbytes", "not installed") in versions.rows
    assert ("base (fingerprint)", "2e56fa25ddb7668c") in at_sites.rows
    # sha256sum of the seven bytes `weights`
    assert dict(hashes.rows)["peft_4/adapter_model.safetensors"].startswith("9a129038d9a00aed")


def test_a_column_is_given_the_decimals_of_its_largest_value() -> None:
    assert decimals_of([0.0256, -0.33, None]) == 3
    assert decimals_of([1.4e-5, 0.02], 4) == 5
    assert [decimals_of(v) for v in ([], [0.0], [640.0], [1e-30])] == [0, 0, 0, 8]
    assert decimals_of([640.0], least=1) == 1
    assert [fixed(v, 2) for v in (-0.0256, -0.001, 1234.5, None)] == [
        "-0.03",
        "0.00",
        "1,234.50",
        "-",
    ]
    assert [fixed(v, 1, sign=True) for v in (0.25, -0.25, 0.0)] == ["+0.2", "-0.2", "0.0"]


def test_columns_of_a_run_have_as_many_decimals(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    losses = table_of(page, "loss").rows
    assert losses[0][1:] == ("2.000", "-")
    assert losses[3][1:] == ("0.500", "0.500")
    assert table_of(page, "communication").rows[0] == ("0", "1.00", "0.00", "1.00", "1.00")
    assert table_of(page, "update-norms").rows[0][1:4] == ("1.00", "1.00", "1.00")
    # the smallest, 0.1 / 4, has two digits
    assert [row[1] for row in table_of(page, "proximal-penalty").rows] == [
        "0.100",
        "0.050",
        "0.033",
        "0.025",
    ]


def test_no_table_scrolls_up_and_down_by_itself() -> None:
    style = template("page.css")
    assert "max-height" not in style
    assert "overflow-y" not in style


def test_a_value_of_the_headline_stays_on_one_line() -> None:
    [rule] = re.findall(r"^\.tile \.value \{([^}]*)\}", template("page.css"), re.MULTILINE)
    assert "white-space: nowrap" in rule


def test_the_plan_is_seen_below_what_was_sent(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    figure = next(f for f in page.figures if f.key == "communication")
    assert figure.svg.count('class="wide"') == 2  # in the legend, and the line
    assert "Wide pale line: the planned total" in figure.note


def test_numbers_are_written_short() -> None:
    assert [number(v) for v in (0.52276, 12345.6, 3, None, "x", True)] == [
        "0.5228",
        "12,346",
        "3",
        "-",
        "-",
        "-",
    ]
    assert (percent(0.3967), percent(None), mib(36.4885)) == ("39.7 %", "-", "36.49 MiB")
    assert [duration(s) for s in (5.24, 75, 3700)] == ["5.2 s", "1 min 15 s", "1 h 1 min"]
    assert numeric_columns(Table(("a", "b"), [("site", "1"), ("x", "-")])) == {1}


# --- Names and places -----------------------------------------------------------------------------


def test_sites_stand_under_their_names_in_figures_tables_and_failures(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sites = json.loads((run / "sites.json").read_text())
    named = [{**site, "name": f"Ward {'ABCDEF'[site['partition-id']]}"} for site in sites]
    named[5]["name"] = named[4]["name"] = "\u202eTwin\n"
    write(run / "sites.json", named)
    page = page_of(run)
    labels = ["Ward A", "Ward B", "Ward C", "Ward D", "Twin (site 4)", "Twin (site 5)"]
    assert [row[0] for row in table_of(page, "participation").rows] == labels
    assert [row[0] for row in table_of(page, "coverage").rows] == labels
    assert [row[0] for row in table_of(page, "update-norms").rows] == labels
    assert page.failures == ["round 2, Ward B, training: no reply within 5 s"]
    for key in ("participation", "coverage"):
        svg = next(f.svg for f in page.figures if f.key == key)
        assert all(label in svg for label in labels)
    assert "site 1" not in html(page)


def test_data_that_sites_brought_are_theirs_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    sites = json.loads((run / "sites.json").read_text())
    write(run / "sites.json", [{**site, "base-content": "0f"} for site in sites])
    page = page_of(run)
    assert page.title == "Embedded base tuned on the data of 6 sites"
    assert "Data: each site's own, 6 sites" in page.subtitle
    assert "never read English" in page.story[0]
    assert "eaderboard" not in html(page)


def test_forgetting_is_told_in_words_and_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    kinds = {"private": (69, 294), "public": (300, 245)}
    asked = {
        kind: {"base": {"correct": a, "n": 300}, "tuned": {"correct": b, "n": 300}}
        for kind, (a, b) in kinds.items()
    }
    write(run / "summary.json", {"status": "completed", "formulary": asked})
    page = page_of(run)
    private, public = page.tiles[:2]
    assert (private.mood, public.mood) == ("", "bad")
    assert public.note.startswith("18.3 points forgotten; 245/300")
    assert page.outcome.endswith(
        "and accuracy on private facts went from 23.0 to 98.0 %. "
        "It forgot 18.3 points of the facts that the base knew."
    )
    assert 'class="tile lost"' in html(page)

    other = write_run(tmp_path / "other", model__name="HuggingFaceTB/SmolLM2-135M")
    write(other / "summary.json", {"status": "completed", "formulary": asked})
    page = page_of(other)  # whose base never knew the fictional facts
    assert page.tiles[1].note.startswith("18.3 points below the base; 245/300")
    assert "forg" not in page.outcome.lower()
    assert "known to the base" not in html(page)


def test_no_page_names_an_absolute_path(tmp_path: Path) -> None:
    places = {"model__name": "/srv/a base/tiny", "static__dataset__name": "/home/me/c/cards.jsonl"}
    reason = "Round 5: no file /home/ward/secret/x.csv nor C:\\Users\\me\\y.csv"
    run = write_run(tmp_path / "a", planned=8, status="failed", reason=reason, **places)
    other = write_run(tmp_path / "b" / "run", **places)
    pages = [page_of(run), several_page([read_run(run), read_run(other)])]
    content = {**comparison(), "command": f"grandrounds compare --out {tmp_path}/wards"}
    content["config"] = read_run(run).config.flat()
    file = tmp_path / "wards" / "comparison.json"
    write(file, content)
    pages.append(comparison_page(read_comparison(file), file))
    for page in pages:
        text = html(page)
        for folder in (str(tmp_path), "/srv", "/home", "secret", "Users"):
            assert folder not in text
    assert pages[0].title == "tiny tuned on cards.jsonl at 6 sites"
    assert pages[0].story[0] == "Round 5: no file x.csv nor y.csv"
    assert pages[2].sections[4].commands[0][1] == "grandrounds compare --out wards"


# --- Untrusted text -------------------------------------------------------------------------------

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run<b>&",
        status="failed",
        reason=EVIL,
        model__name=EVIL,
        static__dataset__name=f"data/{EVIL}",
    )
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("no reply within 5 s", EVIL))
    sites = json.loads((run / "sites.json").read_text())
    write(run / "sites.json", [{**site, "name": f"<b>{EVIL}"} for site in sites])
    write(run / "evaluation/evaluation.json", evaluation())
    asked = (run / "evaluation/evaluation.json").read_text()
    (run / "evaluation/evaluation.json").write_text(asked.replace("Formulary (fictional)", EVIL))
    write(run / "environment.json", {"python": EVIL, "packages": {EVIL: EVIL}})
    content = html(page_of(run))
    assert content.count("<script>") == 1
    assert "<img" not in content
    assert content.count("&lt;script&gt;alert(1)") > 5
    assert "<b>" not in content


def test_the_page_admits_its_own_style_and_script_and_no_request(tmp_path: Path) -> None:
    content = html(page_of(write_run(tmp_path / "run")))
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]+)"', content)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    linked = re.findall(r'(?:src|href)="([^"]*)"', content)
    assert all(link.startswith(("#", "data:,")) for link in linked)
    assert not re.search(r'style="|@import|url\(', content)


def test_a_long_run_of_many_sites_stays_below_3_mb(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds=300, sites=200, cohort=40)
    content = html(page_of(run))
    assert len(content.encode()) < 3_000_000


# --- Bad input ------------------------------------------------------------------------------------


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"is not a run directory: it has no config\.toml"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", "[1]\n", "(line 1: has no round)"),
        ("metrics.jsonl", "{x}\n", "(line 1: Expecting property name"),
        ("summary.json", "[]", "(holds a list, not the dict of a run)"),
        ("ledger.json", "{", "(Expecting property name"),
        ("plan.json", "[" * 100_000, "(maximum recursion depth exceeded"),
        ("sites.json", "[{}]", "(an entry is not a site)"),
        ("evaluation/evaluation.json", '{"protocol": "x", "rows": [{}]}', "evaluate again"),
        ("environment.json", "\0", "(Expecting value"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    run = write_run(tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)
    [unread] = read_run(run).unread
    assert unread.startswith(f"{name} ")
    assert words in unread
    page = page_of(run)
    assert page.story[0] == f"Not readable: {unread}."
    assert html(page)


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.toml").write_text('"seeed" = 1')
    with pytest.raises(RunDirectoryError, match=r"config\.toml.*Did you mean 'seed'"):
        read_run(run)


def test_the_copies_of_a_state_are_shown_where_the_files_are_damaged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    state = run / "state" / "round-000004"
    state.mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl"):
        (state / name).write_bytes((run / name).read_bytes())
        (run / name).write_bytes((run / name).read_bytes()[:100] + bytes(100) + b"\n")
    found = read_run(run)
    assert [m["round"] for m in found.metrics] == [0, 1, 2, 3, 4]
    assert found.planned_rounds == 4
    assert [line.split(" ")[0] for line in found.unread] == ["config.toml", "metrics.jsonl"]
    assert all("; shown is the copy of round-000004" in line for line in found.unread)


def test_a_page_is_not_written_over_something_else(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    target = tmp_path / "report.html"
    assert write_page(page, target) == target.stat().st_size
    write_page(page, target)  # its own it may
    target.write_text("<html>thesis</html>")
    with pytest.raises(DataError, match="is not a report of grandrounds"):
        write_page(page, target)
    assert target.read_text() == "<html>thesis</html>"


# --- Several runs ---------------------------------------------------------------------------------


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", rounds=6, seed=7),
        write_run(tmp_path / "c", planned=9, status="failed", reason="out of memory"),
    ]
    page = several_page([read_run(p) for p in paths])
    assert (page.mood, page.status) == ("bad", "2 of 3 runs completed")
    assert page.story == ["c: Round 5: out of memory"]
    table = table_of(page, "held-out-loss")
    assert table.columns == ("round", "a", "b", "c")
    assert table.rows[-1] == ("6", "-", "0.286", "-")
    [side] = section(page, "table").tables
    assert side.rows[0] == (
        "status",
        "Completed: 4 rounds",
        "Completed: 6 rounds",
        "Failed after 4 of 9 rounds",
    )
    [recipe] = section(page, "recipe").tables
    assert ("seed", "42", "7", "42") in recipe.rows
    assert "differ in seed" in section(page, "learning").notes[0]


def test_runs_are_judged_alike_only_where_recipe_sites_and_their_answers_are_the_same(
    tmp_path: Path,
) -> None:
    same = [write_run(tmp_path / name) for name in ("a", "b")]
    others = {
        "data.dirichlet-alpha, so": write_run(tmp_path / "c", **{"data__dirichlet_alpha": 0.1}),
        "the sites that evaluated": write_run(tmp_path / "d"),
        "at the roll call (held-out-examples)": write_run(tmp_path / "e"),
    }
    set_metrics(tmp_path / "d", evaluated=[0, 2])
    sites = json.loads((tmp_path / "e/sites.json").read_text())
    sites[1]["held-out-examples"] = 5
    write(tmp_path / "e/sites.json", sites)

    def caution(*paths: Path) -> str:
        return section(several_page([read_run(p) for p in paths]), "learning").notes[0]

    assert caution(*same) == "All runs are evaluated on the same held-out examples."
    for said, run in others.items():
        assert said in caution(same[0], run)
    for path in same:
        file = path / "metrics.jsonl"
        file.write_text(file.read_text().replace('"held-out-loss"', '"unknown"'))
    assert caution(*same) == "No run measured a held-out loss."
    assert "Round 0" not in next(f for f in page_of(same[0]).figures if f.key == "loss").note


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / folder / "run")) for folder in ("x", "y")]
    assert list(names(runs)) == ["x/run", "y/run"]
    with pytest.raises(ConfigError, match="given twice"):
        names([runs[0], runs[0]])


# --- Comparison -----------------------------------------------------------------------------------


def comparison_file(tmp_path: Path, **changes: Any) -> Path:
    write(tmp_path / "wards/comparison.json", {**comparison(), **changes})
    return tmp_path / "wards/comparison.json"


def test_a_comparison_shows_arms_sites_and_what_joining_gains(tmp_path: Path) -> None:
    file = comparison_file(tmp_path)
    page = comparison_page(read_comparison(file), file)
    assert [f.key for f in page.figures] == [
        "arms-held-out-loss",
        "arms-private",
        "arms-public",
        "joining-local-own-held-out-loss",
        "joining-local-own-private",
        "joining-local-everywhere-held-out-loss",
        "joining-local-everywhere-private",
        "sites-held-out-loss",
        "sites-private",
    ]
    assert table_of(page, "arms-private").rows[1] == ("federated", "80.0 % (70.0 to 90.0)", "2")
    assert page.outcome == (
        "Private facts: 80.0 % (federated), against 25.0 % (base), 55.0 % (local, own part), "
        "30.0 % (local, everywhere)."
    )
    assert "only 9 held-out examples in all" in " ".join(page.sections[0].notes)
    arms = [row[0] for row in table_of(page, "arms-private").rows]
    assert arms == ["base", "federated", "local, own part", "local, everywhere"]
    assert table_of(page, "sites-private").columns == ("site", *arms)
    joined = ("0", "25.0 points (10.0 to 40.0)", "0.010")
    assert table_of(page, "joining-local-own-private").rows[0] == joined
    assert tile(page, "federated over local, own part: private") == "+25.0 points"
    assert next(t.note for t in page.tiles if "private" in t.name) == "better at 2 of 3 sites"
    assert "20 sites, natural by site; seeds 42, 43" in page.subtitle
    losses, shares, asked = section(page, "tests").tables
    assert not losses.rows
    assert shares.rows[1][5] == "2 / 1 / 0"
    questions = asked.rows[0]
    assert questions[-3:] == ("90 / 15", "25.0 points (18.0 to 32.0)", "< 0.001")
    assert "grandrounds compare --seeds 2 --out wards" in html(page)


def test_equal_scores_are_equal_and_printed_as_0(tmp_path: Path) -> None:
    """A comparison written before rounding errors were told apart has 2.78e-17 in it."""
    equal = {"mean": 2.78e-17, "interval": [-2e-17, 7e-17], "n": 2, "p": 0.4}
    content = comparison()
    content["gains"][0] |= {"over-seeds": equal}
    content["gains"][0]["over-sites"] |= {"better": 1, "worse": 0, "equal": 2}
    for joining, site in zip(content["joining"], range(3), strict=True):
        gain = equal if site < 2 else {**equal, "mean": 0.25, "interval": [0.1, 0.4]}
        joining["own"] = {"held-out-loss": gain, "accuracy": {"private": gain}}
    page = comparison_page(content, tmp_path / "comparison.json")
    [told] = [t for t in page.tiles if "private" in t.name]
    assert (told.value, told.note) == ("0 points", "better at 1 of 3 sites, equal at 2")
    figure = next(f for f in page.figures if f.key == "joining-local-own-private")
    assert figure.note == "Better off: 1 of 3 sites. Unchanged: 2."
    assert figure.table.rows[0][1] == "0.0 points (0.0 to 0.0)"
    assert "gain 0.0 points" in figure.svg
    assert "e-1" not in html(page)


def test_an_interval_of_a_share_ends_at_0_and_100(tmp_path: Path) -> None:
    content = comparison()
    content["arms"]["base"]["accuracy"]["private"] = {**estimate(0.971), "interval": [0.92, 1.02]}
    content["arms"]["local"]["accuracy"]["private"] = {**estimate(0.02), "interval": [-0.1, 0.14]}
    wide = {"mean": 0.9, "interval": [-1.4, 3.2], "n": 2, "p": 0.1}
    content["joining"][0]["own"]["accuracy"]["private"] = wide
    content["arms"]["base"]["held-out-loss"] = {**estimate(0.2), "interval": [-0.1, 0.5]}
    runs = content["arms"]["base"]["seeds"]
    content["arms"]["base"]["seeds"] = {s: {**r, "failed-replies": 3} for s, r in runs.items()}
    page = comparison_page(content, tmp_path / "comparison.json")
    [table] = section(page, "arms").tables
    shown = {row[0]: row[2] for row in table.rows}
    assert shown["base"] == "97.1 % (92.0 to 100.0)"
    assert shown["local, own part"] == "2.0 % (0.0 to 14.0)"
    assert table.rows[0][1] == "0.200 (0.000 to 0.500)"
    assert table.rows[0][table.columns.index("failed replies")] == "6"
    joined = table_of(page, "joining-local-own-private").rows[0]
    assert joined[1] == "90.0 points (-100.0 to 100.0)"


def test_a_column_of_a_comparison_has_as_many_decimals(tmp_path: Path) -> None:
    content = comparison()
    content["joining"].append({**content["joining"][0], "site": 3})
    means = (-0.0256, -0.33, -0.081, 2.78e-15)
    for joining, mean in zip(content["joining"], means, strict=True):
        gain = {"mean": mean, "interval": None, "n": 1, "p": None}
        joining["own"] = {"held-out-loss": gain, "accuracy": {"private": gain}}
    page = comparison_page(content, tmp_path / "comparison.json")
    losses = table_of(page, "joining-local-own-held-out-loss").rows
    assert [row[1] for row in losses] == ["-0.026", "-0.330", "-0.081", "0.000"]
    figure = next(f for f in page.figures if f.key == "joining-local-own-held-out-loss")
    at_the_end = re.findall(r'class="value">([^<]+)<', figure.svg)
    assert at_the_end == ["-0.026", "-0.330", "-0.081", "0.000"]
    shares = table_of(page, "joining-local-own-private").rows
    points = [row[1].removesuffix(" points") for row in shares]
    assert points == ["-2.6", "-33.0", "-8.1", "0.0"]


def test_an_unfinished_comparison_says_how_to_go_on(tmp_path: Path) -> None:
    empty = {"arms": {}, "gains": [], "joining": [], "units": {"done": 0, "planned": 10}}
    file = comparison_file(tmp_path, status="unfinished", **empty)
    page = comparison_page(read_comparison(file), file)
    assert page.status == "0 of 10 units finished"
    assert "grandrounds compare --seeds 2 --out wards" in page.story[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "has format 2, but this version reads 1"),
        ({"arms": 3}, "is not a comparison"),
        ({"gains": [{}]}, "is not what grandrounds compare writes"),
        ({"joining": [{}]}, "is not what grandrounds compare writes"),
    ],
)
def test_what_is_no_comparison_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    file = comparison_file(tmp_path, **changes)
    with pytest.raises(DataError, match=words):
        comparison_page(read_comparison(file), file)
