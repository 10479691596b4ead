"""`grandrounds plan` as a person meets it: tables, JSON, comparisons, errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from grandrounds.cli import app
from tests.places import ROOT

JSL = str(ROOT / "configs" / "jsl-medllama-3-8b-100-rounds.toml")
LAPTOP = str(ROOT / "configs" / "smollm2-135m-laptop.toml")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def told(*arguments: str) -> tuple[int, str]:
    """Return exit code and message of a call that is refused before it prints anything."""
    result = plan(*arguments)
    assert result.stdout == ""
    assert result.stderr.startswith("grandrounds: ")
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


def row(output: str, name: str) -> str:
    """Return what stands behind a row's name, single blanks between."""
    [line] = [line for line in output.splitlines() if line.startswith(f"  {name}  ")]
    return re.sub(" +", " ", line.removeprefix(f"  {name}").strip())


def test_the_packaged_run_is_planned_without_arguments() -> None:
    result = plan()
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "formulary, 755,072 parameters" in result.stdout
    assert row(result.stdout, "data") == "formulary, 20 sites, natural by site"
    assert "coverage assumes" not in result.stdout
    assert row(result.stdout, "formulary.down").startswith("1 ")


def test_the_jsl_recipe_says_what_it_costs() -> None:
    output = plan("--config", JSL, "--uplink-mbps", "20").stdout
    assert row(output, "total") == "7,809.38 7,813.97"
    assert row(output, "mean per round") == "78.09 78.14"
    assert row(output, "train.up") == "300 13.02 3,904.69 3,906.98"
    assert "johnsnowlabs/JSL-MedLlama-3-8B-v1.0, 8,030,261,248 parameters" in output
    assert "shapes of meta-llama/Meta-Llama-3-8B" in output
    assert row(output, "examples seen") == "28,800, repeats included"
    # 2 * 13,647,872 bytes * 8 / 20e6 = 10.9 s, and 100 times that: 18.2 min
    assert row(output, "transfer, one site, one round (20 Mbit/s up, 20 down)") == "10.9 s"
    assert row(output, "transfer, one site, sum over all rounds") == "18.2 min"
    assert "memory is computed from formulas" in output


def test_a_flowertune_entry_with_dora_is_planned_with_the_start_of_its_magnitudes(
    tmp_path: Path,
) -> None:
    """12,288 outputs in 28 layers: 2 sites send 4 bytes of each, and 196 headers; 2.67 MiB."""
    (tmp_path / "pyproject.toml").write_text(
        """
[tool.flwr.app.config]
model.name = "Qwen/Qwen3-0.6B"
model.lora.peft-lora-r = 8
model.lora.use-dora = true
train.training-arguments.max-steps = 6
strategy.fraction-fit = 0.2
num-server-rounds = 50
static.dataset.name = "flwrlabs/medical-meadow-medical-flashcards"
[tool.flwr.federations]
default = "local"
[tool.flwr.federations.local]
options.num-supernodes = 20
"""
    )
    file = str(tmp_path / "pyproject.toml")
    output = plan("--config", file, "--set", "model.lora.target-modules=all-linear").stdout
    assert row(output, "magnitudes.up").startswith("2 1.34 2.67 ")
    assert row(output, "train.down").startswith("200 20.63 4,126.86")
    assert row(output, "total").startswith("8,256.38 ")
    assert "FlowerTune's figures have no such message" in output


def test_recipes_are_compared_side_by_side_in_the_order_given() -> None:
    for arguments in (["--compare", LAPTOP], ["--compare", LAPTOP, JSL]):
        output = plan("--config", JSL, *arguments).stdout
        assert row(output, "adapter parameters").startswith("3,407,872 460,800")
        assert row(output, "total, MiB").startswith("7,809.38 216.24")


def test_several_recipes_go_by_name() -> None:
    output = plan("jsl-medllama-3-8b", "qwen2.5-7b-instruct").stdout
    assert row(output, "cohort x rounds") == "3 x 10 3 x 100"


def test_real_sites_are_planned_as_their_run_is_started() -> None:
    """Real sites are none of the formulary's: no partitioner of ours, nothing replayed."""
    output = plan("--engine", "deployment").stdout
    assert row(output, "data") == "formulary, 20 sites, iid"
    assert row(output, "examples seen") == "7,680, repeats included"


def set_checkpointing(value: str) -> list[str]:
    return ["--set", f"model.gradient-checkpointing={value}"]


