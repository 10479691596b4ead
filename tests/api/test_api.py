"""The Python API does what the commands do, and returns objects that show themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import grandrounds as gr
from grandrounds.api import results
from grandrounds.api.html import as_html
from grandrounds.errors import ConfigError, RunDirectoryError
from grandrounds.server.listeners import Facts, Listener
from grandrounds.study.tables import Table

SMALL = {
    "train.training-arguments.max-steps": 1,
    "train.num-threads": 1,
    "data.partitioner": "iid",
}
"""One step a visit."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> results.Run:
    """Two rounds of the embedded run."""
    place = tmp_path_factory.mktemp("api") / "run"
    return gr.run(settings=SMALL, rounds=2, run_dir=place, progress=False)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, grandrounds as gr; gr.recipe; "
        "print([n for n in ('torch', 'flwr', 'transformers', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_is_an_object_with_its_files(run: results.Run) -> None:
    assert run.status == "completed"
    assert run.summary["status"] == "completed"
    assert [line["round"] for line in run.metrics] == [0, 1, 2]
    assert len(run.sites) == run.config.data.num_partitions == 20
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run.checkpoint(2) == run.adapter
    assert gr.open_run(run.path) == run
    shown = run._repr_html_()
    assert "completed" in shown
    assert "2 of 2" in shown
    assert repr(run) == f"Run('{run.path}')"


@pytest.mark.slow
def test_it_gives_the_bits_of_the_command(run: results.Run, tmp_path: Path) -> None:
    words = [f"--set={key}={value}" for key, value in SMALL.items()]
    command = ["run", "--rounds", "2", "--run-dir", str(tmp_path / "same"), "-q", *words]
    code = "import sys; from grandrounds.__main__ import main; main()"
    subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True)
    same = gr.open_run(tmp_path / "same")
    weights = "adapter_model.safetensors"
    assert (same.adapter / weights).read_bytes() == (run.adapter / weights).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_to_more_rounds(tmp_path: Path) -> None:
    started = gr.run(settings=SMALL, rounds=1, run_dir=tmp_path / "run", progress=False)
    longer = gr.run(resume=started, rounds=2, progress=False)
    assert longer == started
    assert [line["round"] for line in longer.metrics] == [0, 1, 2]
    with pytest.raises(ConfigError, match="leave --run-dir out"):
        gr.run(resume=started, run_dir=tmp_path / "other")
    with pytest.raises(ConfigError, match="from_round belongs to resume"):
        gr.run(from_round=1)


@pytest.mark.slow
def test_progress_is_printed_or_goes_to_a_listener(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds: list[int] = []

    class Counting(Listener):
        def on_round(self, record: Facts) -> None:
            rounds.append(record["round"])

    gr.run(settings=SMALL, rounds=1, run_dir=tmp_path / "a", progress=Counting())
    assert rounds == [0, 1]
    assert capsys.readouterr().out == ""
    gr.run(settings=SMALL, rounds=1, run_dir=tmp_path / "b")
    assert "round 1/1" in capsys.readouterr().out


def test_a_recipe_is_changed_without_being_touched() -> None:
    recipe = gr.recipe("jsl-medllama-3-8b", seed=7)
    assert recipe.keys["seed"] == 7
    changed = recipe.change({"strategy.proximal-mu": 0.1}, rounds=4)
    assert changed.keys["strategy.proximal-mu"] == 0.1
    assert (changed.keys["num-server-rounds"], recipe.keys["num-server-rounds"]) == (4, 10)
    assert "num-server-rounds</td><td>4<" in changed._repr_html_()
    assert repr(changed).startswith("Asked('jsl-medllama-3-8b', {")
    assert gr.plan(changed).total_mib * 10 == pytest.approx(gr.plan(recipe).total_mib * 4)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: gr.recipe("jsl-medllama"), "Did you mean"),
        (lambda: gr.recipe(settings={"lr": 1e-3}), "train.learning-rate-max"),
        (lambda: gr.recipe(round=3), "There is no option round. Did you mean 'rounds'?"),
        (lambda: gr.recipe(elsewhere=True), "There is no option elsewhere."),
        (lambda: gr.plan(may_load=3), "There is no option may_load."),
        (lambda: gr.run(run_dir=5), "run_dir = 5 must be a path"),  # type: ignore[arg-type]
        (lambda: gr.open_run(5), "5 is no run"),  # type: ignore[arg-type]
        (lambda: gr.run(engine="deployment"), "engine = 'deployment' must be"),  # type: ignore[arg-type]
        (lambda: gr.run(client_cpus=2), "belong to engine = 'simulation'"),
        (lambda: gr.recipe().change(elsewhere=True), "There is no option elsewhere."),
        (lambda: gr.compare(settings={"run-directory": "r"}), "run-directory is for single runs"),
        (lambda: gr.compare(arms=["federatd"]), "Did you mean 'federated'?"),
        (lambda: gr.evaluate("none", base="formulary", benchmarks=["medqua"]), "medqa"),
    ],
)
def test_bad_input_is_told(call: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        call()


def test_a_missing_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError):
        gr.open_run(tmp_path)


