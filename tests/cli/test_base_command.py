"""`grandrounds base`, and a base that is named without having been fetched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config.bases import FOLDER_VARIABLE, REAL_BASE
from tests.law import HEAVY
from tests.tiny_models import tiny_bases

FETCH = f"grandrounds base fetch {REAL_BASE}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own folder of bases, with one that is only a config.json."""
    folder = tmp_path / "bases"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return folder


def output(*arguments: str, code: int = 0) -> str:
    """Return what a command prints on both streams."""
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_list_shows_what_is_here_and_what_can_be_fetched(cache: Path) -> None:
    lines = output("base", "list", "--plain").splitlines()
    assert any(line.split()[:3] == ["formulary", "built", "in"] for line in lines)
    assert any("mine" in line and str(cache / "mine") in line for line in lines)
    assert any(REAL_BASE in line and FETCH in line for line in lines)


def test_a_check_tells_family_targets_template_hash_and_memory(tiny_base: Path) -> None:
    told = dict(
        line.split(maxsplit=1)
        for line in output("base", "check", str(tiny_base)).replace("a visit", "visit").splitlines()
    )
    assert told["family"] == "llama, 2 layers of 32, vocabulary 384"
    assert "q_proj, v_proj" in told["LoRA"]
    assert told["chat"].startswith("template none")
    assert len(told["sha256"]) == 64
    assert told["visit"].endswith("fits")


def test_a_check_names_what_stays_frozen_on_a_mixture(tmp_path: Path) -> None:
    tiny_bases.make_base(tiny_bases.BASES["mixtral"], tmp_path / "mixture")
    told = output("base", "check", str(tmp_path / "mixture"))
    assert "all linear modules: k_proj, o_proj, q_proj, v_proj" in told
    assert "left frozen   experts.down_proj, experts.gate_up_proj" in told


def test_a_visit_that_does_not_fit_is_exit_code_1_with_what_would(tiny_base: Path) -> None:
    batch = "train.training-arguments.per-device-train-batch-size=8388608"
    told = output("base", "check", str(tiny_base), "--set", batch, code=1)
    assert "does not fit; " in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["base", "check", "/no/such/folder"], "'/no/such/folder' is no base here and no folder"),
        (["base", "check", REAL_BASE], FETCH),
        (["base", "fetch", "smollm2-135m"], f"Did you mean '{REAL_BASE}'?"),
        (["base", "import", "/no/such.gguf", "a/b"], "'a/b' is not allowed as the name of a base"),
        (["base", "import", "/no/such.gguf", "a"], "/no/such.gguf is not a file"),
        (["compare", "--model", REAL_BASE], FETCH),
        (["evaluate", "none", "--base", REAL_BASE, "--benchmarks", "formulary"], FETCH),
        (["run", "--model", "SmolLM2-135M-Instruct"], f"Did you mean '{REAL_BASE}'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_here_is_told_in_one_line(arguments: list[str], said: str) -> None:
    told = output(*arguments, code=1)
    assert said in told
    assert len(told.splitlines()) == 1


def test_a_base_is_planned_before_it_is_fetched() -> None:
    assert "134,515,008 parameters" in output("plan", "--model", REAL_BASE, "--plain")


def test_a_run_on_a_base_that_is_not_fetched_loads_nothing_heavy() -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([n for n in {HEAVY!r} if n in sys.modules]))\n"
        f"sys.argv = ['grandrounds', 'run', '--model', {REAL_BASE!r}]\n"
        "from grandrounds.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert FETCH in done.stderr
    assert (done.returncode, done.stdout.strip()) == (1, "[]")