def test_auto_shows_the_peak_without_checkpointing_and_with_it() -> None:
    output = plan("--config", JSL).stdout
    both = "46.82 GiB without checkpointing, 10.07 GiB with checkpointing"
    told = row(output, "peak GPU memory of a site")
    assert told == f"{both} (auto: on if memory is short)"
    assert row(output, "part") == "without checkpointing with checkpointing"
    assert row(output, "peak") == "46.82 10.07"
    assert 'model.gradient-checkpointing = "auto" switches gradient checkpointing on' in output
    compared = plan("--config", JSL, "--compare", LAPTOP).stdout
    assert row(compared, "peak GPU memory, GiB, without checkpointing") == "46.82 2.29"
    assert row(compared, "peak GPU memory, GiB, with checkpointing") == "10.07 1.27"
    assert 'model.gradient-checkpointing = "auto" switches' in compared


@pytest.mark.parametrize(
    ("value", "way", "other", "peak"),
    [("true", "with", "without", "10.07"), ("false", "without", "with", "46.82")],
)
def test_checkpointing_that_is_decided_shows_the_peak_that_applies(
    value: str, way: str, other: str, peak: str
) -> None:
    output = plan("--config", JSL, *set_checkpointing(value)).stdout
    assert row(output, "peak GPU memory of a site") == f"{peak} GiB {way} checkpointing"
    assert row(output, "peak") == peak
    assert '"auto"' not in output
    compared = plan("--config", JSL, "--compare", LAPTOP, *set_checkpointing(value)).stdout
    assert row(compared, f"peak GPU memory, GiB, {way} checkpointing").startswith(f"{peak} ")
    assert f"{other} checkpointing" not in compared
    content = json.loads(plan("--config", JSL, *set_checkpointing(value), "--json", "-").stdout)
    assert list(content["site-peak-bytes"]) == [f"{way}-checkpointing"]


def test_recipes_with_checkpointing_on_and_auto_stand_side_by_side(tmp_path: Path) -> None:
    switched_on = tmp_path / "on.toml"
    text = Path(JSL).read_text().replace('checkpointing = "auto"', "checkpointing = true")
    switched_on.write_text(text)
    output = plan("--config", JSL, "--compare", str(switched_on)).stdout
    assert row(output, "peak GPU memory, GiB, without checkpointing") == "46.82 -"
    assert row(output, "peak GPU memory, GiB, with checkpointing") == "10.07 10.07"


def test_overrides_hold_for_every_recipe() -> None:
    output = plan("--config", JSL, "--compare", LAPTOP, "--rounds", "10").stdout
    assert row(output, "cohort x rounds") == "3 x 10 2 x 10"


def test_json_goes_to_a_file_or_stands_alone(tmp_path: Path) -> None:
    alone = json.loads(plan("--config", JSL, "--json", "-").stdout)
    for bare in (["--config", JSL, "--json"], ["--json", "--config", JSL]):
        assert json.loads(plan(*bare).stdout) == alone
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("")
    refused = plan("--config", JSL, f"--json={recipe}")
    assert "would replace a recipe" in refused.stderr
    assert recipe.read_text() == ""
    file = tmp_path / "plan.json"
    output = plan("--config", JSL, "--json", str(file)).stdout
    assert json.loads(file.read_text()) == alone
    assert row(output, "total")
    assert output.endswith(f"written: {file}\n")
    assert alone["communication"]["total-bytes"] == 8_188_723_200
    assert list(alone["memory-by-precision"]) == ["float32", "bfloat16", "8-bit", "4-bit NF4"]
    both = json.loads(plan("--config", JSL, "--compare", LAPTOP, "--json", "-").stdout)
    assert list(both) == [Path(JSL).stem, Path(LAPTOP).stem]


def test_a_local_folder_is_planned_and_its_rows_are_counted(
    tiny_base: Path, flashcards: Path
) -> None:
    output = plan("--model", str(tiny_base), "--data", str(flashcards)).stdout
    assert row(output, "rows of the data") == "120"
    assert f"shapes of {tiny_base}/config.json" in output


