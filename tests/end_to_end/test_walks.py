"""The first hour of three users: a newcomer, a leaderboard researcher, a consortium's engineer.

Each walk types one command after the other and reads what the last lines said to do next.
"""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grandrounds.cli import app
from tests.end_to_end.test_published_entries import HEAD, HYPHENS
from tests.runs import config_of, summary_of

pytestmark = pytest.mark.slow

DRUGS = [f"Mend{letter}xin" for letter in "abcdefghijklmnopqrst"]

SOURCE = 'source = "../cards.csv"'


def typed(line: str, *, exit_code: int = 0) -> Result:
    """Type a command as in the README; return what it said."""
    words = shlex.split(line)
    assert words[0] == "grandrounds"
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == exit_code, f"{line}\n{result.output}"
    assert "Traceback" not in result.output
    return result


def suggested(result: Result, command: str) -> str:
    """Return the command that a result's `next:` lines suggest, beginning as given."""
    lines = [line.removeprefix("next: ") for line in result.stdout.splitlines()]
    found = [line for line in lines if f"grandrounds {command}" in line]
    assert found, result.output
    return found[0][found[0].index("grandrounds ") :].rstrip(".")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's own cards, of four wards, and his exam."""
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "cards.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer", "ward"])
        for number, drug in enumerate(DRUGS):
            for what in ("dose", "route", "onset"):
                rows.writerow([f"What is the {what} of {drug}?", f"{number} {what}", number % 4])
    exam = {"question": "What is the dose of Mendaxin?", "options": ["0 dose", "7 dose"]}
    (tmp_path / "exam.jsonl").write_text(json.dumps({**exam, "answer": "A"}) + "\n")
    return tmp_path


def test_a_newcomer_trains_on_own_cards_and_asks(desk: Path, tiny_base: Path) -> None:
    own = f"--data cards.csv --model {tiny_base} --run-dir runs/own --rounds 1"
    refused = typed(f"grandrounds run {own} --sites 4 --sites-per-round 2", exit_code=1)
    # Told by name, and to paste: the columns.
    columns = "--set data.question-column=question --set data.answer-column=answer"
    for assignment in columns.replace("--set ", "").split():
        assert f"Write {assignment}." in refused.output
    wards = "--set data.partitioner=natural --set data.partition-by=ward --sites-per-round 2"
    alpaca = "--set data.prompt-template=alpaca"  # the base of the tests has no chat template
    plan = typed(f"grandrounds plan {own} {columns} {wards} {alpaca}")
    assert "4 sites" in plan.output
    run = typed(f"grandrounds run {own} {columns} {wards} {alpaca}")
    assert summary_of(desk / "runs/own")["status"] == "completed"
    assert config_of(desk / "runs/own").data.num_partitions == 4
    typed(suggested(run, "evaluate"))
    typed("grandrounds evaluate runs/own --benchmark exam.jsonl --out exam")
    typed("grandrounds report runs/own")
    typed(f'grandrounds ask runs/own "What is the dose of {DRUGS[0]}?"')
    typed("grandrounds export runs/own --merge --to models/own")
    longer = typed("grandrounds run --resume runs/own --rounds 2")
    assert "round 2/2" in longer.output


def test_a_researcher_plans_and_runs_an_entry_and_compares(desk: Path, tiny_base: Path) -> None:
    entry = desk / "entry"
    entry.mkdir()
    settings = f'{HYPHENS}\nmodel.name = "{tiny_base}"\n'
    (entry / "pyproject.toml").write_text(f"{HEAD}\n[tool.flwr.app.config]\n{settings}")
    own = (
        f"--data cards.csv --model {tiny_base} --rounds 1 --sites 2 --sites-per-round 1 "
        "--set data.question-column=question --set data.answer-column=answer "
        "--set data.prompt-template=alpaca"
    )
    plan = typed(f"grandrounds plan entry/pyproject.toml {own}")
    assert "43,168 parameters" in plan.output
    typed(f"grandrounds run entry/pyproject.toml {own} --run-dir runs/entry")
    assert (desk / "runs/entry/peft_1/adapter_model.safetensors").is_file()
    exam = "--benchmark exam.jsonl --out exam --json"
    told = json.loads(typed(f"grandrounds evaluate runs/entry {exam}").stdout)
    assert {row["model"] for row in told["rows"]} == {"base", "peft_1"}
    compare = f"grandrounds compare entry/pyproject.toml {own} --arms federated,local --seeds 1"
    # A FlowerTune entry holds nothing out.
    refused = typed(f"{compare} --out c", exit_code=2)
    assert "data.held-out-fraction = 0 leaves no examples" in refused.output
    compared = typed(f"{compare} --out c --set data.held-out-fraction=0.1")
    assert "gain of the federation" in compared.output


def test_an_engineer_prepares_server_and_site_and_is_told_what_is_missing(desk: Path) -> None:
    typed("grandrounds consortium init --name trial --host trial.example.org --dir consortium")
    asked = typed("grandrounds site init --name st-elsewhere --dir site")
    assert "SHA256:" in asked.output
    check = "grandrounds site check --config site/site.toml"
    assert "set exactly one of data.source" in typed(check, exit_code=2).output
    settings = (desk / "site" / "site.toml").read_text().replace('source = ""', SOURCE, 1)
    (desk / "site" / "site.toml").write_text(settings)
    assert 'there is no [bases."NAME"]' in typed(check, exit_code=2).output
    (desk / "site" / "site.toml").write_text(settings + '\n[bases."formulary"]\npath = ""\n')
    found = typed(check, exit_code=1).output
    assert "error   data: " in found
    assert "the columns are: question, answer, ward" in found
    assert "admission contains it (grandrounds site join)" in found
    join = "grandrounds site join admission.json --authority consortium/authority.pub"
    early = typed(f"{join} --config site/site.toml", exit_code=2)
    assert "admission.json cannot be read" in early.output
    plan = typed(
        "grandrounds privacy plan --set privacy.unit-guarantee=example "
        "--set privacy.target-epsilon=8 --set privacy.declared-units=75"
    )
    assert "epsilon after all 24 rounds" in plan.output
    assert "may not learn" in plan.output