@pytest.mark.slow
def test_evaluation_plan_and_report_show_what_the_commands_print(
    run: results.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = gr.evaluate(run, limit=20, out=tmp_path / "evaluation")
    assert "likelihood  peft_2  Formulary" in capsys.readouterr().out
    assert (asked.path / "evaluation.json").is_file()
    assert "<table>" in asked._repr_html_()
    assert [table.title for table in asked.tables()]
    page = gr.report(run, out=tmp_path / "page.html")
    assert "<html" in page.read_text()
    plan = gr.plan(settings=SMALL, rounds=2)
    assert plan.total_mib == pytest.approx(run.summary["communication_mib"])
    assert plan.content["communication"]
    assert "communication" in plan._repr_html_()
    assert repr(plan) == f"Plan({plan.total_mib:,.2f} MiB)"
    assert repr(asked) == f"Evaluation('{asked.path}')"


@pytest.mark.slow
def test_a_comparison_is_an_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same: dict[str, Any] = {"arms": ["federated", "local"]}
    small: dict[str, Any] = {"settings": SMALL, "rounds": 1, "sites": 3, "sites_per_round": 2}
    found = gr.compare(**small, **same, out=tmp_path / "compared")
    assert (found.path / "comparison.json").is_file()
    assert {row[0] for row in found.tables()[0].rows} >= {"federated", "local"}
    assert "<table>" in found._repr_html_()
    assert "<html" in gr.report(found).read_text()
    said = capsys.readouterr().out
    assert re.search(r"^5/5  local, seed 42, .*: loss ", said, re.MULTILINE)
    again = gr.compare(found.path / "config.toml", **same, out=found.path, progress=False)
    assert again.content["arms"] == found.content["arms"]
    assert capsys.readouterr().out == ""


def test_no_text_of_a_table_is_markup() -> None:
    shown = as_html([Table(("<b>",), [("<script>",)], "a & b")], ["1 < 2\x1b[0m"])
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "a &amp; b" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: gr.recipe(5), "5 is no recipe"),  # type: ignore[arg-type]
        (lambda: gr.recipe("x" * 5000), "cannot be read: File name too long"),
        (lambda: gr.recipe(None, "a=1"), "must be a mapping"),  # type: ignore[arg-type]
        (lambda: gr.recipe(sites_per_round="a"), "sites_per_round = 'a' must be an integer"),
        (lambda: gr.recipe(sites_per_round=2.5), "sites_per_round = 2.5 must be an integer"),
        (lambda: gr.run(engine="simulation", client_cpus=0), "client_cpus = 0"),
        (lambda: gr.run(engine="simulation", client_gpus=float("nan")), "client_gpus = nan"),
        (lambda: gr.run(resume=5), "5 is no run"),  # type: ignore[arg-type]
        (lambda: gr.evaluate(None), "None is no run"),  # type: ignore[arg-type]
        (lambda: gr.compare(seeds=1.5), "seeds = 1.5 must be an integer"),  # type: ignore[arg-type]
        (lambda: gr.plan(rows=-1), "rows = -1"),
        (lambda: gr.plan(rows=True), "rows = True must be an integer of at least 1"),
        (lambda: gr.plan(architecture=5), "architecture = 5 must be a string"),  # type: ignore[arg-type]
        (lambda: gr.report(), "no target"),
        (lambda: gr.report("r", out=5), "out = 5 must be a path"),  # type: ignore[arg-type]
        (lambda: gr.run(progress=5), "progress = 5 must be True, False"),  # type: ignore[arg-type]
        (lambda: gr.run(run_dir="a\0b"), r"run_dir = 'a.x00b' has a NUL character"),
        (lambda: gr.run(settings={"run-directory": "a\0"}), r"run-directory = 'a.x00' is not"),
        (lambda: gr.open_run("a\0b"), r"path = 'a.x00b' has a NUL character"),
        (lambda: gr.compare(out="a\0b"), r"out = 'a.x00b' has a NUL character"),
        (lambda: gr.compare(seeds=[-1]), r"seeds = \[-1\] must be an integer of at least 1"),  # type: ignore[arg-type]
        (lambda: gr.compare(arms="local"), r"arms = 'local' must be a list of names, such"),
        (lambda: gr.compare(left_out=5), r"left_out = 5 must be a list of sites"),  # type: ignore[arg-type]
        (lambda: gr.compare(left_out=[99]), "left_out '99': 99 is not a site; allowed: all, or"),
        (lambda: gr.evaluate("none", benchmarks=5), "benchmarks = 5 must be a list"),  # type: ignore[arg-type]
        (lambda: gr.evaluate("none", benchmarks="medqa"), "benchmarks = 'medqa' must be a list"),
        (lambda: gr.evaluate("none", exams="exam.csv"), "exams = 'exam.csv' must be a list"),
        (lambda: gr.evaluate("none", limit="5"), "limit = '5' must be an integer"),  # type: ignore[arg-type]
        (lambda: gr.evaluate("none", protocol=5), "protocol = 5 must be a string"),  # type: ignore[arg-type]
        (lambda: gr.evaluate("none"), "target 'none' needs a base model"),
    ],
)
def test_what_no_call_takes_is_told_in_one_line(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        call()
