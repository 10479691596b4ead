"""`grandrounds privacy` as a person meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from grandrounds.cli import app
from grandrounds.config import recipes
from grandrounds.site.private.accountant import epsilon_of
from grandrounds.site.private.rehearsal import mechanism_of
from grandrounds.study.audit import run as audited
from grandrounds.study.report.one_run import run_page
from grandrounds.study.report.page import html
from grandrounds.study.report.read import read_run
from tests.server.test_guarantees import AUDIT
from tests.study.report.run_files import write_run

HEAVY = ("torch", "transformers", "flwr", "peft", "datasets", "pyarrow")

OPTIONS = (
    "--units 1000 --sampling-rate 1 --steps 1 --noise-multiplier 20 --delta 1e-6 "
    "--set strategy.name=fedavg"
)


def test_a_guarantee_is_planned_without_torch() -> None:
    """Five visits of a step each are five releases of multiplier 20, or one of 8.94."""
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([n for n in {HEAVY!r} if n in sys.modules], "
        "file=sys.stderr))\n"
        f"sys.argv = ['grandrounds', 'privacy', 'plan', '--json', *{OPTIONS.split()!r}]\n"
        "from grandrounds.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith("\n[]")
    found = json.loads(done.stdout)
    assert [(one["rounds"], one["visits"]) for one in found["epsilon"]] == [
        (1, 1),
        (12, 3),
        (24, 5),
    ]
    spent = [one["epsilon"] for one in found["epsilon"]]
    assert spent == sorted(spent)
    assert found["unit"] == "record"
    # noise 20 on 122,880 values, over 1,000 units a step
    assert round(found["noise-to-clip"], 2) == 7.01
    assert found["learns"] == "doubtful"
    assert found["site-level"]["private"] is False
    assert "below about 80 sites a round" in found["site-level"]["why"]
    assert "site level: not private" in done.stderr
    assert "may not learn" in done.stderr


SMALL = {
    "num-server-rounds": 1,
    "data.num-partitions": 2,
    "data.partitioner": "iid",
    "strategy.fraction-train": 1.0,
    "train.training-arguments.max-steps": 1,
    "train.num-threads": 1,
    "privacy.unit-guarantee": "example",
    "privacy.noise-multiplier": 20.0,
    "privacy.sampling-rate": 1.0,
    "privacy.declared-units": 60,
}


def words(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_the_recipe_of_a_run_is_audited_beside_its_claim_and_its_page_says_so(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", rounds=1, sites=2, cohort=2)
    (run / "config.toml").write_text(recipes.to_toml(recipes.resolve(SMALL).recipe()))
    done = CliRunner().invoke(app, ["privacy", "audit", str(run), "--canaries", "40", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((run / "privacy-audit.json").read_text())
    claimed = epsilon_of(mechanism_of(recipes.resolve(SMALL)))
    assert found["claimed-epsilon"] == pytest.approx(claimed)
    assert found["surely-at-least-epsilon"] <= claimed
    assert found["mechanism"]["surely-at-least-epsilon"] <= claimed
    sides = found["extraction"]
    assert sides["in"]["canaries"] + sides["out"]["canaries"] == found["canaries"] == 40
    assert sides["in"]["canaries"] == found["membership"]["members"] == found["canaries-in"]
    page = html(run_page(read_run(run)))
    assert f"claimed epsilon {claimed:.2f}" in page
    assert "bound below the claim proves nothing" in page


@pytest.mark.parametrize(("bound", "code"), [(0.4, 0), (4.5, 1)])
def test_an_audit_that_contradicts_the_claim_ends_with_an_error(
    bound: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surely = {"at-least-epsilon": bound, "surely-at-least-epsilon": bound}
    found = {**AUDIT, **surely, "verdict": "as found"}
    made = SimpleNamespace(as_dict=lambda: found)
    monkeypatch.setattr(audited, "audit", lambda config, count, tell: made)
    out = tmp_path / "found.json"
    done = CliRunner().invoke(app, ["privacy", "audit", *words(SMALL), "--out", str(out)])
    assert done.exit_code == code
    assert f"claimed epsilon 4.00, at least {bound:.2f} (95 %), AUC 0.61" in done.stdout
    assert "as found" in done.stdout
    assert json.loads(out.read_text())["at-least-epsilon"] == bound


def test_too_few_canaries_are_refused_before_anything_heavy_is_loaded() -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "sys.argv = ['grandrounds', 'privacy', 'audit', '--canaries', '2']\n"
        "from grandrounds.__main__ import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--canaries 2 is not allowed: use 20 to" in done.stderr
    assert done.stdout.strip() == "False"