def test_unknown_rows_are_asked_for_and_taken() -> None:
    assert "pass --rows" in plan("--data", "someone/else").stdout
    output = plan("--data", "someone/else", "--rows", "5000").stdout
    assert row(output, "rows of the data") == "5,000"
    assert "pass --rows" not in output


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--model", "Qwen/Qwen2.5-8B"], 1, "Did you mean 'Qwen/Qwen2.5-7B'?"),
        (["--architecture", "gemma"], 1, "The shapes of 'gemma' are unknown"),
        (["--set", "seeed=1"], 2, "Did you mean 'seed'?"),
        (["--config", "no.toml"], 2, "no.toml cannot be read"),
        (["--config", JSL, "--compare", "no.toml"], 2, "no.toml cannot be read"),
        (["--config", JSL, JSL], 2, f"{JSL} and --config {JSL} are two recipes; give one"),
        (["--downlink-mbps", "5"], 2, "--downlink-mbps needs --uplink-mbps"),
        (["--uplink-mbps", "0"], 2, "--uplink-mbps = 0 must be a number above 0"),
        (["--uplink-mbps", "5", "--downlink-mbps", "nan"], 2, "--downlink-mbps = nan must be"),
        (["--json", "/no/such/folder/x.json"], 1, "/no/such/folder/x.json cannot be written"),
        (["--set", "model.lora.target-modules=wq"], 1, "matches no linear module"),
        (
            ["--engine", "deployment", "--set", "train.learning-rate-min=0"],
            2,
            "gives the last round a learning rate of 0",
        ),
    ],
)
def test_a_slip_is_told_in_one_line_before_any_output(
    arguments: list[str], code: int, said: str
) -> None:
    got, message = told(*arguments)
    assert got == code
    assert said in message


def test_a_private_recipe_shows_what_it_spends() -> None:
    """One step of all units a visit: five releases of multiplier 20, as `privacy plan` has it."""
    keys = "unit-guarantee=example declared-units=1000 sampling-rate=1 noise-multiplier=20"
    arguments = [part for key in keys.split() for part in ("--set", f"privacy.{key}")]
    arguments += ["--set", "train.training-arguments.max-steps=1"]
    arguments += ["--set", "strategy.name=fedavg"]
    output = plan(*arguments).stdout
    assert row(output, "noise multiplier (sigma)") == "20"
    assert row(output, "epsilon after all 24 rounds").endswith("(5 visits)")
    assert row(output, "site level") == "not private"
    assert "- may not learn: a step's noise is 7.01 times" in output
    found = json.loads(plan(*arguments, "--json").stdout)["privacy"]
    assert (
        row(output, "epsilon after all 24 rounds")
        == f"{found['epsilon'][-1]['epsilon']:.2f} (5 visits)"
    )
    assert "privacy" not in json.loads(plan("--json").stdout)


def test_neither_torch_nor_flower_nor_transformers_is_loaded() -> None:
    heavy = ("torch", "transformers", "flwr", "peft", "datasets", "pyarrow")
    code = (
        "import sys, atexit\n"
        f"sys.argv = ['grandrounds', 'plan', '--config', {JSL!r}, '--uplink-mbps', '5']\n"
        f"heavy = lambda: [name for name in {heavy!r} if name in sys.modules]\n"
        "atexit.register(lambda: print('loaded:', heavy()))\n"
        "from grandrounds.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("loaded: []")


def test_every_recipe_can_be_planned() -> None:
    results: dict[str, Any] = {}
    for file in sorted((ROOT / "configs").glob("*.toml")):
        results[file.stem] = json.loads(plan("--config", str(file), "--json", "-").stdout)
    totals = {name: r["communication"]["total-mib"] for name, r in results.items()}
    assert int(totals["qwen2.5-7b-instruct"]) == 46_228
    rows = {name: r["reading"]["rows"] for name, r in results.items()}
    assert rows.pop("smollm2-135m-instruct") == 1_500
    assert rows.pop("private-consortium") == 1_905
    assert rows.pop("formulary-dpo") == 1_500
    private = results["private-consortium"]
    assert private["privacy"]["epsilon"][-1]["epsilon"] < 4.01
    assert private["masks"]["values-may-be-cut"] is False
    assert private["masks"]["sites-that-may-be-lost"] == 1
    assert private["codecs"] == {}
    assert set(rows.values()) == {33_955}


def test_the_commands_of_the_page_parse() -> None:
    import shlex

    import typer.main

    command: Any = typer.main.get_command(app)
    page = (ROOT / "docs" / "planning.md").read_text().replace("\\\n", "")
    lines = re.findall(r"^grandrounds plan (.*)$", page, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        command.commands["plan"].make_context("plan", shlex.split(line))
